"""What all functions that launch kernels share: the device, aligned inputs, and sets of rows.

Conventions of all kernels in this folder:

- A grid has one axis. "Grid: a x b" means that program number i * b + j owns part i of a and part j of b.
- Tensors are contiguous. Features are in the inputs' dtype; workspaces, sums and statistics are float32.
- `start_ptr`, `size_ptr` [sets] and `owner_ptr` [rows], all int32, are those of `Sets`.
- `set_first`, `query_first`, `context_first`, ...: the first set or row of the piece of pairs (`Piece`) that is
  computed. A workspace holds this piece only, so its rows and columns are counted from there.
- `ld16`, `in16`, `out16`, `gram16`: row strides divided by 16. The kernel multiplies by 16 again, which tells the
  compiler that rows are aligned although the argument itself is not specialised.
- Numbers that differ from call to call are not specialised, so each kernel is compiled once for a model.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from itm_fast.packing import bounds, checked, region_counts, stretches

from . import _tiles

# The most context rows that `_attend` and `_project` hold in one tile; they pass over larger sets tile by tile.
REGIONS = 64  # regions of an image: the papers have 36
WORDS = 32  # words of a caption: one COCO caption in ten thousand has more


def arch(device: torch.device) -> int:
    """The architecture that `_tiles` is asked for: 80, 90 or 100. Triton's interpreter uses the block sizes of 90.

    Capability 12 (GeForce RTX 50) has the matrix instructions of 80 and less than half the shared memory of 100.
    """
    if device.type != "cuda":
        return 90
    major, _ = torch.cuda.get_device_capability(device)
    return {9: 90, 10: 100, 11: 100}.get(major, 80)


def processors(device: torch.device) -> int:
    """How many blocks of a kernel of large tiles run at a time; under Triton's interpreter an H100's number."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def on(device: torch.device) -> contextlib.AbstractContextManager:
    """Make `device` the current one, as Triton launches kernels there."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def aligned(tensor: Tensor) -> Tensor:
    """The tensor, copied unless it is contiguous and starts at a multiple of 16 bytes.

    Kernels are then compiled for one alignment only and load 16 bytes at a time.
    """
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


def blocks(n: int, size: int) -> int:
    """How many blocks of `size` cover `n`."""
    return triton.cdiv(n, size)


def power_of_two(n: int, least: int = 16) -> int:
    """The smallest power of two that holds `n`, and at least `least`: tl.dot needs 16 in every dimension."""
    return max(least, triton.next_power_of_2(n))


class Sets(NamedTuple):
    """Sets of rows: the regions of images, or the words of captions.

    Attributes:
        rows: [n, D] features, aligned.
        start, size: [sets] int32: the first row of each set, and its number of rows.
        owner: [n] int32: the set of each row.
        edge: sets + 1 Python integers: where sets begin.
        longest: no set has more rows than this.
        tile: rows of a set that one tile holds; a larger set takes several tiles.
        whole: whether every set is known to fit one tile, from the shapes and not from the lengths.
    """

    rows: Tensor
    start: Tensor
    size: Tensor
    owner: Tensor
    edge: list[int]
    longest: int
    tile: int
    whole: bool


class Piece(NamedTuple):
    """A rectangle of pairs that is computed at a time: slices of both sides' sets, and of their rows.

    Attributes:
        contexts, queries: which sets.
        x, q: which rows of contexts and of queries.
    """

    contexts: slice
    queries: slice
    x: slice
    q: slice


def zero_padding(image: Tensor, region_lengths: Tensor | None) -> Tensor:
    """Images with padding regions set to zero, for matrix products that read all regions.

    Padding may hold NaN, which a zero weight does not remove.
    """
    if region_lengths is None:
        return image
    beyond = torch.arange(image.shape[1], device=image.device)[None, :] >= region_lengths[:, None]
    return image.masked_fill(beyond[:, :, None], 0.0)


def regions(op: str, image: Tensor, region_lengths: Tensor | None) -> Sets:
    """Images [I, R, D] as sets of regions.

    Raises:
        ValueError: a count lies outside 1..R.
    """
    I, R, D = image.shape
    device = image.device
    start = torch.arange(0, I * R, R, dtype=torch.int32, device=device)
    if region_lengths is None:
        count = torch.full((I,), R, dtype=torch.int32, device=device)
    else:
        region_counts(region_lengths, image, op)
        count = aligned(checked(region_lengths).to(torch.int32))
    tile = min(REGIONS, power_of_two(R))
    owner = torch.arange(I * R, dtype=torch.int32, device=device).div_(R, rounding_mode="floor")
    return Sets(aligned(image).view(I * R, D), start, count, owner, list(range(0, I * R + 1, R)), R, tile, tile >= R)


def captions(words: Tensor, cu_seqlens: Tensor, edge: list[int]) -> Sets:
    """Packed words [N, D] as sets of words; `edge` is what `packing.bounds` gives for cu_seqlens."""
    cut = aligned(checked(cu_seqlens).to(torch.int32))
    count = cut.diff()
    index = torch.arange(len(count), dtype=torch.int32, device=words.device)
    owner = index.repeat_interleave(count, output_size=len(words))
    longest = max((b - a for a, b in zip(edge, edge[1:])), default=0)
    return Sets(aligned(words), cut[:-1], count, owner, edge, longest, WORDS, False)


def singles(rows: Tensor) -> Sets:
    """Rows [n, D] as sets of one row each."""
    index = torch.arange(len(rows), dtype=torch.int32, device=rows.device)
    edge = list(range(len(rows) + 1))
    return Sets(aligned(rows), index, torch.ones_like(index), index, edge, 1, power_of_two(1), True)


def sets(
    op: str, image: Tensor, words: Tensor, cu_seqlens: Tensor, region_lengths: Tensor | None, direction: str
) -> tuple[Sets, Sets]:
    """The sets of queries and of contexts."""
    edge = bounds(cu_seqlens, len(words), op)
    images, texts = regions(op, image, region_lengths), captions(words, cu_seqlens, edge)
    return (texts, images) if direction == "t2i" else (images, texts)


def pieces(
    query: Sets, context: Sets, each_row: int, each_set: int, limit: int, piece: int
) -> Iterator[Piece]:
    """Cut all pairs into pieces whose scratch memory fits `limit` bytes; a single pair is never cut.

    Args:
        each_row: floats of scratch for each pair of a query row and a context row.
        each_set: floats of scratch for each pair of a query row and a set of contexts.
        limit: bytes; at most half of them hold affinities, the rest what is kept per context row (Gram matrices).
        piece: affinities (query rows x context rows) beyond which a larger piece is no faster.
    """
    shortest = min((b - a for a, b in zip(context.edge, context.edge[1:])), default=1)
    area = max(1, min(piece, limit // (8 * (each_row + blocks(each_set, shortest)))))
    tall = min(query.edge[-1], math.isqrt(area))
    wide = max(1, min(area // max(1, tall), limit // (16 * (context.longest + 16))))
    wide = max(1, min(wide, context.edge[-1]))
    tall, dtype, device = area // wide, query.rows.dtype, query.rows.device
    tile = _tiles.affinity(dtype, arch(device), _tiles.products(dtype))
    for contexts in stretches(context.edge, wide):
        columns = blocks(context.edge[contexts.stop] - context.edge[contexts.start], tile["BLOCK_N"])
        rows = tall if tall >= query.edge[-1] else full_waves(tall, columns, tile["BLOCK_M"], processors(device))
        for queries in stretches(query.edge, rows):
            x, q = (slice(s.edge[c.start], s.edge[c.stop]) for s, c in ((context, contexts), (query, queries)))
            yield Piece(contexts, queries, x, q)


def full_waves(rows: int, columns: int, size: int, processors: int) -> int:
    """`rows`, or up to an eighth fewer, so that tiles of `size` rows in `columns` columns leave few processors idle.

    1,058 tiles on 132 processors take nine rounds, the last with two tiles; 1,035 take eight.
    """
    most = rows // size

    def busy(n: int) -> float:
        return n * columns / blocks(n * columns, processors)

    return max(range(most, most - most // 8, -1), key=busy) * size if most >= 8 else rows
