"""Write files atomically, open only regular files, and reserve disk space before writing."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO

_PIECE = 1 << 30  # bytes reserved by one call; Python handles Ctrl-C between calls only
_NO_FALLOCATE = {errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS}  # the file system or C library cannot reserve space
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # the disk, the quota or the largest file size is reached


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str], mode: str = "w") -> Iterator[IO[Any]]:
    """Open a hidden file beside `path` for writing, and rename it to `path` when the block ends without an exception.

    After an exception the hidden file is removed, and an older file at `path` is unchanged.

    Raises:
        OSError: the file cannot be written, for example for lack of a folder, of permission or of disk space.

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


def path_of(op: str, path: str | os.PathLike[str]) -> Path:
    """A path that the function `op` was given.

    Raises:
        TypeError: it is none.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"{op}: path must be a string or a path, got {path!r:.60}")
    return Path(path)


def require_place(path: str | os.PathLike[str], option: str) -> None:
    """Raise unless a file can be there, before work is done for it: its folder exists, and it is no folder itself.

    Raises:
        OSError: it cannot; the message names the option.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{option} {path} is a folder; give the name of a file in it")
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"the folder of {option} {path} does not exist; make it first")


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a regular file for reading bytes. Anything else is refused, as opening a FIFO would wait for a writer.

    Raises:
        OSError: the file cannot be opened, or is a folder, a FIFO, a socket or a device.

    >>> open_regular(os.curdir)
    Traceback (most recent call last):
    IsADirectoryError: [Errno 21] is a folder, and a file is needed: '.'
    """
    require_regular(path)
    return open(path, "rb")


def require_regular(path: str | os.PathLike[str]) -> None:
    """Raise unless `path` is a regular file; the message names the path and what it is.

    Raises:
        OSError: the file does not exist, or is a folder, a FIFO, a socket or a device.
    """
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "is a folder, and a file is needed", os.fspath(path))
    if not stat.S_ISREG(mode):
        kind = "a FIFO" if stat.S_ISFIFO(mode) else "a socket" if stat.S_ISSOCK(mode) else "a device"
        raise OSError(errno.EINVAL, f"is {kind}, and a regular file is needed", os.fspath(path))


def reserve(file: IO[bytes], size: int) -> None:
    """Make a file at least `size` bytes long and reserve the disk space, so that a full disk is noticed now.

    The file's content stays; the added bytes are zeros.

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
