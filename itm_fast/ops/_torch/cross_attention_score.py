"""`cross_attention_score` in batched PyTorch: equation (3) of `ops/cross_attention_score.py`, block by block."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from ...packing import bounds
from .. import _attention
from ..cross_attention_score import pooled
from . import _blocks
from ._attention import attended_norm, attention, valid

COPIES = 6  # [R, L] temporaries of a pair alive at once, forward


def forward(image: Tensor, words: Tensor, *rest) -> Tensor:
    cu_seqlens = rest[0]
    result = image.new_empty(image.shape[0], cu_seqlens.shape[0] - 1)
    return _blocks.forward(_cut(image, words, *rest), (image, words), result)


def backward(grad: Tensor, needs: list[bool], image: Tensor, words: Tensor, *rest) -> list[Tensor]:
    return _blocks.backward(_cut(image, words, *rest), (image, words), needs, grad)


def _cut(image, words, cu_seqlens, region_lengths, direction, affinity_norm, scale, pool, pool_scale):
    (I, R, D), op = image.shape, "cross_attention_score"
    edge = bounds(cu_seqlens, words.shape[0], op)
    _attention.region_counts(region_lengths, image, op)
    entries = _blocks.tile_bytes(image.device) // (COPIES * _blocks.work_dtype(image).itemsize)
    return _rectangles(I, R, D, edge, image.device, entries, region_lengths,
                       partial(_score, direction, affinity_norm, scale, pool, pool_scale))


def _rectangles(I, R, D, edge, device, entries, region_lengths, function) -> Iterator[_blocks.Block]:
    for run in _blocks.runs(edge, device, max(_blocks.MIN_QUERIES, entries // (8 * R))):
        for images in _blocks.spans(I, max(1, entries // (R * run.length * run.count))):
            lengths = None if region_lengths is None else region_lengths[images]
            yield _blocks.Block(
                ((images,), (run.rows,)), (images, run.captions), partial(function, run.length, lengths)
            )


def _score(direction, norm, scale, pool, pool_scale, length, region_lengths, image, words):
    work = _blocks.work_dtype(image)
    image, caption = image.to(work), words.to(work).view(-1, length, words.shape[-1])
    mask = valid(region_lengths, image.shape[1])
    if mask is not None:
        image = image.masked_fill(~mask[:, :, None], 0.0)
    t2i = direction == "t2i"
    context, query = (image, caption) if t2i else (caption, image)
    affinity, alpha = attention(context, query, norm, scale, mask if t2i else None, None if t2i else mask)
    B, C, Q = len(context), *query.shape[:2]
    # r_j = alpha_j . s_j / max(|q_j| |P_j|, eps)
    length_P = attended_norm(alpha, context @ context.transpose(1, 2)).view(B, C, Q)
    length_q = torch.linalg.vector_norm(query, dim=-1)
    r = (alpha * affinity).sum(1).view(B, C, Q) / (length_q * length_P).clamp_min(_attention.EPS)
    if not t2i and mask is not None:
        if pool == "mean":
            return (r.sum(-1) / mask.sum(-1)).t()
        r = r.masked_fill(~mask, 0.0 if pool == "sum" else float("-inf"))
    score = pooled(r, pool, pool_scale, dim=-1)
    return score if t2i else score.t()
