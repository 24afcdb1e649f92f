"""Arrays that stay in their file until they are read, that can be pickled, and whose errors name the file."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .._files import open_regular


@contextlib.contextmanager
def damaged(sentence: str, kind: type[Exception] = ValueError) -> Iterator[None]:
    """Turn any exception of the block into one of `kind` whose message begins with `sentence`.

    On a damaged file h5py and numpy may raise anything. A MemoryError stays one, and so does an OSError that names a
    file.

    >>> with damaged("x.h5 is damaged"):
    ...     raise KeyError("no such object")
    Traceback (most recent call last):
    ValueError: x.h5 is damaged: no such object
    """
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise  # its message is good already, such as "Permission denied"
        reason = str(error.args[0] if isinstance(error, KeyError) and error.args else error).strip()
        raise kind(f"{sentence}: {reason.splitlines()[0] if reason else type(error).__name__}") from error


def open_npy(path: Path) -> np.ndarray:
    """The array of a .npy file, memory-mapped.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is not a .npy file, is shorter than its header says, or holds Python objects.
    """
    with open_regular(path) as file:
        head = file.read(len(np.lib.format.MAGIC_PREFIX))
    if head.startswith(b"PK"):  # zip
        raise ValueError(f"{path} is not a .npy file but an archive, such as .npz, which may hold several arrays")
    if head and head != np.lib.format.MAGIC_PREFIX:
        raise ValueError(f"{path} is not a .npy file")
    with damaged(f"{path} is not a whole .npy file of numbers"), np.errstate(all="raise"):
        # np.load would also try zip archives and pickles; open_memmap reads .npy files only.
        return np.lib.format.open_memmap(path, mode="r").view(np.ndarray)


class StoredArray:
    """An array in a file. Its pickle, such as for a worker process, has no data: the file is opened again on use.

    Args:
        path: the file.
        open_array: called as `open_array(path, *arguments)` to open the array; it must be picklable.
        arguments: which array of the file.

    Attributes:
        shape, dtype: of the array.

    Raises:
        ValueError: on reading after unpickling, if the file has changed since it was opened.
        OSError: on reading, if the file is damaged.
    """

    def __init__(self, path: Path, open_array: Callable[..., Any], *arguments: str) -> None:
        self.path = Path(os.path.abspath(path))
        self._open, self._arguments = open_array, arguments
        self._file = _size_and_time(self.path)
        self._array = open_array(path, *arguments)
        self.shape: tuple[int, ...] = self._array.shape
        self.dtype: np.dtype = self._array.dtype

    def __getitem__(self, index: Any) -> np.ndarray:
        if self._array is None:
            if _size_and_time(self.path) != self._file:
                raise ValueError(f"{self.path} has changed since it was opened; open it again")
            self._array = self._open(self.path, *self._arguments)
        with damaged(f"{': '.join((str(self.path), *self._arguments))} cannot be read, the file is damaged", OSError):
            return self._array[index]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_array": None}


def _size_and_time(path: Path) -> tuple[int, int]:
    found = os.stat(path)
    return found.st_size, found.st_mtime_ns
