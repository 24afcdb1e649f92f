"""Tensors that lie in files, for encoded splits that do not fit in memory."""

from __future__ import annotations

import errno
import math
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .._files import FULL, reserve
from .score_claim import megabytes


def empty(
    shape: tuple[int, ...], dtype: torch.dtype, folder: Path | None, device: torch.device | None = None
) -> Tensor:
    """A tensor without content; with `folder`, in a file there that has no name and is gone when the process ends.

    The operating system reads and writes its pages as they are used, and keeps in memory what there is room for.

    Raises:
        OSError: the disk has no room for it.

    >>> with tempfile.TemporaryDirectory() as name:
    ...     empty((2, 3), torch.bfloat16, Path(name)).fill_(1).sum()
    tensor(6., dtype=torch.bfloat16)
    """
    size = math.prod(shape) * dtype.itemsize
    if folder is None or not size:
        return torch.empty(shape, dtype=dtype, device=device)
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            reserve(file, size)
        except OSError as error:
            if error.errno not in FULL:
                raise
            raise _no_room(size, folder) from error
        return torch.from_numpy(np.memmap(file, np.uint8, "r+", shape=(size,))).view(dtype).view(shape)


def folder_of(size: int, folder: str | os.PathLike[str] | None) -> Path | None:
    """Where tensors go: `folder` or, if it is None, the folder for temporary files; None to keep them in memory.

    Args:
        size: bytes that will be in files; 0 to keep them in memory.
        folder: exists.

    Raises:
        OSError: the disk has no room for them.
    """
    if not size:
        return None
    place = Path(folder or tempfile.gettempdir())
    if shutil.disk_usage(place).free < size:
        raise _no_room(size, place)
    return place


def _no_room(size: int, folder: Path) -> OSError:
    message = (
        f"{os.strerror(errno.ENOSPC)}; {megabytes(size)} are needed for embeddings that do not fit in memory: make "
        "room, or name another folder by the environment variable TMPDIR (or --state)"
    )
    return OSError(errno.ENOSPC, message, str(folder))
