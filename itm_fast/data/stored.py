"""Arrays that stay in their file: opened without being read, opened anew in another process, never a raw error."""

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
    """Turn whatever a library raises on a damaged file into `kind` with one sentence.

    The bytes decide what h5py and numpy raise: any exception is possible. Too little memory says nothing of the file
    and stays a MemoryError.

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
            raise  # says what is wrong with which file already: permission denied, a FIFO
        reason = str(error.args[0] if isinstance(error, KeyError) and error.args else error).strip()
        raise kind(f"{sentence}: {reason.splitlines()[0] if reason else type(error).__name__}") from error


def open_npy(path: Path) -> np.ndarray:
    """The array of a .npy file, mapped: nothing is read yet.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is no .npy file, holds less than it claims, or holds Python objects.
    """
    open_regular(path).close()
    with damaged(f"{path} is not a whole .npy file of numbers"), np.errstate(all="raise"):
        # open_memmap reads the .npy form only: np.load would also try zip archives and pickles.
        return np.lib.format.open_memmap(path, mode="r").view(np.ndarray)


class StoredArray:
    """An array in a file. A pickle of it holds no data: it is opened again where it is used.

    Args:
        path: the file.
        open_array: called as `open_array(path, *arguments)`; a function that can be pickled.
        arguments: which array of the file.

    Attributes:
        shape, dtype: of the array.

    Raises:
        ValueError: when rows are read after unpickling, and the file is no longer the one that was opened.
        OSError: the file is damaged where rows are read.
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
