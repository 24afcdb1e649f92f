"""Commands of setuptools that put the compiled C++ library into the wheel, so that its users need no compiler.

    ITM_FAST_LEVELS=all pip wheel --no-deps .          # py3-none-linux_x86_64, all instruction levels
    ITM_FAST_LEVELS=avx2,generic pip wheel --no-deps .  # these alone
    pip wheel --no-deps .                              # py3-none-any; each machine compiles its level at first use

A build cannot tell `pip wheel` from `pip install`, which makes a wheel and unpacks it. Four of the
five levels take nine minutes of a Zen 4 core (GCC 12; about six if all is compiled with -O2), and an installation needs
one of them at most, so the libraries are put in only where ITM_FAST_LEVELS asks for them. PyPI takes no wheel that is
named linux_x86_64: `auditwheel repair` names it by the glibc that its libraries need, for example manylinux_2_34 if GCC
12 has built them on Debian 12.
The library is loaded by ctypes and uses neither Python's nor torch's headers, so one serves every Python and torch.
setuptools loads this file where torch is not installed, and pyproject.toml names its classes.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
import types
from pathlib import Path
from typing import Any

from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

_HERE = Path(__file__).resolve().parent
_WITHOUT = (
    "itm-fast: no CPU kernels are compiled now, since a build cannot tell `pip wheel` from `pip install`: each machine "
    "compiles them at first use. With ITM_FAST_LEVELS=all a wheel holds those of every instruction level (one or two "
    "minutes each on one core)"
)


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
    """Makes a wheel for this platform and any Python if libraries are asked for, else one for every platform."""

    def run(self) -> None:
        if levels := levels_asked(os.environ.get("ITM_FAST_LEVELS", "")):
            into = Path(self.bdist_dir).with_name("libraries")
            shutil.rmtree(into, ignore_errors=True)
            build_libraries(levels, into)
            self.root_is_pure = False
            # setuptools decides by this whether the package belongs to the platform's folder.
            self.distribution.has_ext_modules = lambda: True  # type: ignore[method-assign]
            command: Any = self.get_finalized_command("build_py")
            command.libraries = into
        else:
            print(_WITHOUT, file=sys.stderr)  # pip shows it with -v, `python -m build` always
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        return (python, abi, platform) if self.root_is_pure else ("py3", "none", platform)


def levels_asked(text: str) -> list[str]:
    """The instruction levels that ITM_FAST_LEVELS names.

    Raises:
        ValueError: one is unknown.

    >>> levels_asked("avx2, generic"), levels_asked("all")[0], levels_asked("")
    (['avx2', 'generic'], 'amx_bf16', [])
    """
    known = list(_modules()[1].LEVELS)
    names = known if text.strip() == "all" else [name for name in text.replace(",", " ").split() if name != "none"]
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"ITM_FAST_LEVELS must be all, none or some of {', '.join(known)}, got {', '.join(unknown)}")
    return names


def build_libraries(levels: list[str], into: Path) -> None:
    """Compile the library for each level, or copy it from the cache folder if this compiler has built it before.

    Args:
        levels: some of `compiling.LEVELS`. Where it is all of them, those that the compiler does not know are left out.
        into: gets a folder for each level, as `cache.load` reads it.

    Raises:
        Unavailable: there is no compiler, it does not know a level that was named, or it fails.
    """
    cache, compiling = _modules()
    into = into.absolute()  # the compiler runs in another folder
    compiler = compiling.find_compiler()
    sources = compiling.sources_in(_csrc())
    into.mkdir(parents=True)
    for level in levels:
        name = compiling.library_name(level, sources)
        built = cache.find(f"{name}-{compiling.compiler_name(compiler)}", _checked)
        if built is not None and cache.facts(built, cache.LIBRARY)["level"] == level:
            (into / name).mkdir()
            for file in (cache.LIBRARY, "build.json"):
                shutil.copy2(built / file, into / name)
            continue
        print(f"itm-fast: compiling its CPU kernels for {level} ...", file=sys.stderr, flush=True)
        folder = into / f"building-{level}"
        folder.mkdir()
        deadline = time.monotonic() + 3 * compiling.SECONDS
        if compiling.best_level(compiler, level, folder, deadline) != level:
            if levels == list(compiling.LEVELS):
                print(f"itm-fast: {compiler.version} does not know {level}: it is left out", file=sys.stderr)
                shutil.rmtree(folder)
                continue
            raise cache.Unavailable(f"{compiler.version} does not know {level}; leave it out of ITM_FAST_LEVELS")
        compiling.lay_out(sources, folder / "objects")
        library = compiling.compile_library(compiler, level, folder / "objects", deadline)
        (into / name).mkdir()
        library.rename(into / name / cache.LIBRARY)
        cache.note(into / name, cache.LIBRARY, level=level, compiler=compiler.version)
        shutil.rmtree(folder)


def _checked(folder: Path) -> Path:
    """The folder, if its library is complete."""
    cache, _ = _modules()
    cache.facts(folder, cache.LIBRARY)
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
