"""Where the tensors of an encoded split lie: in memory, or in files that the processes of a machine share.

A file has no name while there is anything in it, so that its space is free again when the processes have ended, also
if they were killed.
"""

from __future__ import annotations

import errno
import math
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from .._files import FULL, reserve
from .._ranks import Ranks
from .score_claim import megabytes

Part = tuple[Any, Tensor]  # which rows of a tensor, and these rows
_ALONE = Ranks()


@dataclass(frozen=True)
class Place:
    """Where tensors lie, and which processes compute them.

    Attributes:
        folder: for temporary files; None: in memory.
        node: the processes of this machine, which divide the work and share one copy; needs a folder.
        by_state: whether --state may name the folder, for the message of a full disk.

    >>> Place().fill(2, lambda step: [(slice(step, step + 1), torch.full((1, 3), step))], lambda parts: [2])
    [tensor([[0, 0, 0],
            [1, 1, 1]])]
    """

    folder: Path | None = None
    node: Ranks = _ALONE
    by_state: bool = False

    def alone(self) -> Place:
        """The same for tensors that this process has for itself."""
        return Place(self.folder, by_state=self.by_state)

    def fill(
        self,
        steps: int,
        produce: Callable[[int], Sequence[Part]],
        rows: Callable[[Sequence[Tensor]], Sequence[int]],
        device: torch.device | None = None,
    ) -> list[Tensor]:
        """Compute tensors, a few rows of each at a time; processes that share them must all call this.

        Process r of L computes steps r, r + L, r + 2 L, ... Tensors that are shared may only be read afterwards.

        Args:
            steps: how many steps there are; without one there are no tensors.
            produce: what a step computes, of each tensor; all steps together compute every row once.
            rows: from the rows of the first step, how many rows each tensor has.
            device: of the tensors; None: the CPU.

        Raises:
            OSError: the disk has no room for the tensors.
            ChildProcessError: in the others, if the first process of this machine could not begin.
        """
        if not steps:
            return []
        begun: list[Sequence[Part]] = []
        files: list[IO[bytes]] = []

        def begin() -> list[tuple[tuple[int, ...], torch.dtype]]:
            begun.append(produce(0))
            first = [part for _, part in begun[0]]
            return [((count, *part.shape[1:]), part.dtype) for part, count in zip(first, rows(first), strict=True)]

        forms = self.node.on_first(begin)
        if self.folder is None:
            tensors = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in forms]
        else:
            sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in forms]
            files = [_file(self, self.folder, size) for size in sizes]
            tensors = [_mapped(file, *form, "r+") for file, form in zip(files, forms, strict=True)]
        for step in range(self.node.rank, steps, self.node.world):
            for tensor, (place, part) in zip(tensors, produce(step) if step else begun.pop(), strict=True):
                tensor[place] = part
        if self.node.world > 1:
            self.node.most(0, meanwhile=lambda: None)  # all have written their rows
            tensors = [_mapped(file, *form, "r") for file, form in zip(files, forms, strict=True)]
        for file in files:
            file.close()  # a map of it remains
        return tensors


def place_of(
    size: int, folder: str | os.PathLike[str] | None, node: Ranks = _ALONE, by_state: bool = False
) -> Place:
    """The place for tensors of this many bytes.

    Args:
        size: bytes that will be in files; 0 to keep them in memory, if they are not shared.
        folder: exists; None: the folder for temporary files.
        node: the processes that share them, which must all call this.
        by_state: see `Place`.

    Raises:
        OSError: the disk has no room for them.
        ChildProcessError: the same, in all processes of the machine but the first.
    """
    if not size and node.world == 1:
        return Place()
    found = Path(folder or tempfile.gettempdir())
    place = Place(found, node, by_state)

    def check() -> None:
        if shutil.disk_usage(found).free < size:
            raise _no_room(size, found, place)

    node.on_first(check)
    return place


def _file(place: Place, folder: Path, size: int) -> IO[bytes]:
    """A file of this size that all processes of the machine have opened, and that has no name any more."""
    node = place.node

    def made() -> str:
        descriptor, name = tempfile.mkstemp(prefix="itm-fast-", dir=folder)
        os.close(descriptor)
        return name

    name = node.on_first(made)
    try:
        file = open(name, "r+b")  # noqa: SIM115 - closed when it is mapped
        node.most(0, meanwhile=lambda: None)  # all have opened it
    finally:
        if node.first:
            os.unlink(name)

    def sized() -> None:
        try:
            reserve(file, size)
        except OSError as error:
            if error.errno not in FULL:
                raise
            raise _no_room(size, folder, place) from error

    node.on_first(sized)
    return file


def _mapped(file: IO[bytes], shape: tuple[int, ...], dtype: torch.dtype, mode: Any) -> Tensor:
    size = math.prod(shape) * dtype.itemsize
    if not size:
        return torch.empty(shape, dtype=dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # as it should be
        return torch.from_numpy(np.memmap(file, np.uint8, mode, shape=(size,))).view(dtype).view(shape)


def _no_room(size: int, folder: Path, place: Place) -> OSError:
    world = place.node.world
    why = "that do not fit in memory" if world == 1 else f"that {world} processes share"
    state = " (or --state)" if place.by_state else ""
    message = (
        f"{os.strerror(errno.ENOSPC)}; {megabytes(size)} are needed for embeddings {why}: make room, or name another "
        f"folder by the environment variable TMPDIR{state}"
    )
    return OSError(errno.ENOSPC, message, str(folder))
