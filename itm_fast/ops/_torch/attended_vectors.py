"""`attended_vectors` in batched PyTorch: two products a block of some images and some captions of one length."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ..._checks import work_dtype
from ...packing import Index, bounds, region_counts, runs, spans, valid
from .. import _recompute
from .._declare import empty
from ._attention import scaled

COPIES = 5  # affinities, logits and weights of a block, and what autograd keeps of them


def forward(image: Tensor, words: Tensor, queries: Tensor, values: Tensor, scale: Tensor, *rest) -> Tensor:
    args = image, words, queries, values, scale
    blocks = _cut(False, *args, *rest)
    return _recompute.forward(blocks, _viewed(*args, *rest), empty("attended_vectors", *args, *rest))


def forward_recorded(needs: list[bool], *args) -> tuple[Tensor, list[_recompute.Recorded] | None]:
    result = empty("attended_vectors", *args)
    return result, _recompute.forward_recorded(_cut(True, *args), _viewed(*args), needs, result)


def backward(
    grad: Tensor, needs: list[bool], *args, record: list[_recompute.Recorded] | None = None
) -> list[Tensor]:
    given = _viewed(*args)
    blocks = record or _recompute.recorded(_cut(True, *args), given, needs)
    found = _recompute.differentiate(blocks, given, needs, grad)
    wanted = [x for x, need in zip(args, needs, strict=False) if need]
    return [d.view(x.shape) for d, x in zip(found, wanted, strict=True)]


def _viewed(image, words, queries, values, scale, cu_seqlens, region_lengths, direction, affinity_norm):
    """The tensors with a dimension for images and one for words or, for i2t, captions and regions."""
    (I, R, D), T, t2i = image.shape, len(cu_seqlens) - 1, direction == "t2i"
    if t2i:
        return image, words, queries, values.view(I, R, values.shape[1]), scale
    queries = queries if queries.shape[1] == R else queries.view(I, T, R, D)
    return image, words, queries, values, scale if scale.numel() == 1 else scale.view(I, T, R)


def _cut(backward, image, words, queries, values, scale, cu_seqlens, region_lengths, direction, affinity_norm):
    (I, R, D), op, t2i = image.shape, "attended_vectors", direction == "t2i"
    edge = bounds(cu_seqlens, len(words), op)
    region_counts(region_lengths, image, op)
    apart = queries.shape[:2] == (I, len(words)) if t2i else queries.shape[1] != R
    item, S = work_dtype(image).itemsize, values.shape[1]
    for run in runs(edge, image.device, _recompute.MIN_QUERIES):
        rows = run.size * run.length if t2i else run.size * R
        contexts = R if t2i else run.length
        row = (COPIES * contexts + S + (D if apart else 0)) * item
        most = _recompute.tile_bytes(image.device, backward) // row
        for images in spans(I, max(1, most // rows)):
            lengths = None if region_lengths is None else region_lengths[images]
            at = run.rows if t2i else run.captions
            own: tuple[Index, ...] = (images, at) if apart else ((slice(0, 1), at) if t2i else (images,))
            yield _recompute.Block(
                (
                    (images,),
                    (run.rows,),
                    own,
                    (images,) if t2i else (run.rows,),
                    () if scale.numel() == 1 else (images, at),
                ),
                (images, at),
                partial(_attend, t2i, affinity_norm, run.length, lengths, apart),
            )


def _attend(t2i, norm, length, region_lengths, apart, image, words, queries, values, scale) -> Tensor:
    """A block: images [b, R, D] and captions of one length, words [c * L, D] -> [b, c * L, S] or, i2t, [b, c, R, S].

    Queries are [1, c * L, D] or [b, R, D] or, where they are each pair's own (`apart`), [b, c * L, D] or [b, c, R, D].
    """
    work = work_dtype(image)
    image, queries, values, scale = (x.to(work) for x in (image, queries, values, scale))
    caption = words.to(work).view(-1, length, words.shape[-1])
    (b, R, D), c, S = image.shape, len(caption), values.shape[-1]
    mask = None if region_lengths is None else valid(region_lengths, R)
    if t2i:
        context, x, sets, size = image, values, c, length
        if mask is not None:
            context, x = (y.masked_fill(~mask[:, :, None], 0.0) for y in (context, x))
        if apart:
            affinity = torch.bmm(context, queries.transpose(1, 2))
        else:
            affinity = (context.reshape(b * R, D) @ queries.reshape(-1, D).t()).view(b, R, c * length)
        factor = scale.view(-1, 1, c, length) if scale.numel() > 1 else scale
    else:
        context, x, sets, size = caption, values.view(c, length, S), b, R
        if mask is not None:
            shape = (b, 1, R, 1) if apart else (b, R, 1)
            queries = queries.masked_fill(~mask.view(shape), 0.0)
        if apart:
            affinity = torch.bmm(context, queries.transpose(0, 1).reshape(c, b * R, D).transpose(1, 2))
        else:
            affinity = (context.reshape(c * length, D) @ queries.reshape(b * R, D).t()).view(c, length, b * R)
        factor = scale.transpose(0, 1).unsqueeze(1) if scale.numel() > 1 else scale
    logits = scaled(affinity.view(*affinity.shape[:2], sets, size), norm, 1.0, None if t2i else mask) * factor
    if t2i and mask is not None:
        logits = logits.masked_fill(~mask[:, :, None, None], float("-inf"))
    attended = torch.bmm(logits.flatten(2).softmax(1).transpose(1, 2), x)
    if t2i:
        return attended
    attended = attended.view(c, b, R, S).transpose(0, 1)
    return attended if mask is None else attended.masked_fill(~mask[:, None, :, None], 0.0)
