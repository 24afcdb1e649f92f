"""Commands of setuptools that put the compiled C++ library into the wheel, so that its users need no compiler.

    pip wheel --no-deps .                               # py3-none-linux_x86_64, all levels that the compiler knows
    ITM_FAST_LEVELS=avx2,generic pip wheel --no-deps .  # these alone
    ITM_FAST_LEVELS=none pip wheel --no-deps .          # py3-none-any; each machine compiles its level at first use

The same holds for `pip install .`, which makes a wheel and unpacks it; `pip install --editable .` compiles nothing.
Without a compiler the wheel is that of ITM_FAST_LEVELS=none. PyPI takes no wheel that is
named linux_x86_64: `auditwheel repair` names it by the glibc that its libraries need, for example manylinux_2_34 if GCC
12 has built them on Debian 12.
The library is loaded by ctypes and uses neither Python's nor torch's headers, so one serves every Python and torch.
setuptools loads this file where torch is not installed, and pyproject.toml names its classes.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
import types
import warnings
from pathlib import Path
from typing import Any

from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

_HERE = Path(__file__).resolve().parent


class BuildPy(build_py):
    """Copies the package, and the libraries that `BdistWheel` has compiled."""

    libraries: Path | None = None

    def run(self) -> None:
        shipped = Path(self.build_lib) / "itm_fast" / "_native" / "libraries"
        shutil.rmtree(shipped, ignore_errors=True)  # of an earlier build in the same folder
        super().run()
        if self.libraries is not None:
            shutil.copytree(self.libraries, shipped)


class BdistWheel(bdist_wheel):
    """Makes a wheel for this platform and any Python if it holds libraries, else one for every platform."""

    def run(self) -> None:
        cache, _ = _modules()
        try:
            levels = levels_asked(os.environ.get("ITM_FAST_LEVELS", ""))
            if levels and (compiler := suitable_compiler()):
                into = Path(self.bdist_dir).with_name("libraries")
                shutil.rmtree(into, ignore_errors=True)
                build_libraries(levels, into, compiler)
                self.root_is_pure = False
                # setuptools decides by this whether the package belongs to the platform's folder.
                self.distribution.has_ext_modules = lambda: True  # type: ignore[method-assign]
                command: Any = self.get_finalized_command("build_py")
                command.libraries = into
        except ValueError as error:
            raise SystemExit(f"itm-fast: {error}") from None
        except cache.Unavailable as error:
            raise SystemExit(f"itm-fast: {error}; ITM_FAST_LEVELS=none installs without compiling") from None
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        return (python, abi, platform) if self.root_is_pure else ("py3", "none", platform)


def levels_asked(text: str) -> list[str]:
    """The instruction levels that ITM_FAST_LEVELS names; all if it is empty.

    Raises:
        ValueError: one is unknown.

    >>> levels_asked("avx2, generic"), levels_asked("")[0], levels_asked("none")
    (['avx2', 'generic'], 'amx_bf16', [])
    """
    known = list(_modules()[1].LEVELS)
    names = text.lower().replace(",", " ").split()
    if names in ([], ["all"]):
        return known
    if names == ["none"]:
        return []
    if any(name not in known for name in names):
        raise ValueError(f"ITM_FAST_LEVELS must be all or none alone, or some of {', '.join(known)}, got {text!r}")
    return list(dict.fromkeys(names))


def suitable_compiler() -> Any:
    """The compiler; None after a warning if there is none that compiles C++20, and neither variable asks for it.

    Raises:
        Unavailable: the compiler that CXX names does not run or is too old, or there is none for ITM_FAST_LEVELS.
    """
    cache, compiling = _modules()
    try:
        compiler = compiling.find_compiler()
        with tempfile.TemporaryDirectory() as folder:
            compiling.best_level(compiler, "generic", Path(folder), time.monotonic() + 60)
        return compiler
    except cache.Unavailable as error:
        if os.environ.get("ITM_FAST_LEVELS", "").strip() or os.environ.get("CXX"):
            raise
        _say(f"WARNING: this wheel holds no CPU kernels, and every machine has to compile them at first use: {error}")
        return None


def build_libraries(levels: list[str], into: Path, compiler: Any) -> None:
    """Compile the library for each level, or copy it from the cache folder if this compiler has built it before.

    Args:
        levels: some of `compiling.LEVELS`. Where it is all of them, those that the compiler does not know are left out.
        into: gets a folder for each level, as `cache.load` reads it.
        compiler: a `compiling.Compiler`.

    Raises:
        Unavailable: the compiler does not know a level that was named, or it fails.
    """
    cache, compiling = _modules()
    sources = compiling.sources_in(_csrc())
    names = {level: compiling.library_name(level, sources) for level in levels}
    into.mkdir(parents=True)
    missing = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a cache folder that cannot be written: it would only save time
        with cache.scratch() as (scratch, kept):
            deadline = time.monotonic() + len(levels) * compiling.SECONDS
            for level in levels:
                built = cache.find(f"{names[level]}-{compiling.compiler_name(compiler)}", _checked)
                if built is not None and cache.facts(built, cache.LIBRARY)["level"] == level:
                    _ship(built, into / names[level])
                    _say(f"{level} was compiled before")
                elif compiling.best_level(compiler, level, scratch, deadline) == level:
                    missing.append(level)
                elif levels == list(compiling.LEVELS):
                    _say(f"{compiler.version} does not know {level}: it is left out")
                else:
                    raise cache.Unavailable(
                        f"{compiler.version} does not know {level}; leave it out of ITM_FAST_LEVELS"
                    )
            if not missing:
                return
            _say(f"compiling CPU kernels for {', '.join(missing)} ...")
            objects = scratch / "objects"
            compiling.lay_out(sources, objects)
            compiling.compile_libraries(compiler, {level: level for level in missing}, objects, deadline, _Progress())
            for level in missing:
                result = scratch / level
                compiling.move_library(objects / level / cache.LIBRARY, result, level, compiler)
                _ship(result, into / names[level])
                if kept:
                    home = scratch.parent / f"{names[level]}-{compiling.compiler_name(compiler)}"
                    cache.publish(result, home, _checked)


def _ship(built: Path, folder: Path) -> None:
    """Copy a library and what is known about it, without what its users have measured beside it."""
    folder.mkdir()
    for file in (_modules()[0].LIBRARY, "build.json"):
        shutil.copy2(built / file, folder / file)


class _Progress:
    """Says with every tenth of the files how many are compiled."""

    def __init__(self) -> None:
        self.said, self.began = 0, time.monotonic()

    def __call__(self, done: int, files: int) -> None:
        if done * 10 // files > self.said:
            self.said = done * 10 // files
            _say(f"{done} of {files} files are compiled after {time.monotonic() - self.began:.0f} s")


def _say(text: str) -> None:
    """On stderr, which pip shows with -v or if the build fails, and `python -m build` always."""
    print(f"itm-fast: {text}", file=sys.stderr, flush=True)


def _checked(folder: Path) -> Path:
    """The folder, if its library is complete."""
    cache, _ = _modules()
    cache.facts(folder, cache.LIBRARY)
    cache.mark_used(folder)
    return folder


def _csrc() -> Path:
    return _HERE.parents[1] / "csrc"


def _modules() -> tuple[Any, Any]:
    """`cache` and `compiling` of this folder, without importing the packages around them, which need torch."""
    for name, folder in (("itm_fast", _HERE.parent), ("itm_fast._native", _HERE)):
        if name not in sys.modules:
            package = types.ModuleType(name)
            package.__path__ = [str(folder)]
            sys.modules[name] = package
    from itm_fast._native import cache, compiling

    return cache, compiling
