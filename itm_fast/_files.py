"""Files that appear whole or not at all, that are read without waiting, and whose room is taken beforehand."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO

_PIECE = 1 << 30  # bytes reserved by one call, so that Ctrl-C is heard in between
_NO_FALLOCATE = {errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS}  # file systems, or a C library, that cannot reserve
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str], mode: str = "w") -> Iterator[IO[Any]]:
    """Open a hidden neighbour of `path` for writing and rename it to `path` when the block ends well.

    After an exception nothing is left behind and an older file at `path` is as it was.

    Raises:
        OSError: it cannot be written: no such folder, no permission, a full disk.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with atomic_write(f"{folder}/note.txt") as file:
    ...         _ = file.write("kept")
    ...     open(f"{folder}/note.txt").read()
    'kept'
    """
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    text: dict[str, Any] = {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
    try:
        with open(unfinished, mode, **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(unfinished)
        if isinstance(error, OSError) and error.errno:
            message = f"{error.strerror} (not written; nothing was changed)"
            raise OSError(error.errno, message, str(path)) from error
        raise


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a file for reading bytes; what is no regular file is refused at once, where a FIFO would wait for a writer.

    Raises:
        OSError: it cannot be opened, or is a folder, a FIFO, a socket or a device.

    >>> open_regular(os.curdir)
    Traceback (most recent call last):
    IsADirectoryError: [Errno 21] is a folder, and a file is needed: '.'
    """
    require_regular(path)
    return open(path, "rb")


def require_regular(path: str | os.PathLike[str]) -> None:
    """Refuse what is no regular file, by name and kind.

    Raises:
        OSError: it is not there, or is a folder, a FIFO, a socket or a device.
    """
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "is a folder, and a file is needed", os.fspath(path))
    if not stat.S_ISREG(mode):
        kind = "a FIFO" if stat.S_ISFIFO(mode) else "a socket" if stat.S_ISSOCK(mode) else "a device"
        raise OSError(errno.EINVAL, f"is {kind}, and a regular file is needed", os.fspath(path))


def reserve(file: IO[bytes], size: int) -> None:
    """Make a file at least `size` bytes long and take the room for them, so that a full disk is met now.

    What the file holds stays; what is added reads as zeros.

    Raises:
        OSError: the disk, the user's quota or the file system's limit is too small.

    >>> import tempfile
    >>> with tempfile.TemporaryFile() as file:
    ...     reserve(file, 5)
    ...     file.read()
    b'\\x00\\x00\\x00\\x00\\x00'
    """
    try:
        for start in range(0, size, _PIECE):
            os.posix_fallocate(file.fileno(), start, min(_PIECE, size - start))
        return
    except AttributeError:  # macOS
        pass
    except OSError as error:
        if error.errno not in _NO_FALLOCATE:
            raise
    zeros = bytes(1 << 20)
    file.seek(0, os.SEEK_END)
    for start in range(file.tell(), size, len(zeros)):
        file.write(zeros[: size - start])
    file.flush()
    file.seek(0)
