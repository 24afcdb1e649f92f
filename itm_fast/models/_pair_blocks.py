"""Blocks of pairs for scorers that compose several ops: some images with some captions.

`matched` cuts a backward pass into blocks of single pairs, for a loss that gives a gradient to few: a rectangle of some
images and some captions has mostly pairs without one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._names import Norm
from .._workspace import GIB, scratch_bytes, workspace
from ..ops import _recompute, attended_vectors
from ..ops._torch._groups import Group, Padding, groups
from ..packing import Index, Run, bounds, region_counts, runs, spans

CPU_BLOCK = 64 << 20  # bytes of a block: smaller ones lose time to packed weights, larger ones to fresh memory
PAIRS_BLOCK = 16 << 20  # the same of single pairs, which have copies: less memory in as much time; 8 MiB take longer
ROWS = 1024  # most words of a block's captions, so that it has several images too
KEPT = 6  # copies of a block's tensors that autograd keeps, about
PADDED = 2  # joined captions, each padded to the longest, have at most so many times the words


class Joined(NamedTuple):
    """Some images with captions of several lengths, one after another.

    Attributes:
        images: their places in the batch.
        captions: likewise, on the CPU.
        padded: their lengths, and how their words are padded; all images with these captions share it, so that its
            indices are copied to a GPU once.
    """

    images: Index
    captions: Sequence[int]
    padded: Padding


class Pairs(NamedTuple):
    """P pairs, whose captions have one length.

    Attributes:
        images: [P], their places in the batch.
        captions: [P], likewise.
        length: words of a caption.
        region_lengths: [P], regions of each pair's image, or None if all have R.
    """

    images: Tensor
    captions: Tensor
    length: int
    region_lengths: Tensor | None


def blocks(
    name: str,
    axes: str,
    pair_bytes: Callable[[int], int],
    run: Callable[..., Tensor],
    backward: bool,
    *args: Tensor,
    joined: bool = False,
) -> Iterator[_recompute.Block]:
    """Cut images x captions into blocks, for `_recompute.score`.

    Args:
        name: what errors name.
        axes: the first dimension of each tensor, as in `_recompute.score`; the first three are image, ..., words.
        pair_bytes: words of a caption -> bytes that a pair takes in float32, forward.
        run: (length, cu_seqlens, region_lengths, *tensors) -> scores of a block, whose captions have one length.
        backward: whether the blocks are differentiated.
        *args: the tensors, cu_seqlens and region_lengths.
        joined: a block may have captions of several lengths; `run` then gets a `Joined` instead of the one length.
            It may pad each caption to the longest.
    """
    *tensors, cu_seqlens, region_lengths = args
    image, words = tensors[0], tensors[axes.index("N")]
    region_counts(region_lengths, image, name)
    edge = bounds(cu_seqlens, len(words), name)
    half, limit = _limits(image.device, backward)
    rows = max(1, min(ROWS, limit // max(1, pair_bytes(1))))  # so few that one image with them fits
    if joined:
        cut = groups(edge, image.device, rows, rows, PADDED)
    else:
        cut = map(_alone, runs(edge, image.device, rows))
    for some in cut:
        lengths = [length for length, size in some.sets for _ in range(size)]
        own = torch.tensor([0, *accumulate(lengths)], dtype=cu_seqlens.dtype, device=cu_seqlens.device)
        padded = Padding(lengths, image.device)
        most = limit // (len(lengths) * pair_bytes(max(lengths)) * max(1, image.element_size() // 4))
        for images in spans(len(image), max(1, most)):
            at: dict[str, tuple[Index, ...]] = {"I": (images,), "N": (some.rows,), "T": (some.captions,), ".": ()}
            counts = None if region_lengths is None else region_lengths[images]
            of = Joined(images, some.members, padded) if joined else lengths[0]
            function = partial(run, of, own, counts)
            yield _recompute.Block(
                tuple(at[axis] for axis in axes), (images, some.captions), partial(_within, half / GIB, function)
            )


def lengths(cu_seqlens: Tensor, words: Tensor, name: str) -> int:
    """How many different lengths the captions have: each has blocks, and copies of images, of its own."""
    return len({b - a for a, b in pairwise(bounds(cu_seqlens, len(words), name))})


def _alone(run: Run) -> Group:
    return Group([(run.length, run.size)], (), run.captions, run.rows)  # nobody asks for its members


def nodes_of(cu_seqlens: Tensor, overall: Tensor, local: Tensor) -> tuple[Tensor, Tensor]:
    """The nodes of captions with bounds cu_seqlens, [b, words + c, S], and the nodes' bounds [c + 1].

    A caption's first node is its own of `overall` [b, c, S]; those of its words in `local` [b, words, S] follow.
    """
    (_, c, _), N, device = overall.shape, local.shape[1], local.device
    starts = cu_seqlens + torch.arange(c + 1, dtype=cu_seqlens.dtype, device=device)
    place = torch.arange(N, device=device) + 1 + torch.repeat_interleave(cu_seqlens.diff(), output_size=N)
    order = torch.cat([starts[:-1], place]).argsort()
    return torch.cat([overall, local], 1).index_select(1, order), starts


def matched(
    axes: str,
    pair_bytes: Callable[[int], int],
    run: Callable[..., Tensor],
    grad: Tensor,
    *args: Any,
) -> Iterator[_recompute.Block]:
    """The pairs whose score has a gradient, for `_recompute.score`: captions of one length in a block.

    Args:
        axes: as in `blocks`.
        pair_bytes: as in `blocks`.
        run: (`Pairs`, *tensors) -> scores of P pairs; tensors of axis I or T hold each pair's own row, those of axis N
            its words [P, length, ...].
        grad: of the scores, [I, T] or [I, T, K].
        *args: the tensors, cu_seqlens and region_lengths.
    """
    *tensors, cu_seqlens, region_lengths = args
    half, limit = _limits(grad.device, backward=True)
    limit = min(limit, PAIRS_BLOCK)
    scored = grad.ne(0) if grad.dim() == 2 else grad.ne(0).any(2)
    captions, images = scored.t().nonzero(as_tuple=True)
    lengths, order = cu_seqlens.diff()[captions].sort(stable=True)
    found, counts = lengths.unique_consecutive(return_counts=True)
    for length, own in zip(found.tolist(), order.split(counts.tolist()), strict=True):
        # Rectangles read rows of their tensors where these lie; here each pair has copies of its own.
        copied = sum({"I": 1, "T": 1, "N": length, ".": 0}[axis] * x[:1].numel() * 4 for axis, x in zip(axes, tensors))
        most = limit // ((pair_bytes(length) + copied) * max(1, grad.element_size() // 4))
        for some in own.split(max(1, most)):
            i, t = images[some], captions[some]
            rows = cu_seqlens[t].long()[:, None] + torch.arange(length)
            at: dict[str, tuple[Index, ...]] = {"I": (i,), "N": (rows,), "T": (t,), ".": ()}
            pairs = Pairs(i, t, length, None if region_lengths is None else region_lengths[i])
            within = partial(_within, half / GIB, partial(run, pairs))
            yield _recompute.Block(tuple(at[axis] for axis in axes), (i, t), within)


def attended_of_pairs(
    context: Tensor,
    context_lengths: Tensor | None,
    query: Tensor,
    values: Tensor | None = None,
    scale: float | Tensor = 1.0,
    affinity_norm: Norm = "clipped_l2norm",
) -> Tensor:
    """`attended_vectors` of P pairs: context [P, n, D], query [P, q, D], values [P, n, S], scale [P, q] -> [P, q, S].

    A pair is an image, its context, with a caption of q words, its queries. In direction i2t, regions are these words.
    """
    q, D = query.shape[1:]
    return attended_vectors(
        context, query.new_zeros(q, D), torch.tensor([0, q], dtype=torch.int32), query, values, scale=scale,
        affinity_norm=affinity_norm, region_lengths=context_lengths,
    )  # fmt: skip


def _limits(device: torch.device, backward: bool) -> tuple[int, int]:
    """Bytes for the ops that run on a block, half of the workspace, and for the block's tensors."""
    half = scratch_bytes(device) // 2
    limit = half // KEPT if backward else half
    return half, min(limit, CPU_BLOCK) if device.type == "cpu" else limit


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
