"""`cross_attention_score` in CUDA C++ (csrc/cuda/scan.cu): what its kernels read, and their launch."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ... import _cuda
from ..._checks import matmul_precision
from ...packing import bounds, checked, region_counts
from .. import _attention
from .._calls import CUDA_ENUMS, HARD
from . import _blocks, _rows, _tiles
from ._tiles import Pairs, Tile

OP = "cross_attention_score"
CLUSTERED = Tile(36, 128, 1, 3, True)  # of blocks in clusters (csrc/cuda/affinity.h)
CLUSTERED_KINDS = "F16", "BF16", "F16X3"  # of their products
BLOCKS, BYTES = (1 << 31) - 1, 64 << 30  # of a grid; of rows, whose pieces of 16 bytes the kernels count in 32 bits


class Attention(ctypes.Structure):
    """Twin of `Attention` in attention.h."""

    _fields_ = [
        ("norm", ctypes.c_int),
        ("slope", ctypes.c_float),
        ("scale", ctypes.c_float),
        ("weights", ctypes.c_int),
        ("threshold", ctypes.c_float),
    ]

    @classmethod
    def of(cls, affinity_norm: str, scale: float, weights: str = "softmax", threshold: float = 0.0) -> Attention:
        """The attention with one of `_attention.NORMS` and one of `_attention.WEIGHTS`."""
        clipped, norm = _attention.clipped(affinity_norm)
        share = "all" if weights in ("softmax", "hard") else weights
        return cls(
            CUDA_ENUMS["Norm"].index(norm),
            _attention.SLOPE if clipped else 1,
            HARD if weights == "hard" else scale,
            CUDA_ENUMS["Sharing"].index(share),
            threshold,
        )


class Grams(ctypes.Structure):
    """Twin of `Grams` in attention.h."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("factor", "size", "place")]


class Scan(ctypes.Structure):
    """Twin of `Scan` in scan.cu."""

    _fields_ = [
        ("pairs", Pairs),
        ("attention", Attention),
        ("grams", Grams),
        ("length", ctypes.c_void_p),
        ("score", ctypes.c_void_p),
        ("pool", ctypes.c_int),
        ("pool_scale", ctypes.c_float),
        ("similarity", ctypes.c_int),
    ]


class Rows(NamedTuple):
    """Words [N, D] and regions [I * R, D] in a form that kernels of `kind` multiply."""

    kind: str
    words: Tensor
    regions: Tensor
    exponents: tuple[Tensor, Tensor] | None = None
    wide: Tensor | None = None
    for_wide: bool = False


def _forms(
    words: Tensor, regions: Tensor, capability: tuple[int, int], wide_sets: Callable[[Tensor, Tensor], Tensor]
) -> Iterator[Rows]:
    """The forms to launch: one, or two of which each computes the pairs whose rows it holds."""
    if words.dtype != torch.float32:
        yield Rows("BF16" if words.dtype == torch.bfloat16 else "F16", words, regions)
        return
    pairs = matmul_precision() == "highest"
    q, x = _rows.split_rows(words, pairs), _rows.split_rows(regions, pairs)
    wide = None
    if q.wide is not None and x.wide is not None and capability >= _attention.TENSOR_FLOAT32:
        wide = wide_sets(q.wide, x.wide)
        yield Rows("TF32X3", words, regions, None, wide, True)
    yield Rows("F16X3" if pairs else "F16", q.rows, x.rows, (q.exponent, x.exponent), wide)


def aligned(tensor: Tensor) -> Tensor:
    """The tensor, copied unless it is contiguous and starts at a multiple of 16 bytes, as kernels copy 16 at a time."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


def copied_bytes(rows: Tensor) -> int:
    """Bytes of a row [..., D] in the copy that `aligned` makes, 0 if it makes none."""
    return 0 if rows.is_contiguous() and rows.data_ptr() % 16 == 0 else rows.shape[-1] * rows.itemsize


def forward(
    image: Tensor,
    words: Tensor,
    cu_seqlens: Tensor,
    region_lengths: Tensor | None,
    direction: str,
    affinity_norm: str,
    scale: float,
    pool: str,
    pool_scale: float,
    weights: str = "softmax",
    threshold: float = 0.0,
    similarity: str = "cosine",
) -> Tensor:
    """Scores [I, T].

    Raises:
        NotImplementedError: the kernels do not take these sizes.
    """
    score = image.new_empty(len(image), len(cu_seqlens) - 1)
    (I, R, D), device = image.shape, image.device
    if not score.numel():
        return score
    capability = torch.cuda.get_device_capability(device)
    edge = bounds(cu_seqlens, len(words), OP)
    longest = max(b - a for a, b in zip(edge, edge[1:]))
    if problem := _attention.beyond_cuda(R, D, longest, capability < _attention.TENSOR_FLOAT32):
        raise NotImplementedError(f"{OP}: {problem}")
    tile = in_clusters = tile_of(R, capability)
    if clustered(tile, capability) and _cuda.variant(OP, device, image.dtype) == _cuda.CLUSTERS:
        in_clusters = CLUSTERED
    columns = -(-tile.columns // 8) * 8
    if region_lengths is not None:
        region_counts(region_lengths, image, OP)
    rows = _rows.split_bytes(D, matmul_precision() == "highest") if image.dtype == torch.float32 else 0
    # Scratch of an image, a word and a pair: rows, factors or the rows' lengths by direction, and scores.
    image_bytes, word_bytes = R * rows + 4 * columns * (columns + 1), rows + 4
    if direction == "i2t":
        image_bytes, word_bytes = R * (rows + 4), rows + 4 * (longest + 4)
    image_bytes, word_bytes = image_bytes + R * copied_bytes(image), word_bytes + copied_bytes(words)
    rounding = 0
    if in_clusters.clusters:  # the stages of regions, and what they are made of, for whole groups of images
        staged = 2 * tile.columns * 2 * staged_numbers(D, image.dtype)
        image_bytes, rounding = image_bytes + staged, (in_clusters.images - 1) * staged
    pair_bytes = 0 if score.dtype == torch.float32 else 4
    cut = _blocks.blocks(I, edge, image_bytes, word_bytes, pair_bytes, _blocks.room(device) - rounding)
    if len(cut) > 1:
        for images, captions in cut:
            some = words[edge[captions.start] : edge[captions.stop]]
            lengths = _blocks.part(cu_seqlens, region_lengths, images, captions)
            score[images, captions] = forward(
                image[images], some, *lengths, direction, affinity_norm, scale, pool, pool_scale, weights, threshold,
                similarity,
            )  # fmt: skip
        return score
    plan = _tiles.plan_tiles(cu_seqlens, len(words), OP, in_clusters.slots)
    count = None
    if region_lengths is not None:
        count = aligned(checked(region_lengths).to(torch.int32))
    image, words = aligned(image), aligned(words)
    regions = image.view(I * R, D)
    if direction == "t2i":
        length, factors = _rows.lengths(words), _rows.image_factors(image, count, columns)
    else:
        length, factors = _rows.lengths(regions), _rows.caption_factors(words, cu_seqlens, edge, longest)
    attention, grams = Attention.of(affinity_norm, scale, weights, threshold), Grams(*map(_address, factors))
    pooling = CUDA_ENUMS["Pool"].index(pool), pool_scale, CUDA_ENUMS["Similarity"].index(similarity)
    result = score if score.dtype == torch.float32 else score.new_empty(score.shape, dtype=torch.float32)
    groups = -(-I // tile.images)
    if plan.tiles * groups > BLOCKS or max(len(words), I * R) * D * 4 > BYTES:
        raise NotImplementedError(f"{OP}: too many pairs or over 64 GiB of rows for one call of the CUDA kernels")

    def wide_sets(q: Tensor, x: Tensor) -> Tensor:
        return _rows.wide_sets(q, checked(cu_seqlens), x.view(I, R), count)

    for form in _forms(words, regions, capability, wide_sets):
        exponents = form.exponents or (None, None)
        pairs = Pairs(
            *(_address(x) for x in (form.words, form.regions, *exponents, count)),
            *(x.data_ptr() for x in (plan.first, plan.caption, plan.begin, plan.end, plan.row, plan.owner)),
            _address(form.wide), I, R, len(edge) - 1, form.words.shape[1] * form.words.itemsize // 16, plan.tiles,
            form.for_wide, None,
        )  # fmt: skip
        own_tile = in_clusters if form.kind in CLUSTERED_KINDS else tile
        if own_tile.clusters:
            stages = region_stages(form.regions.view(I, R, -1), count, own_tile)
            pairs.regions, pairs.failed = stages.data_ptr(), _cuda.fault_address(device)
            grid = -(-plan.tiles // 2) * len(stages), 2
        else:
            grid = plan.tiles * groups, 1
        problem_ = Scan(pairs, attention, grams, length.data_ptr(), result.data_ptr(), *pooling)
        _cuda.launch(kernel(direction, form.kind, own_tile), problem_, grid, device)
    return score if result is score else score.copy_(result)


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def tile_of(R: int, capability: tuple[int, int]) -> Tile:
    """The tile for images of R regions, with as many stages as a block's shared memory has room for.

    With three, the next two stages are on their way while one is multiplied. The products of half-precision numbers
    take about as long as a stage's way from the L2 cache, which two stages would not hide.
    """
    tile = _tiles.tile_of(R, capability)
    more = tile._replace(stages=3)
    return more if more.shared <= _tiles.shared_limit(capability) else tile


def clustered(tile: Tile, capability: tuple[int, int]) -> bool:
    """Whether blocks in clusters may take the place of those with this tile, for products of `CLUSTERED_KINDS`."""
    return capability == _cuda.SPECIFIC and tile.columns == CLUSTERED.columns


def staged_numbers(D: int, dtype: torch.dtype) -> int:
    """16-bit numbers of a row [D] in `region_stages`."""
    if dtype == torch.float32 and matmul_precision() == "highest":
        return 2 * (D + -D % _rows.BLOCK)
    return D + -D % 64


def region_stages(regions: Tensor, count: Tensor | None, tile: Tile) -> Tensor:
    """Regions [I, R, D] of 16-bit numbers in stages for each group of images: [groups, stages, columns of all, 8, 8].

    Zeros stand for regions beyond an image's `count` and behind the last image.
    """
    I, R, D = regions.shape
    if count is not None:
        regions = regions.masked_fill(torch.arange(R, device=count.device)[:, None] >= count[:, None, None], 0)
    filled = torch.nn.functional.pad(regions, (0, -D % 64, 0, tile.columns - R, 0, -I % tile.images))
    del regions  # the masked copy, which `forward` leaves no room for beside the next
    return _rows.stages(filled.view(-1, tile.images * tile.columns, filled.shape[-1]))


def kernel(direction: str, kind: str, tile: Tile) -> _cuda.Kernel:
    """The instance for a kind of products."""
    if tile.clusters:
        name = f"scan_{direction}_in_clusters<{kind}, {tile.columns}, {tile.slots}, {tile.stages}>"
        return _cuda.Kernel("scan.cu", name, Scan, tile.threads, tile.shared, specific=True, cluster=2)
    name = f"scan_{direction}<{kind}, {tile.columns}, {tile.slots}, {tile.side}, {tile.stages}>"
    return _cuda.Kernel("scan.cu", name, Scan, tile.threads, tile.shared)


def compilations(capability: tuple[int, int]) -> list[_cuda.Kernel]:
    """All that may run on a GPU of a compute capability."""
    kinds = ("F16", "F16X3", "BF16", "TF32X3") if capability >= _attention.TENSOR_FLOAT32 else ("F16", "F16X3")
    tiles = [tile_of(R, capability) for R in _tiles.COLUMNS]
    found = [kernel(*of) for of in itertools.product(_attention.DIRECTIONS, kinds, tiles)]
    if capability == _cuda.SPECIFIC:
        found += [kernel(*of) for of in itertools.product(_attention.DIRECTIONS, CLUSTERED_KINDS, [CLUSTERED])]
    return found
