"""Python modules in C++ for tests, compiled as the library is: by its compiler and ninja, into its cache folder."""

import importlib.machinery
import importlib.util
import shlex
import sysconfig
import tempfile
from pathlib import Path

import pytest

from itm_fast import _native
from itm_fast._native import compiling


def build_module(name, level, sources, options=(), flags=compiling.FLAGS):
    """A module in C++ with pybind11; or why it cannot be built, a sentence.

    Args:
        name: that of PYBIND11_MODULE.
        level: one of `_native.LEVELS`.
        sources: file name, or path with folders -> text. Each .cpp file is compiled alone.
        options: more of the compiler's options.
        flags: in place of the library's.
    """
    try:
        import pybind11
    except ImportError:
        return f"no pybind11 to build the {name.replace('_', ' ')} with; `pip install pybind11`"
    try:
        compiler = compiling.find_compiler()
        compiling.find_ninja()
    except _native.Unavailable as error:
        return str(error)
    headers = [sysconfig.get_path("include"), pybind11.get_include()]
    command = [*compiler.command, *(part for folder in headers for part in ("-isystem", folder)), *options]
    with tempfile.TemporaryDirectory() as scratch, pytest.MonkeyPatch.context() as patch:
        folder = Path(scratch, "cpu")
        for file, text in sources.items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_text(text)
        patch.setenv("CXX", shlex.join(command))
        patch.setattr(compiling, "FLAGS", flags)
        built = _native.build(folder.parent, level)
    if built.path is None:
        return f"the cache folder cannot keep the {name.replace('_', ' ')}"
    loader = importlib.machinery.ExtensionFileLoader(name, str(built.path))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader))
    loader.exec_module(module)
    return module
