"""Compile csrc/cpu/*.cpp into one library with ninja, which compiles only what has changed since the last build.

Ninja runs in a temporary folder with a copy of the sources and the last build's object files. Each compiler writes its
output to a file `.log` and, if it fails, its exit status to a file `.failed`.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from .cache import LIBRARY, BadObjects, Unavailable, full, note

FLAGS = ("-O3", "-std=c++20", "-fPIC", "-pthread")
# For sources with these endings: as fast as with -O3, and compiled in little more than half the time.
O2_FLAGS = ("-O2",)
_O2 = ("_backward", "confidence_matching")
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512")
# Instruction levels and their compiler flags, best first. "generic" runs on any processor.
LEVELS: dict[str, tuple[str, ...]] = {
    "amx_bf16": (*_AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"),
    "avx512_bf16": (*_AVX512, "-mavx512bf16"),
    "avx512": _AVX512,
    "avx2": _AVX2,
    "generic": (),
}
BFLOAT16_LEVELS = ("amx_bf16", "avx512_bf16")  # those that have products of bfloat16 values
_BFLOAT16 = re.compile(rb"__AVX512BF16__|__AMX_BF16__")  # what a source with kernels for these levels alone asks for
SECONDS = 600  # the longest time for one level; it takes one or two minutes on two cores
_PROBE = """\
#include <concepts>
#include <thread>
static_assert(__cplusplus >= 202002L, "this is not C++20");
"""
# A compiler may know the flags while its assembler does not know the instructions (binutils before 2.36), and early
# clang calls the macro __AMXBF16__, without which the sources have no tiles. Linux alone grants a process tiles.
_AMX_PROBE = """\
#if !defined(__AMX_BF16__) || !defined(__linux__)
#error "no AMX"
#endif
void tiles() { asm volatile("tdpbf16ps %tmm0, %tmm1, %tmm2"); }
"""
_FULL = re.compile("no space left on device|disk quota exceeded", re.IGNORECASE)
# Messages of compilers that were killed or ran out of memory. None of them may occur in a line of our sources.
_MEMORY = re.compile(
    "killed signal terminated|execute command: killed|out of memory allocating|LLVM ERROR: out of memory|"
    "memory exhausted|cannot allocate memory|instance of 'std::bad_alloc'",
    re.IGNORECASE,
)
_RULES = """\
ninja_required_version = 1.11
rule compile
  command = {compile} $flags $more -I. -MMD -MF $out.d -c $in -o $out \
> $out.log 2>&1 || {{ echo $$? > $out.failed; exit 1; }}
  depfile = $out.d
  deps = gcc
rule link
  command = {link} $in -o $out > $out.log 2>&1 || {{ echo $$? > $out.failed; exit 1; }}
"""


class Compiler(NamedTuple):
    """The command of a C++ compiler, and the first line of its --version."""

    command: list[str]
    version: str


def find_compiler() -> Compiler:
    """The compiler that CXX names, else the first on PATH.

    Raises:
        Unavailable: there is none, or it does not run.
    """
    try:
        chosen = shlex.split(os.environ.get("CXX", ""))
    except ValueError as error:
        raise Unavailable(f"CXX is {os.environ['CXX']!r}, which is no command ({error})") from error
    command = chosen or [next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), "")]
    found = shutil.which(command[0])
    if found is None:
        if chosen:
            raise Unavailable(
                f"CXX names {command[0]!r}, which cannot be run; set it to g++ 11 or newer, or to clang++"
            )
        raise Unavailable(
            "no C++ compiler on PATH; install g++ or clang++, or set CXX, or install the wheel that "
            "`pip wheel --no-deps .` makes on a machine with a compiler: it holds the kernels"
        )
    if os.path.dirname(command[0]):
        command[0] = os.path.abspath(found)  # absolute, as it runs in other folders
    status, said = _run([*command, "--version"], None, time.monotonic() + 60)
    if status:
        why = _stopped(status, said) or useful(said) or f"it ends with status {status} and says nothing"
        raise Unavailable(f"{shlex.join(command)} --version fails: {why}; set CXX to g++ or clang++")
    return Compiler(command, said.strip().partition("\n")[0])


def sources_in(csrc: Path) -> dict[str, bytes]:
    """The sources and headers of csrc/cpu by their path relative to csrc."""
    files = sorted(file for ending in ("cpp", "h") for file in (csrc / "cpu").rglob(f"*.{ending}"))
    return {file.relative_to(csrc).as_posix(): file.read_bytes() for file in files}


def library_name(level: str, sources: Mapping[str, bytes]) -> str:
    """The name of the library of these sources: its level, and a digest of the flags and of all sources."""
    parts = hashlib.sha256(repr((FLAGS, O2_FLAGS, _O2, LEVELS[level])).encode())
    for name, content in sources.items():
        parts.update(repr((name, len(content))).encode() + content)
    return f"{level}-{parts.hexdigest()[:16]}"


def compiler_name(compiler: Compiler) -> str:
    """A digest of a compiler's command and version."""
    return hashlib.sha256(repr(tuple(compiler)).encode()).hexdigest()[:8]


def find_ninja() -> str:
    """The ninja program: of the Python package if it is installed, else from PATH.

    Raises:
        Unavailable: there is none.
    """
    with contextlib.suppress(ImportError, AttributeError):
        if importlib.util.find_spec("ninja"):
            import ninja

            if found := shutil.which("ninja", path=ninja.BIN_DIR):
                return found
    if found := shutil.which("ninja"):
        return found
    raise Unavailable("no ninja to compile the CPU kernels with; `pip install ninja`, or put it on PATH")


def below(level: str) -> list[str]:
    """The lower ones of `LEVELS`, best first."""
    return list(LEVELS)[list(LEVELS).index(level) + 1 :]


def best_level(compiler: Compiler, level: str, folder: Path, deadline: float) -> str:
    """`level`, or the best lower one of `LEVELS` that the compiler and its assembler know.

    Raises:
        Unavailable: the compiler cannot compile three lines of C++20, or was stopped by a signal.
    """
    probe = folder / "probe.cpp"
    said = ""
    for lower in (level, *below(level)):
        probe.write_text(_PROBE + (_AMX_PROBE if lower == "amx_bf16" else ""))
        command = [*compiler.command, *FLAGS, *LEVELS[lower], "-c", str(probe), "-o", str(probe.with_suffix(".o"))]
        status, said = _run(command, folder, deadline)
        if not status:
            return lower
        if _FULL.search(said):
            raise full(folder.parent)
        if why := _stopped(status, said):
            raise Unavailable(f"{_named(compiler)} cannot compile the CPU kernels: {why}")
    why = useful(said) or f"it ends with status {status} and says nothing"
    raise Unavailable(f"{_named(compiler)} cannot compile C++20 ({why}); install GCC 11 or newer, or set CXX")


def lay_out(sources: Mapping[str, bytes], folder: Path) -> None:
    """Make `folder` contain these sources and no others. Only changed files are written, as ninja compares file times.

    Args:
        sources: path relative to csrc -> content.
        folder: contains the sources and object files of the last build, or does not exist.
    """
    folder.mkdir(mode=0o700, exist_ok=True)
    objects = {f"{Path(name).stem}.o" for name in sources if name.endswith(".cpp")}
    wanted = {*sources, *objects, ".ninja_log", ".ninja_deps"}
    for old in folder.rglob("*"):
        if old.is_file() and old.relative_to(folder).as_posix() not in wanted:
            old.unlink()
    newest = max((file.stat().st_mtime_ns for file in folder.glob("*.o")), default=0)
    for name, content in sources.items():
        file = folder / name
        if not file.exists() or file.read_bytes() != content:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
            # A changed source must be newer than every object file, even if the clock was set back or the file system
            # keeps times in steps of one or two seconds.
            for later in (newest + step for step in (1, 10**9, 2 * 10**9)):
                if file.stat().st_mtime_ns <= newest:
                    os.utime(file, ns=(later, later))


def compile_libraries(
    compiler: Compiler,
    places: Mapping[str, str],
    folder: Path,
    deadline: float,
    tell: Callable[[int, int], None] = lambda done, all: None,
) -> None:
    """Compile and link the sources that `lay_out` put into a folder, with all cores.

    Args:
        compiler: the compiler.
        places: some of `LEVELS` whose flags the compiler knows, each with the folder in `folder` for its object files
            and its library, `LIBRARY`; "" for `folder` itself. Object files that are up to date are reused.
        folder: the build folder.
        deadline: in seconds of time.monotonic().
        tell: called often meanwhile, and at the end, with the number of object files that are there, and that there
            will be.

    Raises:
        Unavailable: compiling failed; the message says why, and where the whole output is.
    """
    sources = sorted((folder / "cpu").glob("*.cpp"), reverse=True)  # pair scorers first: they take longest
    rules = _RULES.format(compile=_escaped(compiler.command), link=_escaped([*compiler.command, "-shared", "-pthread"]))
    files: list[Path] = []
    libraries = [folder / place / LIBRARY for place in places.values()]
    for (level, place), library in zip(places.items(), libraries):
        objects = []
        for source in sources:
            # Without kernels of its own for bfloat16 a source gives the same instructions as for avx512.
            shared = level in BFLOAT16_LEVELS and "avx512" in places and not _BFLOAT16.search(source.read_bytes())
            name = (Path(places["avx512"] if shared else place) / f"{source.stem}.o").as_posix()
            objects.append(name)
            if not shared:
                flags = _escaped((*FLAGS, *LEVELS[level]))
                rules += f"build {name}: compile cpu/{source.name}\n  flags = {flags}\n"
                if source.stem.endswith(_O2):
                    rules += f"  more = {_escaped(O2_FLAGS)}\n"
                files.append(folder / name)
        rules += f"build {library.relative_to(folder).as_posix()}: link {' '.join(objects)}\n"
        library.unlink(missing_ok=True)
    (folder / "build.ninja").write_text(rules)

    def failed() -> bool:
        tell(sum(file.is_file() for file in files), len(files))
        return any(file.stat().st_size for file in folder.rglob("*.failed"))

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    ended = _run([find_ninja(), f"-j{cores}"], folder, deadline, failed)
    if ended[0] or not all(library.is_file() for library in libraries):
        raise _failure(compiler, folder, ended, [*files, *libraries])
    tell(len(files), len(files))


def move_library(library: Path, folder: Path, level: str, compiler: Compiler) -> None:
    """Move a compiled library into a new folder, with its level, compiler and checksum, as `cache.load` reads it."""
    folder.mkdir(mode=0o755)  # all users may use a library that root built, but not change it
    library.rename(folder / LIBRARY)
    note(folder, LIBRARY, level=level, compiler=compiler.version)


def _escaped(command: list[str] | tuple[str, ...]) -> str:
    return shlex.join(command).replace("$", "$$")


def _named(compiler: Compiler) -> str:
    return f"{shlex.join(compiler.command)} ({compiler.version})"


def _failure(compiler: Compiler, folder: Path, ninja: tuple[int, str], wanted: Sequence[Path]) -> Unavailable:
    """The error for a failed build: one sentence that says why, and what to do."""
    failures = sorted(folder.rglob("*.failed"), key=lambda file: file.stat().st_mtime_ns)
    if failures:
        made = failures[0].with_suffix("")
        what, status = made.name, int(failures[0].read_text() or 1)
        log = made.with_name(f"{what}.log").read_text(errors="replace")
    else:
        what, (status, log) = "ninja", ninja
    if _FULL.search(log):
        return full(folder.parents[1])
    if why := _stopped(status, log):
        return Unavailable(f"{_named(compiler)} cannot compile the CPU kernels, in {what}: {why}")
    silent = [file.name for file in wanted if not file.is_file()]
    if silent and (not status or (what == LIBRARY and silent[0] != LIBRARY)):
        return BadObjects(
            f"{_named(compiler)} ends without an error and does not write {silent[0]}; set CXX to g++ or clang++"
        )
    why = useful(log) or f"it ends with status {status} and says nothing"
    kind = BadObjects if what == LIBRARY else Unavailable
    return kind(f"the CPU kernels do not compile with {compiler.version}: {why}{_saved(log, folder)}")


def _stopped(status: int, log: str) -> str | None:
    """Why a compiler or one of its processes was stopped by a signal; None if none was."""
    number = -status if status < 0 else status - 128
    if number == signal.SIGKILL or _MEMORY.search(log):
        return (
            "the compiler was killed or got no memory, of which a file takes up to half a GiB; close other programs, "
            "or compile one file at a time by `taskset -c 0` before the command"
        )
    if number <= 0:
        return None
    with contextlib.suppress(ValueError):
        return f"the compiler was stopped by {signal.Signals(number).name}; try again, or set CXX to another compiler"
    return None


def useful(log: str) -> str:
    """The most useful line of a compiler's output: its first error, else its last line, else ""."""
    empty = ("collect2:", "ninja: build stopped")
    lines = [line.strip() for line in log.splitlines() if line.strip() and not line.startswith(empty)]
    return next((line for line in lines if "error" in line.lower()), lines[-1] if lines else "")


def _saved(log: str, folder: Path) -> str:
    """Save the whole output; return the words that say where, or "" if it cannot be saved."""
    path = folder.parents[1] / "itm-fast-build.log"
    try:
        (folder / "said").write_text(log)
        (folder / "said").replace(path)
    except OSError:
        return ""
    return f" (all of it is in {path})"


def _run(
    command: list[str], folder: Path | None, deadline: float, failed: Callable[[], bool] = lambda: False
) -> tuple[int, str]:
    """Run a command; return its exit status and its output.

    Args:
        command: the program and its arguments.
        folder: working folder, also for temporary files; None for the current one.
        deadline: in seconds of time.monotonic().
        failed: called repeatedly meanwhile; if it returns True, the command is stopped and the output is "".

    Raises:
        Unavailable: the deadline passed, or the command cannot be started.
    """
    environment = {**os.environ, "LC_ALL": "C"} | ({"TMPDIR": str(folder)} if folder else {})
    try:
        # A new session, so that `_end` can stop all processes of a compiler together.
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        raise Unavailable(f"{command[0]} cannot be run: {error}") from error
    with process:
        try:
            while True:
                try:
                    text, _ = process.communicate(timeout=0.05)
                    return process.returncode, text
                except subprocess.TimeoutExpired:
                    if failed():
                        break
                    if time.monotonic() > deadline:
                        raise Unavailable(
                            f"{command[0]} did not finish in time and was stopped; what it has compiled is kept, so "
                            "try again"
                        ) from None
        finally:
            _end(process)
        return process.returncode, ""


def _end(process: subprocess.Popen[str]) -> None:
    """Stop a command and its children. On SIGTERM, ninja stops its compilers, which have their own process groups."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is None:
            os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
