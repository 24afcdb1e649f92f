"""A lock file for one writer at a time. The operating system releases it when the process ends."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: every lock succeeds
    fcntl = None  # type: ignore[assignment]

_UNSUPPORTED = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}  # the file system cannot lock
_BEGINS = b'{"process": '  # how a lock file's note begins; a full disk may have cut it shorter
_POLL = 0.05  # seconds between attempts while another process holds the lock
_FLAGS = os.O_CREAT | os.O_RDWR | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0)


class LockedError(RuntimeError):
    """Another process, or another `Lock` of this process, holds the lock; the message names the process."""


class Lock:
    """An exclusive lock (flock) on an open file.

    The operating system releases it when the process ends in any way, so a file left behind locks nothing and need not
    be removed. A program that the process starts does not inherit the lock. A forked child does, and holds it while it
    lives; releasing it there has no effect on the parent.

    Args:
        path: the lock file, created if it does not exist; its folder must exist.
        what: what the lock protects, for the message of a `LockedError`.
        wait: seconds to wait for the holder; 0 raises at once.

    Raises:
        LockedError: the lock is held; the message has the holder's process, host and starting time.
        FileExistsError: `path` is a file that is not a lock file.
        OSError: the file cannot be created.

    >>> import tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> lock = Lock(f"{folder.name}/lock", "the scores")
    >>> Lock(f"{folder.name}/lock", "the scores")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    itm_fast._lock.LockedError: the scores: process ... is writing there since ...
    >>> lock.release()
    """

    def __init__(self, path: str | os.PathLike[str], what: str, wait: float = 0) -> None:
        self.path, self.what, self._process = Path(path), what, os.getpid()
        deadline = time.monotonic() + wait
        while True:
            self._file, ours = self._opened()
            if not _flock(self._file):
                holder = _holder(self._file)
                os.close(self._file)
                if time.monotonic() >= deadline:
                    raise LockedError(f"{what}: {holder}; wait until it ends, or stop it")
                time.sleep(_POLL)
            elif self.mine() and (ours or not self._removed()):
                break
            else:  # the locked file is no longer the one at `path`: try again with that one
                os.close(self._file)
        self._write_note()

    def _opened(self) -> tuple[int, bool]:
        """Open the lock file; say whether we may write to it. A file that another user left can be locked too."""
        ours = True
        try:
            file = os.open(self.path, _FLAGS, 0o666)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.EISDIR):
                raise self._foreign() from None
            if not isinstance(error, PermissionError) or not self.path.exists():
                raise
            file, ours = os.open(self.path, _FLAGS & ~(os.O_CREAT | os.O_RDWR)), False
        text = os.pread(file, len(_BEGINS), 0).strip(b"\0")
        if not _BEGINS.startswith(text):
            os.close(file)
            raise self._foreign()
        return file, ours

    def _removed(self) -> bool:
        """Remove a file that another user left, as its note would name that user's process; False if not allowed."""
        try:
            self.path.unlink()
        except OSError:
            return False
        return True

    def _foreign(self) -> FileExistsError:
        message = "this file is not a lock of itm-fast, although it has the name of one; rename it"
        return FileExistsError(errno.EEXIST, message, str(self.path))

    def _write_note(self) -> None:
        note = {"process": os.getpid(), "host": platform.node(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        with contextlib.suppress(OSError):  # no permission or a full disk: the note is not needed to lock
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, json.dumps(note).encode(), 0)

    def mine(self) -> bool:
        """Whether the file at `path` is still the locked one, not removed or replaced."""
        try:
            return os.path.samestat(os.fstat(self._file), os.stat(self.path, follow_symlinks=False))
        except OSError:
            return False

    def check(self) -> None:
        """Raise if the lock file was removed or replaced, since another process may then hold a new one.

        Raises:
            LockedError: the lock file was removed or replaced.
        """
        if not self.mine():
            raise LockedError(
                f"{self.what}: {self.path} was removed or replaced while this process was writing there, so another "
                "one may be; stopped before writing anything more"
            )

    def release(self) -> None:
        """Release the lock and remove its file; further calls do nothing."""
        if self._file < 0:
            return
        if self._process == os.getpid() and self.mine():
            with contextlib.suppress(OSError):  # no permission to remove files from the folder
                self.path.unlink()
        os.close(self._file)
        self._file = -1

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


@contextlib.contextmanager
def locked_folder(folder: Path, name: str) -> Iterator[None]:
    """Make a folder if it does not exist, and lock its files `name`.*; new folders that stay empty are removed again.

    Raises:
        LockedError: the lock is held.
        OSError: the folder or the lock file cannot be created.
    """
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with Lock(folder / f"{name}.lock", str(folder / f"{name}.*")):
            yield
    finally:
        with contextlib.suppress(OSError):  # one is not empty
            for path in new:
                path.rmdir()


def _flock(file: int) -> bool:
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            return True
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        os.close(file)
        raise
    return True


def _holder(file: int) -> str:
    try:
        note = json.loads(os.pread(file, 1000, 0))
        return f"process {note['process']} on {note['host']} is writing there since {note['since']}"
    except (ValueError, KeyError, TypeError):  # the note is being written, or could not be written
        return "another process is writing there"
