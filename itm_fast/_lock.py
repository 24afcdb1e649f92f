"""One writer at a time: a lock that its process holds by an open file and cannot outlive."""

from __future__ import annotations

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
_POLL = 0.05  # seconds


class LockedError(RuntimeError):
    """Another process, or another object of this one, holds the lock; the message names it."""


class Lock:
    """The exclusive lock of an open file, taken at once or refused.

    The operating system drops it when the process ends, however that happens. The file may stay; it need not be
    removed, and a file without a holder locks nothing. It is not inherited by a child that runs another program.

    Args:
        path: the lock file, made when it is not there; its folder must exist.
        what: what the lock protects, as the message of a refusal names it.
        wait: seconds to wait for the holder; 0 refuses at once.

    Raises:
        LockedError: somebody holds it; says process, host and since when.
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
        self.path, self.what = Path(path), what
        deadline = time.monotonic() + wait
        while not self._taken():
            if time.monotonic() >= deadline:
                raise LockedError(f"{what}: {_holder(self.path)}; wait until it ends, or stop it")
            time.sleep(_POLL)

    def _taken(self) -> bool:
        """Try once. A file that was removed or replaced before it was locked is not the one that others will see."""
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            if not _flock(self._file) or not self.mine():
                os.close(self._file)
                return False
            note = {"process": os.getpid(), "host": platform.node(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, json.dumps(note).encode(), 0)
        except BaseException:
            os.close(self._file)
            raise
        return True

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
        if self.mine():
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
        raise
    return True


def _holder(path: Path) -> str:
    try:
        note = json.loads(path.read_text(encoding="utf-8"))
        return f"process {note['process']} on {note['host']} is writing there since {note['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process is writing there"
