"""The cache folder: finished libraries under the digest of all they are made of, and the objects that the next build
starts from.

Everything appears there by one rename, beside its own checksum: what is there is whole and current, or it is made
again. What lies there is run, so the folder must be writable by its user alone.
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
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from .._lock import Lock, LockedError

LIBRARY = "itm_fast.so"
WAIT = 600  # seconds that a process waits for another that compiles, before it compiles on its own
DAYS = 30  # builds and objects that nobody used for so long are removed
_OURS = re.compile(r"(objects-)?(avx512_bf16|avx512|avx2|generic)(-[0-9a-f]{16})?-[0-9a-f]{8}")
_FULL = {errno.ENOSPC, errno.EDQUOT}


class Unavailable(RuntimeError):
    """The library cannot be built or loaded here; the message is a sentence for the user."""


class BadObjects(Unavailable):
    """What was compiled makes no library that loads: none of it is worth keeping."""


class Build(NamedTuple):
    """A loaded library, the level of its instructions, what compiled it, and where it is kept."""

    library: ctypes.CDLL
    level: str
    compiler: str
    path: Path | None = None


def cache_dir() -> Path:
    """Where builds are kept: ITM_FAST_CACHE_DIR, else itm_fast in XDG_CACHE_HOME or in ~/.cache.

    Raises:
        RuntimeError: the user has no home folder.
    """
    if chosen := os.environ.get("ITM_FAST_CACHE_DIR"):
        return Path(chosen).absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "itm_fast"


def find(pattern: str) -> Build | None:
    """Load the first sound build of that name, whatever else lies in the cache folder."""
    with contextlib.suppress(OSError, RuntimeError):
        _trust(cache_dir(), shared=True)
        for home in sorted(cache_dir().glob(pattern)):
            with contextlib.suppress(OSError, ValueError):
                _trust_all(home)
                return load(home)
    return None


def _trust(path: Path, shared: bool = False) -> None:
    """Raise an OSError where another user than root can change what a path names, as that is run.

    Args:
        path: a folder or a file. A link is refused: whoever made it chose what it names.
        shared: whether this is the cache folder itself, which the user chose. It may be a link, and a folder like
            /tmp, with the sticky bit: others can only add what is theirs, and that is not run.
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
    """Raise an OSError where another user than root can change a folder or anything in it."""
    _trust(folder)
    for path in folder.rglob("*"):
        _trust(path)


def _protect(folder: Path) -> None:
    """Let only the user write to a folder and to all that is in it, whatever the umask is: see `_trust_all`."""
    for path in (folder, *folder.rglob("*")):
        path.chmod(path.stat().st_mode & ~(stat.S_IWGRP | stat.S_IWOTH))


def load(folder: Path) -> Build:
    """Load a finished build. The checksum comes first: a library cut short can kill the process that loads it.

    Raises:
        OSError, ValueError: it is not whole, or not for this machine.
    """
    note = json.loads((folder / "build.json").read_text())
    if not isinstance(note, dict) or note.get("sha256") != checksum([folder / LIBRARY]):
        raise ValueError(f"{folder} is damaged")
    with contextlib.suppress(OSError):  # in a folder that can only be read
        os.utime(folder)  # used today: see `_tidy`
    level, compiler = str(note.get("level")), str(note.get("compiler"))
    return Build(ctypes.CDLL(str(folder / LIBRARY)), level, compiler, folder / LIBRARY)


def checksum(files: Iterable[Path]) -> str:
    """SHA-256 of the contents of files, one after the other by name."""
    parts = hashlib.sha256()
    for file in sorted(files):
        parts.update(file.read_bytes())
    return parts.hexdigest()


def note(folder: Path, level: str, compiler: str) -> None:
    """Write beside a new library what `load` reads."""
    text = json.dumps({"level": level, "compiler": compiler, "sha256": checksum([folder / LIBRARY])})
    (folder / "build.json").write_text(text)


@contextlib.contextmanager
def scratch() -> Iterator[tuple[Path, bool]]:
    """A folder to build in, and whether it lies in the cache folder."""
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
            raise Unavailable(f"no folder to compile the CPU kernels in: {error}; {second}") from second
        warnings.warn(
            f"itm-fast compiles its CPU kernels anew in every process, as it cannot keep them ({error}); "
            "set ITM_FAST_CACHE_DIR to a folder of your own that can be written",
            stacklevel=3,
        )
    try:
        yield folder, kept
    except OSError as error:
        if error.errno in _FULL:
            raise full(folder.parent) from error
        raise Unavailable(
            f"the CPU kernels cannot be built in {folder.parent}: {error}; set ITM_FAST_CACHE_DIR to another folder"
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def full(folder: Path) -> Unavailable:
    """The refusal where a disk or a quota is full."""
    return Unavailable(f"no space left for compiling the CPU kernels in {folder}; free some, or set ITM_FAST_CACHE_DIR")


def turn(objects: Path) -> contextlib.AbstractContextManager[object]:
    """Wait until no other process compiles for these objects: what it compiles may be what this one needs.

    A process that is stopped, and not dead, would be waited for in vain: after `WAIT` seconds this one compiles too.
    That wastes time and breaks nothing, as each process compiles in a folder of its own.
    """
    path, what = objects.with_name(f"{objects.name}.lock"), "the CPU kernels"
    try:
        return Lock(path, what)
    except LockedError:
        print("itm-fast: another process compiles the CPU kernels; waiting for it ...", file=sys.stderr, flush=True)
    try:
        return Lock(path, what, wait=WAIT)
    except LockedError:
        return contextlib.nullcontext()


def take_objects(objects: Path, folder: Path) -> None:
    """Copy the objects of the last build, times included; nothing when there are none or they are damaged."""
    with contextlib.suppress(OSError, shutil.Error):
        _trust_all(objects)
        shutil.copytree(objects, folder)
        if (folder / "checksum").read_text() == checksum(folder.glob("*.o")):
            return
    shutil.rmtree(folder, ignore_errors=True)


def keep_objects(folder: Path, objects: Path) -> None:
    """Put the objects of this build, or none when there is no such folder, in place of the last one's."""
    with contextlib.suppress(OSError):
        if os.path.lexists(objects):
            objects.rename(folder.with_name("old"))
        (folder / "checksum").write_text(checksum(folder.glob("*.o")))
        _protect(folder)
        folder.rename(objects)


def publish(result: Path, home: Path) -> Path | None:
    """Put a build in its place in one step; a sound one that is there already stays, a damaged one goes."""
    _protect(result)
    for _ in range(2):
        try:
            result.rename(home)
            return home / LIBRARY
        except OSError:
            if found := find(home.name):
                return found.path
            with contextlib.suppress(OSError):
                home.rename(result.with_name("damaged"))
    return None


def _tidy(root: Path) -> None:
    """Remove what killed processes left an hour ago, and builds that nobody used for `DAYS`."""
    for old in root.iterdir():
        building = old.name.startswith("building-")
        if building or _OURS.fullmatch(old.name):
            with contextlib.suppress(OSError):  # another process may be removing it
                if time.time() - old.stat().st_mtime > (3600 if building else DAYS * 86400):
                    shutil.rmtree(old, ignore_errors=True)
