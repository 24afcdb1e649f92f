"""Tiles of captions for the CUDA kernels that multiply words with regions (csrc/cuda/affinity.h)."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from ...packing import bounds, kept
from .._attention import FEW_WORDS, NARROW, REGIONS, TENSOR_FLOAT32

CAPTIONS = 16  # at most, in a tile
IN_CLUSTERS = 288  # columns of a tile of blocks in clusters
# Columns that an image may take in a tile: the smallest that holds its regions. 36 as in the papers, 56 for grids of
# 7 x 7, 72 for 8 x 8, 104 for the 100 regions that detectors are often asked for.
COLUMNS = (12, 36, 56, NARROW, 104, REGIONS)
# Bytes of shared memory that a block can have, by compute capability; other GPUs have as much as 8.6.
SHARED = {
    (7, 5): 64 << 10, (8, 0): 163 << 10, (8, 6): 99 << 10, (8, 7): 163 << 10,
    **dict.fromkeys([(9, 0), (10, 0), (10, 3), (11, 0)], 227 << 10),
}  # fmt: skip


class Pairs(ctypes.Structure):
    """Twin of `Pairs` in affinity.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("words", "regions", "word_exponent", "region_exponent", "count")),
        *((name, ctypes.c_void_p) for name in ("first", "caption", "begin", "end", "row", "owner", "wide")),
        *((name, ctypes.c_int) for name in ("images", "R", "captions", "chunks", "tiles", "for_wide")),
        ("failed", ctypes.c_void_p),
    ]


class Tile(NamedTuple):
    """Template arguments of `Tile` in affinity.h, and what follows from them as there."""

    columns: int
    slots: int
    side: int
    stages: int = 2
    clusters: bool = False

    @property
    def warp_images(self) -> int:
        return max(1, (IN_CLUSTERS if self.clusters else NARROW) // self.columns)

    @property
    def images(self) -> int:
        return self.side * self.warp_images

    @property
    def threads(self) -> int:
        return self.slots // (32 if self.side == 2 else 16) * self.side * 32

    @property
    def pitch(self) -> int:
        """Distance of rows of floats in shared memory."""
        return (self.images * self.columns + 7) // 32 * 32 + 24

    @property
    def work(self) -> int:
        """Bytes of shared memory for the stages of the products, and then for the affinities."""
        return max(self.stages * (self.slots + self.images * self.columns) * 128, self.slots * self.pitch * 4)

    @property
    def shared(self) -> int:
        ring = 16 * self.stages + 8 if self.clusters else 0
        return self.work + CAPTIONS * self.pitch * 4 + ring


def tile_of(R: int, capability: tuple[int, int]) -> Tile:
    """The tile for images of R regions, from 1 to 128, on a GPU of a compute capability."""
    columns, small = next(c for c in COLUMNS if c >= R), capability < TENSOR_FLOAT32
    if columns > NARROW:
        return Tile(columns, FEW_WORDS if small else 128, 1)
    return Tile(columns, 128, 1 if small else 2)


def shared_limit(capability: tuple[int, int]) -> int:
    """The most bytes of shared memory that a block can have on a GPU of a compute capability."""
    return SHARED.get(capability, SHARED[8, 6])


class Plan(NamedTuple):
    """Whole captions in tiles of `slots`; the tensors are int32, see `Pairs` in affinity.h."""

    tiles: int
    first: Tensor
    caption: Tensor
    begin: Tensor
    end: Tensor
    row: Tensor
    owner: Tensor


def plan_tiles(cu_seqlens: Tensor, rows: int, op: str, slots: int) -> Plan:
    """Put captions into tiles, each into the fullest one that still has room for it, the longest first; see `kept`.

    No caption may have more words than `slots`.

    Raises:
        ValueError: as `packing.bounds` does.
    """
    edge = bounds(cu_seqlens, rows, op)
    return kept(cu_seqlens, ("tiles", rows, slots), lambda values: _plan(edge, slots, values.device))


def _plan(edge: list[int], slots: int, device: torch.device) -> Plan:
    size = [b - a for a, b in zip(edge, edge[1:])]
    tiles: list[list[int]] = []
    room: list[list[int]] = [[] for _ in range(slots + 1)]  # by free slots: tiles that may take another caption
    for t in sorted(range(len(size)), key=lambda t: (-size[t], t)):
        free = next((n for n in range(size[t], slots + 1) if room[n]), None)
        if free is None:
            free = slots
            room[free].append(len(tiles))
            tiles.append([])
        k = room[free].pop()
        tiles[k].append(t)
        if len(tiles[k]) < CAPTIONS:
            room[free - size[t]].append(k)
    caption: list[int] = []
    begin: list[int] = []
    row: list[int] = []
    owner: list[int] = []
    first = [0]
    for members in tiles:
        start = len(row)
        for i, t in enumerate(members):
            caption.append(t)
            begin.append(len(row) - start)
            row += range(edge[t], edge[t + 1])
            owner += [i] * size[t]
        empty = slots - (len(row) - start)
        row += [-1] * empty
        owner += [0] * empty
        first.append(len(caption))
    end = [b + size[t] for b, t in zip(begin, caption)]
    tensors = (torch.tensor(x, dtype=torch.int32).to(device) for x in (first, caption, begin, end, row, owner))
    return Plan(len(tiles), *tensors)
