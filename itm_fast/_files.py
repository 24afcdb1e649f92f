"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any


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
