"""Checks before a score file is written: its lock, what exists under its name already, and the space on the disk."""

from __future__ import annotations

import errno
import json
import os
import shutil
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .._files import open_regular, require_regular
from .._lock import Lock, LockedError

_claims: weakref.WeakValueDictionary[Path, Claim] = weakref.WeakValueDictionary()  # of this process


class Claim:
    """The exclusive right to write a score file, until `release` or until this object is deleted.

    Args:
        path: the .npy file.
        resume: whether an interrupted run may be continued and a finished file used again.
        identity: what the scores are computed from. With `resume`, an older claim of this process with the same
            identity is released: an attempt that failed may have left it, kept alive by a traceback.

    Attributes:
        path: the .npy file.
        partial, journal, about: the paths of the files beside it; see `itm_fast.evaluation.score_file`.

    Raises:
        LockedError: another run writes there; the message names its process, its host and when it started.
        FileExistsError: a finished or interrupted file exists and `resume` is false.
        ValueError, OSError: `path` does not end in .npy, its folder does not exist, or it is not a regular file.
    """

    def __init__(
        self, path: str | os.PathLike[str], resume: bool = False, identity: Mapping[str, str] | None = None
    ) -> None:
        self._lock: Lock | None = None
        self.path = score_path(path)
        self.partial, self.journal, self.about = neighbours(self.path)
        self._identity = identity
        older = _claims.get(self.path.absolute())
        if older is not None and resume and identity is not None and identity == older._identity:
            older.release()
        try:
            self._lock = Lock(self.path.with_name(self.path.name + ".lock"), str(self.path))
        except OSError as error:
            # A finished matrix can still be read from a folder that cannot be written.
            if not (resume and self.path.exists() and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS)):
                raise
        _claims[self.path.absolute()] = self
        if resume:
            return
        try:
            if self.path.exists():
                raise FileExistsError(
                    f"{self.path} exists; give another name, delete it, or resume (--resume) to use it again"
                )
            if self.journal.exists():
                raise FileExistsError(
                    f"{self.path} was begun and interrupted ({self.journal.name} is there); resume (--resume) to "
                    f"continue it, or delete {self.partial.name} and {self.journal.name}"
                )
        except BaseException:
            self.release()
            raise

    def check(self, files: Mapping[Path, Any]) -> None:
        """Check that the lock file and these open files were not removed or replaced on the disk.

        Args:
            files: path -> open file.

        Raises:
            LockedError: one was removed or replaced, so another run may be writing there.
        """
        if self._lock is not None:
            self._lock.check()
        for path, file in files.items():
            try:
                same = os.path.samestat(os.fstat(file.fileno()), os.stat(path))
            except OSError:
                same = False
            if not same:
                raise LockedError(
                    f"{self.path}: {path.name} was removed or replaced while this process was writing it, so another "
                    "run may have begun there; stopped before writing anything more"
                )

    def release(self) -> None:
        """Release the lock; further calls do nothing."""
        if self._lock is not None:
            self._lock.release()

    def __del__(self) -> None:
        self.release()

    def __enter__(self) -> Claim:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def score_path(path: str | os.PathLike[str]) -> Path:
    """Check that `path` ends in .npy, that its folder exists, and that it is a regular file if it exists; return it."""
    path = Path(path)
    if path.suffix != ".npy":
        raise ValueError(f"a score file is a .npy file, got {path}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"the folder of the score file does not exist: {path.parent}")
    if path.exists():
        require_regular(path)
    return path


def neighbours(path: Path) -> tuple[Path, Path, Path]:
    """The paths of a score file's partial file, journal and description."""
    return tuple(path.with_name(path.name + end) for end in (".partial", ".journal", ".json"))  # type: ignore


def read_about(source: Path, path: Path) -> dict[str, Any]:
    """What the score file at `path` was computed from: `source` is its journal or its description.

    Returns:
        A dict with `identity` (strings by name), `shape` and `block` (two positive integers each), and the other
        entries of `source`.

    Raises:
        ValueError: `source` does not exist or is damaged.
    """
    journal = source.suffix == ".journal"
    try:
        with open_regular(source) as file:
            found = json.loads(file.readline() if journal else file.read())
        whole = isinstance(found, dict) and isinstance(found["identity"], dict)
        if not whole or not all(_two_sizes(found[key]) for key in ("shape", "block")):
            raise ValueError("something else is written there")
    except FileNotFoundError:
        raise ValueError(
            f"{path} has no {source.name} beside it that tells what it was computed from, so it cannot be used "
            "again; give another name, or delete it and score again"
        ) from None
    except (ValueError, KeyError, RecursionError) as error:
        why = f"no {error}" if isinstance(error, KeyError) else str(error)
        other = neighbours(path)[0] if journal else path
        raise ValueError(f"{source} is damaged ({why}); delete it and {other.name}, and score again") from error
    return found


def kept_block(path: str | os.PathLike[str], shape: tuple[int, int]) -> tuple[int, int] | None:
    """The size of the blocks in the finished or interrupted score file at `path`.

    Returns:
        (images, columns); None if there is no such file, or if it is not of `shape`. (`ScoreFile` refuses the latter
        and says what differs.)

    Raises:
        ValueError: the file's journal or description is damaged.
    """
    path = score_path(path)
    _, journal, about = neighbours(path)
    source = about if path.exists() else journal
    if not source.exists():
        return None
    found = read_about(source, path)
    images, columns = found["block"]
    fits = found["shape"] == list(shape) and images <= shape[0] and columns <= shape[1]
    return (images, columns) if fits else None


def check_room(paths: Sequence[Path], shape: tuple[int, int]) -> str:
    """Refuse score files that the disk has no room for.

    Args:
        paths: all score files of a run; those that exist, finished or not, need no more space.
        shape: (I, T) of each.

    Returns:
        A sentence that says how much is needed.

    Raises:
        OSError: there is not enough room.
    """
    size = 4 * shape[0] * shape[1]
    with_notes = size + size // 4096 + (1 << 16)  # with journal and description
    need = sum(max(with_notes - _taken(path), 0) for path in paths)
    free = shutil.disk_usage(paths[0].parent).free
    files = "a score file" if len(paths) == 1 else f"{len(paths)} score files, {megabytes(size)} each"
    found = f"{files}: {megabytes(need)} are still to be written, {megabytes(free)} are free"
    if need > free:
        raise OSError(
            errno.ENOSPC, f"no room for {found}; make room or name a file on another disk", str(paths[0].parent)
        )
    return found


def megabytes(size: int) -> str:
    """Bytes in MB, rounded up.

    >>> megabytes(1), megabytes(2_000_000_000)
    ('1 MB', '2,000 MB')
    """
    return f"{-(-size // 10**6):,} MB"


def _taken(path: Path) -> int:
    """Bytes that a score file has on the disk already."""
    for file in (path, neighbours(path)[0]):
        if file.exists():
            found = file.stat()
            return min(found.st_size, 512 * getattr(found, "st_blocks", found.st_size // 512))
    return 0


def _two_sizes(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(size) is int and size > 0 for size in value)
