"""`cross_attention_similarity` in batched PyTorch: |P| from the Gram matrix first, then one pass over D."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ..._checks import work_dtype
from ...packing import bounds, region_counts, runs, spans, valid
from .. import _attention, _recompute
from .._declare import empty
from ._attention import attended_norm, attention
from ._linear import linear


def forward(image: Tensor, words: Tensor, weight: Tensor, bias: Tensor, *rest) -> Tensor:
    args = image, words, weight, bias
    return _recompute.forward(_cut(False, *args, *rest), args, empty("cross_attention_similarity", *args, *rest))


def forward_recorded(needs: list[bool], *args) -> tuple[Tensor, list[_recompute.Recorded] | None]:
    result = empty("cross_attention_similarity", *args)
    return result, _recompute.forward_recorded(_cut(True, *args), args[:4], needs, result)


def backward(
    grad: Tensor, needs: list[bool], *args, record: list[_recompute.Recorded] | None = None
) -> list[Tensor]:
    blocks = record or _recompute.recorded(_cut(True, *args), args[:4], needs)
    return _recompute.differentiate(blocks, args[:4], needs, grad)


def _cut(backward, image, words, weight, bias, cu_seqlens, region_lengths, direction, affinity_norm, scale):
    (I, R, D), op = image.shape, "cross_attention_similarity"
    edge = bounds(cu_seqlens, words.shape[0], op)
    region_counts(region_lengths, image, op)
    row = 2 * D * work_dtype(image).itemsize  # a query's difference
    queries = _recompute.tile_bytes(image.device, backward) // row
    for run in runs(edge, image.device, _recompute.MIN_QUERIES):
        pair = run.size * (run.length if direction == "t2i" else R)
        for images in spans(I, max(1, queries // pair)):
            lengths = None if region_lengths is None else region_lengths[images]
            yield _recompute.Block(
                ((images,), (run.rows,), (), ()),
                (images, run.rows if direction == "t2i" else run.captions),
                partial(similarity, direction, affinity_norm, scale, run.length, lengths),
            )


def similarity(direction, norm, scale, length, region_lengths, image, words, weight, bias):
    """A block: images [B, R, D], captions of one length [C * L, D] -> [B, C * L, S], or i2t [C, B, R, S]."""
    work = work_dtype(image)
    square = squares(direction, norm, scale, length, region_lengths, image, words)
    B, C, Q, D = square.shape
    similar = _attention.l2norm(linear(square.view(B * C * Q, D), weight.to(work), bias.to(work)))
    if direction == "t2i":
        return similar.view(B, C * Q, -1)
    similar = similar.view(B, C, Q, -1).transpose(0, 1)
    if region_lengths is None:
        return similar
    return similar.masked_fill(~valid(region_lengths, image.shape[1])[:, None, :, None], 0.0)


def squares(direction, norm, scale, length, region_lengths, image, words) -> Tensor:
    """(P - q)^2 of a block's queries [C, Q, D] in all contexts, [B, C, Q, D]."""
    work = work_dtype(image)
    image, caption = image.to(work), words.to(work).view(-1, length, words.shape[-1])
    mask = None if region_lengths is None else valid(region_lengths, image.shape[1])
    if mask is not None:
        image = image.masked_fill(~mask[:, :, None], 0.0)
    t2i = direction == "t2i"
    context, query = (image, caption) if t2i else (caption, image)
    (B, X, D), (C, Q, _) = context.shape, query.shape
    affinity = (context.reshape(B * X, D) @ query.reshape(C * Q, D).t()).view(B, X, C * Q)
    alpha = attention(affinity, [(Q, C)], norm, scale, mask if t2i else None, None if t2i else mask)
    length_P = attended_norm(alpha, context @ context.transpose(1, 2), context)
    alpha = alpha / (length_P + _attention.EPS)[:, None, :]
    difference = torch.baddbmm(query.reshape(1, C * Q, D), alpha.transpose(1, 2), context, beta=-1)
    square = difference.square() if torch.is_grad_enabled() else difference.square_()
    return square.view(B, C, Q, D)
