"""The native library: csrc/ is compiled once per machine, loaded once per process and called through ctypes.

A build is named by a digest of all it is made of and appears in the cache folder by one rename, beside its own
checksum. What is there is whole and current or is made again: nothing is locked, and nobody waits for a process that
died.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

FLAGS = ("-O3", "-std=c++20", "-fPIC", "-pthread")
BACKWARD_FLAGS = ("-O2",)  # as fast there, and compiled in little more than half the time
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512")
# Best first. The generic one leaves vectors to the compiler and runs on any processor.
LEVELS: dict[str, tuple[str, ...]] = {
    "avx512_bf16": (*_AVX512, "-mavx512bf16"),
    "avx512": _AVX512,
    "avx2": _AVX2,
    "generic": (),
}
LIBRARY = "itm_fast.so"
SECONDS = 600  # a build that takes longer is given up
_PROBE = '#include <concepts>\n#include <thread>\nstatic_assert(__cplusplus >= 202002L, "this is not C++20");\n'
_FULL = re.compile("no space left on device|disk quota exceeded", re.IGNORECASE)


class Unavailable(RuntimeError):
    """The library cannot be built or loaded here; the message is a sentence for the user."""


class Build(NamedTuple):
    """A loaded library, the level of its instructions, what compiled it, and where it is kept."""

    library: ctypes.CDLL
    level: str
    compiler: str
    path: Path | None = None


_lock = threading.Lock()
_outcome: Build | str | None = None
_functions: dict[str, Callable[..., bytes | None]] = {}


def _forked() -> None:
    """A child of a process that builds in another thread has that thread's lock, and not the thread that frees it."""
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


def csrc_dir() -> Path:
    """The folder of the C++ sources: inside the package once installed, beside it in a checkout."""
    here = Path(__file__).resolve().parent
    for place in (here / "csrc", here.parent / "csrc"):
        if (place / "cpu").is_dir():
            return place
    raise Unavailable("itm-fast was installed without its C++ sources; install it again")


def cache_dir() -> Path:
    """Where builds are kept: ITM_FAST_CACHE_DIR, else itm_fast in XDG_CACHE_HOME or in ~/.cache.

    Raises:
        RuntimeError: the user has no home folder.
    """
    if chosen := os.environ.get("ITM_FAST_CACHE_DIR"):
        return Path(chosen).absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "itm_fast"


def level() -> str:
    """The best of `LEVELS` that the processor reports; ATEN_CPU_CAPABILITY lowers it as it lowers torch's own."""
    capability = torch.backends.cpu.get_cpu_capability()
    if capability == "AVX512":
        return "avx512_bf16" if torch.cpu._is_avx512_bf16_supported() else "avx512"
    return "avx2" if capability == "AVX2" else "generic"


def why_not() -> str | None:
    """None when the library is loaded, built first where it must be; else one sentence. Decided once per process."""
    built = outcome()
    return built if isinstance(built, str) else None


def outcome() -> Build | str:
    """The library of this process, or the sentence that says why there is none."""
    global _outcome
    if _outcome is None:
        with _lock:
            if _outcome is None:
                try:
                    _outcome = build(csrc_dir(), level())
                except Unavailable as error:
                    _outcome = str(error)
                except OSError as error:
                    _outcome = f"the CPU kernels cannot be built: {error}"
    return _outcome


def call(name: str, *args: Tensor | float | None) -> None:
    """Call an exported function, other Python threads running meanwhile.

    Args:
        name: the function, `const char *name(...)` of pointers, int64_t and double; it returns null or what failed.
        args: contiguous CPU tensors or None for the pointers, int or bool for int64_t, float for double.

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
    failure = function(*map(_converted, args))
    if failure is not None:
        message = failure.decode()
        raise (MemoryError if message.startswith("out of memory") else RuntimeError)(message)


def _converted(value: Tensor | float | None) -> Any:
    if isinstance(value, Tensor):
        assert value.is_contiguous(), "a tensor handed to the native library must be contiguous"
        assert value.device.type == "cpu", "a tensor handed to the native library must be in host memory"
        return ctypes.c_void_p(value.data_ptr())
    if value is None:
        return ctypes.c_void_p(None)
    return ctypes.c_double(value) if isinstance(value, float) else ctypes.c_int64(value)


def build(csrc: Path, level: str) -> Build:
    """Load the library of `csrc/cpu/*.cpp` from the cache folder, compiling it first when it is not there.

    Args:
        csrc: the folder that holds cpu/.
        level: one of `LEVELS`. A compiler that does not know its flags builds the next lower level that it knows.

    Raises:
        Unavailable: there is no compiler, it fails or takes too long, or its result does not load.
    """
    sources = sorted((csrc / "cpu").glob("*.cpp"), reverse=True)  # the pair scorers first: they take longest
    parts = hashlib.sha256(repr((FLAGS, BACKWARD_FLAGS, LEVELS[level])).encode())
    for file in sorted([*sources, *csrc.rglob("*.h")]):
        content = file.read_bytes()
        parts.update(repr((str(file.relative_to(csrc)), len(content))).encode() + content)
    name = f"{level}-{parts.hexdigest()[:16]}"
    try:
        compiler, version = _compiler()
    except Unavailable:
        # Nodes of a cluster share a home folder, and not all of them have a compiler.
        if found := _cached(f"{name}-*"):
            return found
        raise
    name += "-" + hashlib.sha256(repr((compiler, version)).encode()).hexdigest()[:8]
    if found := _cached(name):
        return found
    with _scratch() as (scratch, kept):
        notice = "itm-fast: compiling its CPU kernels, once for this machine (up to a minute) ..."
        print(notice, file=sys.stderr, flush=True)
        result = scratch / "result"
        result.mkdir()
        built = _compile(compiler, version, csrc, sources, level, result / LIBRARY)
        note = {"level": built, "compiler": version, "sha256": _checksum(result)}
        (result / "build.json").write_text(json.dumps(note))
        try:
            found = _load(result)
        except (OSError, ValueError) as error:
            raise Unavailable(
                f"the CPU kernels were compiled but do not load: {error}; set CXX to a compiler that suits this Python"
            ) from error
        return found._replace(path=_publish(result, scratch.parent / name) if kept else None)


def _compiler() -> tuple[list[str], str]:
    """The compiler's command and its own words about its version."""
    try:
        chosen = shlex.split(os.environ.get("CXX", ""))
    except ValueError as error:
        raise Unavailable(f"CXX is {os.environ['CXX']!r}, which is no command ({error})") from error
    command = chosen or [next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), "")]
    if shutil.which(command[0]) is None:
        if chosen:
            raise Unavailable(
                f"CXX names {command[0]!r}, which cannot be run; set it to g++ 11 or newer, or to clang++"
            )
        raise Unavailable("no C++ compiler on PATH; install g++ or clang++, or set CXX")
    try:
        said = _run([[*command, "--version"]], None, time.monotonic() + 60)[0]
    except subprocess.CalledProcessError as error:
        raise Unavailable(
            f"{shlex.join(error.cmd)} fails: {_useful(error.output)}; set CXX to g++ or clang++"
        ) from error
    return command, said.strip().partition("\n")[0]


def _cached(pattern: str) -> Build | None:
    """The first sound build of that name, whatever else lies in the cache folder."""
    with contextlib.suppress(OSError, RuntimeError):
        _trust(cache_dir())
        for home in sorted(cache_dir().glob(pattern)):
            with contextlib.suppress(OSError, ValueError):
                _trust(home)
                return _load(home)
    return None


def _trust(folder: Path) -> None:
    """Raise an OSError where another user than root owns a folder: what lies there is run."""
    owner = folder.stat().st_uid
    if owner and owner != os.geteuid():
        raise PermissionError(f"{folder} belongs to another user, number {owner}, and what lies there would be run")


def _load(folder: Path) -> Build:
    """Load a finished build. The checksum comes first: a library cut short can kill the process that loads it.

    Raises:
        OSError, ValueError: it is not whole, or not for this machine.
    """
    note = json.loads((folder / "build.json").read_text())
    if not isinstance(note, dict) or note.get("sha256") != _checksum(folder):
        raise ValueError(f"{folder} is damaged")
    level, compiler = str(note.get("level")), str(note.get("compiler"))
    return Build(ctypes.CDLL(str(folder / LIBRARY)), level, compiler, folder / LIBRARY)


def _checksum(folder: Path) -> str:
    return hashlib.sha256((folder / LIBRARY).read_bytes()).hexdigest()


@contextlib.contextmanager
def _scratch() -> Iterator[tuple[Path, bool]]:
    """A folder to build in, and whether it lies in the cache folder."""
    try:
        root = cache_dir()
        root.mkdir(mode=0o700, parents=True, exist_ok=True)  # what lies there is run
        _trust(root)
        for old in root.glob("building-*"):  # left by a process that was killed
            with contextlib.suppress(OSError):  # another process may be removing it
                if time.time() - old.stat().st_mtime > 3600:
                    shutil.rmtree(old, ignore_errors=True)
        scratch, kept = Path(tempfile.mkdtemp(prefix="building-", dir=root)), True
    except (OSError, RuntimeError) as error:
        try:
            scratch, kept = Path(tempfile.mkdtemp(prefix="itm-fast-")), False
        except OSError as second:
            raise Unavailable(f"no folder to compile the CPU kernels in: {error}; {second}") from second
        warnings.warn(
            f"itm-fast compiles its CPU kernels anew in every process, as it cannot keep them ({error}); "
            "set ITM_FAST_CACHE_DIR to a folder of your own that can be written",
            stacklevel=3,
        )
    try:
        yield scratch, kept
    except OSError as error:
        raise Unavailable(
            f"the CPU kernels cannot be built in {scratch.parent}: {error}; free some space, or set ITM_FAST_CACHE_DIR"
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _publish(result: Path, home: Path) -> Path | None:
    """Put a build in its place in one step; a sound one that is there already stays, a damaged one goes."""
    for _ in range(2):
        try:
            result.rename(home)
            return home / LIBRARY
        except OSError:
            if found := _cached(home.name):
                return found.path
            with contextlib.suppress(OSError):
                home.rename(result.with_name("damaged"))
    return None


def _compile(compiler: list[str], version: str, csrc: Path, sources: Sequence[Path], level: str, library: Path) -> str:
    """Compile and link; tell the level of the result."""
    scratch = library.parents[1]
    deadline = time.monotonic() + SECONDS
    probe = scratch / "probe.cpp"
    probe.write_text(_PROBE)
    objects = [str(scratch / f"{source.stem}.o") for source in sources]
    names = list(LEVELS)
    for lower in names[names.index(level) :]:
        command = [*compiler, *FLAGS, *LEVELS[lower]]
        each = [
            [*command, *(BACKWARD_FLAGS if s.stem.endswith("_backward") else ()), f"-I{csrc}", "-c", str(s), "-o", o]
            for s, o in zip(sources, objects)
        ]
        try:
            _run(each, scratch, deadline)
            _run([[*compiler, "-shared", "-pthread", *objects, "-o", str(library)]], scratch, deadline)
            return lower
        except subprocess.CalledProcessError as failure:
            log = failure.output
        if _FULL.search(log):
            raise Unavailable(f"no space left for compiling in {scratch.parent}; free some, or set ITM_FAST_CACHE_DIR")
        try:
            _run([[*command, "-fsyntax-only", str(probe)]], scratch, deadline)
        except subprocess.CalledProcessError as failure:
            refusal = _useful(failure.output)
        else:
            raise Unavailable(f"the CPU kernels do not compile with {version}: {_useful(log)}{_saved(log, scratch)}")
    raise Unavailable(
        f"{shlex.join(compiler)} ({version}) cannot compile C++20 ({refusal}); install GCC 11 or newer, or set CXX"
    )


def _useful(log: str) -> str:
    """The line of a compiler's output that says most: its first error, else the last line."""
    lines = [line.strip() for line in log.splitlines() if line.strip() and not line.startswith("collect2:")]
    return next((line for line in lines if "error" in line.lower()), lines[-1])


def _saved(log: str, scratch: Path) -> str:
    """Keep the whole output and say where, when that is possible."""
    path = scratch.parent / "itm-fast-build.log"
    try:
        (scratch / "log").write_text(log)
        (scratch / "log").replace(path)
    except OSError:
        return ""
    return f" (all of it is in {path})"


def _run(commands: Sequence[list[str]], folder: Path | None, deadline: float) -> list[str]:
    """Run commands side by side, one per core, and return what they say.

    Raises:
        subprocess.CalledProcessError: one failed; the others are stopped.
        Unavailable: the deadline passed, or a command cannot be started.
    """
    environment = {**os.environ, "LC_ALL": "C"} | ({"TMPDIR": str(folder)} if folder else {})
    over = threading.Event()

    def one(command: list[str]) -> str:
        # In a session of its own: a compiler is several processes, to be killed as one.
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True,
        )  # fmt: skip
        with process:
            while True:
                try:
                    text, _ = process.communicate(timeout=0.1)
                    break
                except subprocess.TimeoutExpired:
                    if over.is_set() or time.monotonic() > deadline:
                        os.killpg(process.pid, signal.SIGKILL)
                        raise
        if process.returncode:
            text = text if text.strip() else f"exit status {process.returncode}"
            raise subprocess.CalledProcessError(process.returncode, command, text)
        return text

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        futures = [pool.submit(one, command) for command in commands]
        try:
            done = wait(futures, return_when=FIRST_EXCEPTION).done
            return [future.result() for future in sorted(futures, key=lambda f: f not in done)]
        except subprocess.TimeoutExpired as error:
            raise Unavailable(f"{error.cmd[0]} did not finish in time and was stopped") from error
        except OSError as error:
            raise Unavailable(f"the C++ compiler cannot be run: {error}") from error
        finally:
            over.set()
            pool.shutdown(wait=False, cancel_futures=True)
