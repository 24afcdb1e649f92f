"""The C++ library: csrc/ is compiled once per machine, loaded once per process and called through ctypes.

A build is named by a digest of its sources, flags and compiler (`cache`). Ninja compiles it, starting from the last
build's object files (`compiling`), in one process at a time.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import shutil
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from . import amx, cache, compiling, peaks
from .cache import LIBRARY, Build, Unavailable, cache_dir
from .compiling import BFLOAT16_LEVELS, LEVELS

__all__ = [
    "BFLOAT16_LEVELS", "LEVELS", "Build", "Unavailable", "bfloat16_products", "build", "cache_dir", "call", "csrc_dir",
    "level", "outcome", "why_not",
]  # fmt: skip

_lock = threading.Lock()
_outcome: Build | str | None = None
_functions: dict[str, Callable[..., bytes | None]] = {}

# Whether this process is a forked child, in which kernels must not run on OpenMP's threads (csrc/cpu/threads.h). What
# multiprocessing spawns has this argument, and all its threads. Not seen is os.fork() without multiprocessing before
# itm_fast was imported: if torch had run a loop on several threads by then, kernels of several threads hang there.
_child = multiprocessing.parent_process() is not None and "--multiprocessing-fork" not in sys.orig_argv


def _forked() -> None:
    """Replace the lock in a forked child: another thread of the parent may hold it, and does not exist in the child."""
    global _lock, _child
    _lock, _child = threading.Lock(), True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


def csrc_dir() -> Path:
    """The folder of the C++ sources: inside the package once installed, beside it in a checkout."""
    here = Path(__file__).resolve().parents[1]
    for place in (here / "csrc", here.parent / "csrc"):
        if (place / "cpu").is_dir():
            return place
    raise Unavailable("itm-fast was installed without its C++ sources; install it again")


def level() -> str:
    """The best of `LEVELS` that the processor supports; ATEN_CPU_CAPABILITY limits it as it limits torch's kernels.

    AMX is taken for its peak alone, products between tiles; whether whole calls, which also load tiles and turn rows,
    are faster than with AVX-512's dot products has not been measured. ITM_FAST_AMX=0 leaves it out.
    """
    capability = torch.backends.cpu.get_cpu_capability()
    if capability == "AVX512":
        if not torch.cpu._is_avx512_bf16_supported():
            return "avx512"
        return "amx_bf16" if os.environ.get("ITM_FAST_AMX") != "0" and amx.granted() else "avx512_bf16"
    return "avx2" if capability == "AVX2" else "generic"


def why_not() -> str | None:
    """None if the library is loaded (after building it if needed), else one sentence. Decided once per process."""
    built = outcome()
    return built if isinstance(built, str) else None


def outcome() -> Build | str:
    """The loaded library, or a sentence that says why there is none."""
    global _outcome
    if _outcome is None:
        with _lock:
            if _outcome is None:
                try:
                    built = _right(build(csrc_dir(), level()))
                    if _child:
                        built.library.itm_forked()
                    _outcome = built
                except Unavailable as error:
                    _outcome = str(error)
                except OSError as error:
                    _outcome = f"the CPU kernels cannot be built: {error}"
    return _outcome


def _right(built: Build) -> Build:
    """The library itself, or that of a lower level if the processor's tiles do not compute what they should."""
    if built.level != "amx_bf16" or not (fault := amx.fault(built.library)):
        return built
    lower = build(csrc_dir(), compiling.below(built.level)[0])
    warnings.warn(f"itm-fast leaves out this processor's AMX: {fault}; its level is {lower.level} now", stacklevel=4)
    return lower


def bfloat16_products() -> tuple[bool, object]:
    """Whether bfloat16 products are used when torch's matmul precision allows them, and an object whose str() says why.

    They are used if they are faster on this processor (`peaks`). ITM_FAST_BFLOAT16 overrides this: 1 uses them on every
    processor that has them, 0 never.

    Raises:
        ValueError: ITM_FAST_BFLOAT16 is neither 0 nor 1.
    """
    built, chosen = outcome(), os.environ.get("ITM_FAST_BFLOAT16", "")
    if chosen not in ("", "0", "1"):
        raise ValueError(f"ITM_FAST_BFLOAT16 must be 0 or 1, got {chosen!r}")
    if isinstance(built, str) or built.level not in BFLOAT16_LEVELS:
        return False, "this processor has none"
    if chosen:
        return chosen == "1", f"ITM_FAST_BFLOAT16 is {chosen}"
    found = peaks.measured(built.library, built.path)
    return found.bfloat16_pays, found  # not str(found): every op calls this, and few callers read the text


def call(name: str, argument: Any) -> None:
    """Call an exported C function without holding the GIL.

    Args:
        name: the function, `const char *name(const Call&)`; it returns null or an error message.
        argument: what ctypes passes, as `ctypes.byref` of a struct.

    Raises:
        RuntimeError: the library is not available, or the function failed.
        MemoryError: the function ran out of memory.
    """
    function = _functions.get(name)
    if function is None:
        built = outcome()
        if isinstance(built, str):
            raise Unavailable(built)
        function = getattr(built.library, name)
        function.restype = ctypes.c_char_p  # type: ignore[attr-defined]
        _functions[name] = function
    failure = function(argument)
    if failure is not None:
        message = failure.decode()
        raise (MemoryError if message.startswith("out of memory") else RuntimeError)(message)


def build(csrc: Path, level: str) -> Build:
    """Load the library of `csrc/cpu/*.cpp` from the wheel or the cache folder, after compiling it if it is in neither.

    Args:
        csrc: the folder that contains cpu/.
        level: one of `LEVELS`. If the compiler does not know its flags, the next lower level is built.

    Raises:
        Unavailable: there is no compiler, it fails or takes too long, or the library does not load.
    """
    sources = compiling.sources_in(csrc)
    name = compiling.library_name(level, sources)
    if found := _shipped(name):
        return found
    try:
        compiler = compiling.find_compiler()
    except Unavailable:
        for lower in compiling.below(level):
            if found := _shipped(compiling.library_name(lower, sources)):
                return found
        # On a cluster, another node that shares this home folder may have a compiler and have built the library.
        if found := cache.find(f"{name}-*", cache.load):
            return found
        raise
    compiled_by = compiling.compiler_name(compiler)
    name += f"-{compiled_by}"
    if found := cache.find(name, cache.load):
        return found
    with cache.scratch() as (scratch, kept):
        deadline = time.monotonic() + compiling.SECONDS
        built = compiling.best_level(compiler, level, scratch, deadline)
        objects = scratch.parent / f"objects-{built}-{compiled_by}"
        if not kept:
            return _compiled(compiler, built, sources, scratch)
        with cache.turn(objects):
            if found := cache.find(name, cache.load):  # built by the process that held the lock
                return found
            cache.take_objects(objects, scratch / "objects")
            try:
                found = _compiled(compiler, built, sources, scratch)
            except cache.BadObjects:
                shutil.rmtree(scratch / "objects")
                raise
            finally:
                cache.keep_objects(scratch / "objects", objects)
            home = cache.publish(scratch / "result", scratch.parent / name, cache.load)
            return found._replace(path=home and home / LIBRARY)


def _shipped(name: str) -> Build | None:
    """The library of this name in the package, where a wheel has brought it; None if there is none that loads."""
    folder = Path(__file__).resolve().parent / "libraries" / name
    if folder.is_dir():
        with contextlib.suppress(OSError, ValueError):
            return cache.load(folder)
    return None


def _compiled(compiler: compiling.Compiler, level: str, sources: dict[str, bytes], scratch: Path) -> Build:
    """Compile the sources in scratch/objects, move the library to scratch/result, and load it from there."""
    notice = "itm-fast: compiling its CPU kernels, once for this machine (a minute or two) ..."
    print(notice, file=sys.stderr, flush=True)
    objects = scratch / "objects"
    compiling.lay_out(sources, objects)
    compiling.compile_libraries(compiler, {level: ""}, objects, time.monotonic() + compiling.SECONDS)
    result = scratch / "result"
    compiling.move_library(objects / LIBRARY, result, level, compiler)
    try:
        return cache.load(result)._replace(path=None)
    except (OSError, ValueError) as error:
        raise cache.BadObjects(
            f"the CPU kernels were compiled but do not load: {error}; set CXX to a compiler that suits this Python"
        ) from error
