"""One writer at a time: a lock that its process holds by an open file and cannot outlive."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
import time
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has none: nothing is locked there
    fcntl = None  # type: ignore[assignment]

_UNSUPPORTED = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}  # some network file systems
_BEGINS = b'{"process": '  # a note, or what a full disk has left of it
_POLL = 0.05  # seconds
_FLAGS = os.O_CREAT | os.O_RDWR | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0)


class LockedError(RuntimeError):
    """Another process, or another object of this one, holds the lock; the message names it."""


class Lock:
    """The exclusive lock of an open file, taken at once or refused.

    The operating system drops it when the process ends, however that happens: a file that was left behind locks
    nothing and need not be removed. A program that the process starts does not inherit it. A forked child does, and
    holds it as long as it lives; releasing it there has no effect on the parent.

    Args:
        path: the lock file, made when it is not there; its folder must exist.
        what: what the lock protects, as the message of a refusal names it.
        wait: seconds to wait for the holder; 0 refuses at once.

    Raises:
        LockedError: somebody holds it; says process, host and since when.
        FileExistsError: a file that is no lock has this name.
        OSError: the file cannot be made.

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
            else:  # it is not at `path` any more: try the one that is there now
                os.close(self._file)
        self._write_note()

    def _opened(self) -> tuple[int, bool]:
        """The open file, and whether it is ours to write. A lock that another user left can be taken all the same."""
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
        """Remove the file of another user, whose name it would tell; false where that is not allowed."""
        try:
            self.path.unlink()
        except OSError:
            return False
        return True

    def _foreign(self) -> FileExistsError:
        message = "this is no lock of itm-fast, which uses files of that name; give it another name"
        return FileExistsError(errno.EEXIST, message, str(self.path))

    def _write_note(self) -> None:
        note = {"process": os.getpid(), "host": platform.node(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        with contextlib.suppress(OSError):  # not ours to write, or no room: it is the open file that locks
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, json.dumps(note).encode(), 0)

    def mine(self) -> bool:
        """Whether the file at `path` is still the one that was locked: false once it was removed or replaced."""
        try:
            return os.path.samestat(os.fstat(self._file), os.stat(self.path, follow_symlinks=False))
        except OSError:
            return False

    def check(self) -> None:
        """Refuse to go on where somebody has removed or replaced the lock file.

        Raises:
            LockedError: as said.
        """
        if not self.mine():
            raise LockedError(
                f"{self.what}: {self.path} was removed or replaced while this process was writing there, so another "
                "one may be; stopped before writing anything more"
            )

    def release(self) -> None:
        """Give the lock back and remove its file. Once is enough; more does nothing."""
        if self._file < 0:
            return
        if self._process == os.getpid() and self.mine():
            with contextlib.suppress(OSError):  # in a folder where we may not remove it
                self.path.unlink()
        os.close(self._file)
        self._file = -1

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


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
    except (ValueError, KeyError, TypeError):  # it is being written, or could not be
        return "another process is writing there"
