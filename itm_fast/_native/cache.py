"""The cache folder: finished libraries and CUDA kernels, named by a digest of their sources, flags and compiler, and
the object files that a library's next build reuses.

An entry appears by one rename and has a checksum, so it is complete or it is built again. What it holds is executed, so
only the user may be able to write to the folder.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import json
import os
import re
import shutil
import stat
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from .._lock import Lock, LockedError

LIBRARY = "itm_fast.so"
WAIT = 600  # seconds that a process waits for another one's build before it compiles too: as `compiling.SECONDS`
DAYS = 30  # builds and object files that were not used for so many days are removed
_OURS = re.compile(
    r"(objects-)?(amx_bf16|avx512_bf16|avx512|avx2|generic)(-[0-9a-f]{16})?-[0-9a-f]{8}|cubin-sm_[0-9]+-[0-9a-f]{16}"
)
_FULL = {errno.ENOSPC, errno.EDQUOT}
T = TypeVar("T")


class Unavailable(RuntimeError):
    """The kernels cannot be built or loaded here; the message tells the user why, and what to do."""


class BadObjects(Unavailable):
    """The compiled object files do not make a library that loads, so they must not be reused."""


class Build(NamedTuple):
    """A loaded library, its instruction level, its compiler's version, and its file (None if it is not kept)."""

    library: ctypes.CDLL
    level: str
    compiler: str
    path: Path | None = None


def cache_dir() -> Path:
    """The cache folder: ITM_FAST_CACHE_DIR, else itm_fast in XDG_CACHE_HOME or in ~/.cache.

    Raises:
        RuntimeError: the user has no home folder.
    """
    if chosen := os.environ.get("ITM_FAST_CACHE_DIR"):
        return Path(chosen).absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "itm_fast"


def find(pattern: str, load: Callable[[Path], T]) -> T | None:
    """Load the first entry of the cache folder whose name matches and that is complete and safe; None if there is none.

    Args:
        pattern: what the name of the entry's folder matches.
        load: loads an entry from its folder; an OSError or ValueError means that it is damaged.
    """
    return next(entries(pattern, load), None)


def entries(pattern: str, load: Callable[[Path], T]) -> Iterator[T]:
    """Load every entry as `find` loads the first one."""
    with contextlib.suppress(OSError, RuntimeError):
        _trust(cache_dir(), shared=True)
        for home in sorted(cache_dir().glob(pattern)):
            with contextlib.suppress(OSError, ValueError):
                _trust_all(home)
                yield load(home)


def _trust(path: Path, shared: bool = False) -> None:
    """Raise an OSError if another user than root can change a file or folder, as its content is executed.

    Args:
        path: a folder or a file. Symbolic links are refused, as their creator chose the target.
        shared: whether `path` is the cache folder itself, which the user chose. It may be a link. It may also be
            writable by all if it has the sticky bit, like /tmp: others can then only add files of their own, which are
            refused because of their owner.
    """
    found = path.stat() if shared else path.lstat()
    if not (stat.S_ISDIR(found.st_mode) or stat.S_ISREG(found.st_mode)):
        raise PermissionError(f"{path} is neither a folder nor a file, and what it names would be run")
    if found.st_uid and found.st_uid != os.geteuid():
        raise PermissionError(
            f"{path} belongs to another user, number {found.st_uid}, and what lies there would be run"
        )
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not (shared and found.st_mode & stat.S_ISVTX):
        raise PermissionError(
            f"other users may write to {path}, and what lies there would be run: `chmod go-w {path}` ends that"
        )


def _trust_all(folder: Path) -> None:
    """Raise an OSError if another user than root can change a folder or anything in it."""
    _trust(folder)
    for path in folder.rglob("*"):
        _trust(path)


def _protect(folder: Path) -> None:
    """Remove other users' write permission from a folder and all it contains, as `_trust_all` requires."""
    for path in (folder, *folder.rglob("*")):
        path.chmod(path.stat().st_mode & ~(stat.S_IWGRP | stat.S_IWOTH))


def load(folder: Path) -> Build:
    """Load a finished library, after comparing its checksum: loading a truncated one can crash the process.

    Raises:
        OSError, ValueError: the library is damaged, or not for this machine.
    """
    found = facts(folder, LIBRARY)
    level, compiler = str(found.get("level")), str(found.get("compiler"))
    mark_used(folder)
    return Build(ctypes.CDLL(str(folder / LIBRARY)), level, compiler, folder / LIBRARY)


def facts(folder: Path, file: str) -> dict[str, Any]:
    """What `note` wrote about an entry's file, after comparing the file's checksum.

    Raises:
        OSError, ValueError: the entry is damaged.
    """
    found = json.loads((folder / "build.json").read_text())
    if not isinstance(found, dict) or found.get("sha256") != checksum([folder / file]):
        raise ValueError(f"{folder} is damaged")
    return found


def mark_used(folder: Path) -> None:
    """Mark an entry as used today, for `_tidy`."""
    with contextlib.suppress(OSError):  # the folder is read-only
        os.utime(folder)


def checksum(files: Iterable[Path]) -> str:
    """SHA-256 of the contents of the files, in the order of their names."""
    parts = hashlib.sha256()
    for file in sorted(files):
        parts.update(file.read_bytes())
    return parts.hexdigest()


def note(folder: Path, file: str, **known: Any) -> None:
    """Write build.json beside a new file: what is known about it and its checksum, which `facts` reads."""
    (folder / "build.json").write_text(json.dumps({**known, "sha256": checksum([folder / file])}))


@contextlib.contextmanager
def scratch(kernels: str = "CPU kernels") -> Iterator[tuple[Path, bool]]:
    """Make a temporary folder to build these kernels in; yield it, and whether it is inside the cache folder."""
    try:
        root = cache_dir()
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        _trust(root, shared=True)
        _tidy(root)
        folder, kept = Path(tempfile.mkdtemp(prefix="building-", dir=root)), True
    except (OSError, RuntimeError) as error:
        try:
            folder, kept = Path(tempfile.mkdtemp(prefix="itm-fast-")), False
        except OSError as second:
            raise Unavailable(f"no folder to compile the {kernels} in: {error}; {second}") from second
        warnings.warn(
            f"itm-fast compiles its {kernels} anew in every process, as it cannot keep them ({error}); "
            "set ITM_FAST_CACHE_DIR to a folder of your own that can be written",
            stacklevel=3,
        )
    try:
        yield folder, kept
    except OSError as error:
        if error.errno in _FULL:
            raise full(folder.parent, kernels) from error
        raise Unavailable(
            f"the {kernels} cannot be built in {folder.parent}: {error}; set ITM_FAST_CACHE_DIR to another folder"
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def full(folder: Path, kernels: str = "CPU kernels") -> Unavailable:
    """The error for a full disk or quota."""
    return Unavailable(f"no space left for compiling the {kernels} in {folder}; free some, or set ITM_FAST_CACHE_DIR")


def turn(objects: Path) -> contextlib.AbstractContextManager[object]:
    """Lock these object files; wait while another process compiles them, as it may build the same library.

    That process may be suspended, so after `WAIT` seconds this one compiles without the lock. That is safe, as each
    process compiles in its own folder.
    """
    path, what = objects.with_name(f"{objects.name}.lock"), "the CPU kernels"
    try:
        return Lock(path, what)
    except LockedError as held:
        said = f"another process compiles the CPU kernels; waiting for it, up to {WAIT / 60:.0f} minutes ({held})"
        print(f"itm-fast: {said} ...", file=sys.stderr, flush=True)
    try:
        return Lock(path, what, wait=WAIT)
    except LockedError:
        return contextlib.nullcontext()


def take_objects(objects: Path, folder: Path) -> None:
    """Copy the last build's object files with their times; copy nothing if there are none or they are damaged."""
    with contextlib.suppress(OSError, shutil.Error):
        _trust_all(objects)
        shutil.copytree(objects, folder)
        if (folder / "checksum").read_text() == checksum(folder.glob("*.o")):
            return
    shutil.rmtree(folder, ignore_errors=True)


def keep_objects(folder: Path, objects: Path) -> None:
    """Replace the last build's object files by this build's; if `folder` does not exist, only remove the old ones."""
    with contextlib.suppress(OSError):
        if os.path.lexists(objects):
            objects.rename(folder.with_name("old"))
        (folder / "checksum").write_text(checksum(folder.glob("*.o")))
        _protect(folder)
        folder.rename(objects)


def publish(result: Path, home: Path, load: Callable[[Path], object]) -> Path | None:
    """Rename a finished entry to its final place and return that; None if it cannot be kept.

    If an entry is there already, it is kept unless it is damaged: unless `load` raises an OSError or ValueError.
    """
    _protect(result)
    for _ in range(2):
        try:
            result.rename(home)
            return home
        except OSError:
            if find(home.name, load):
                return home
            with contextlib.suppress(OSError):
                home.rename(result.with_name("damaged"))
    return None


def _tidy(root: Path) -> None:
    """Remove build folders that killed processes left over an hour ago, and entries not used for `DAYS` days."""
    for old in root.iterdir():
        building = old.name.startswith("building-")
        if building or _OURS.fullmatch(old.name):
            with contextlib.suppress(OSError):  # another process may be removing it
                if time.time() - old.stat().st_mtime > (3600 if building else DAYS * 86400):
                    shutil.rmtree(old, ignore_errors=True)
