"""Files that appear whole or not at all, and files that are read without waiting."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO


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
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "is a folder, and a file is needed", os.fspath(path))
    if not stat.S_ISREG(mode):
        kind = "a FIFO" if stat.S_ISFIFO(mode) else "a socket" if stat.S_ISSOCK(mode) else "a device"
        raise OSError(errno.EINVAL, f"is {kind}, and a regular file is needed", os.fspath(path))
    return open(path, "rb")
