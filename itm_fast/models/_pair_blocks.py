"""Blocks of pairs for scorers that compose several ops: some images with some captions of one length."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from .._workspace import GIB, scratch_bytes, workspace
from ..ops import _recompute
from ..packing import Index, bounds, region_counts, runs, spans

CPU_BLOCK = 128 << 20  # bytes of a block: smaller ones lose time to packed weights, larger ones to fresh memory
ROWS = 1024  # most words of a block's captions, so that it has several images too
KEPT = 6  # copies of a block's tensors that autograd keeps, about


def blocks(
    name: str,
    axes: str,
    pair_bytes: Callable[[int], int],
    run: Callable[..., Tensor],
    backward: bool,
    *args: Tensor,
) -> Iterator[_recompute.Block]:
    """Cut images x captions into blocks, for `_recompute.score`.

    Args:
        name: what errors name.
        axes: the first dimension of each tensor, as in `_recompute.score`; the first three are image, ..., words.
        pair_bytes: words of a caption -> bytes that a pair takes in float32, forward.
        run: (length, cu_seqlens, region_lengths, *tensors) -> scores of a block.
        backward: whether the blocks are differentiated.
        *args: the tensors, cu_seqlens and region_lengths.
    """
    *tensors, cu_seqlens, region_lengths = args
    image, words = tensors[0], tensors[axes.index("N")]
    region_counts(region_lengths, image, name)
    edge = bounds(cu_seqlens, len(words), name)
    # One half of the workspace is for a block's tensors, the other for the ops that run on them.
    half = scratch_bytes(image.device) // 2
    limit = half // KEPT if backward else half
    limit = min(limit, CPU_BLOCK) if image.device.type == "cpu" else limit
    rows = max(1, min(ROWS, limit // max(1, pair_bytes(1))))  # so few that one image with them fits
    for some in runs(edge, image.device, rows):
        own = torch.arange(some.size + 1, dtype=cu_seqlens.dtype, device=cu_seqlens.device) * some.length
        most = limit // (pair_bytes(some.length) * max(1, image.element_size() // 4) * some.size)
        for images in spans(len(image), max(1, most)):
            at: dict[str, tuple[Index, ...]] = {"I": (images,), "N": (some.rows,), "T": (some.captions,), ".": ()}
            counts = None if region_lengths is None else region_lengths[images]
            within = partial(_within, half / GIB, partial(run, some.length, own, counts))
            yield _recompute.Block(tuple(at[axis] for axis in axes), (images, some.captions), within)


def _within(gib: float, run: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    with workspace(gib):
        return run(*tensors)


def mean_over_queries(x: Tensor, length: int, direction: str, region_lengths: Tensor | None) -> Tensor:
    """Means over a pair's queries: [b, c * length, ...] for t2i, [b, c, R, ...] for i2t -> [b, c, ...].

    Rows of padding regions must be zero.
    """
    if direction == "t2i":
        return x.unflatten(1, (-1, length)).mean(2)
    if region_lengths is None:
        return x.mean(2)
    return x.sum(2) / region_lengths.to(x.dtype).view(-1, *[1] * (x.dim() - 2))
