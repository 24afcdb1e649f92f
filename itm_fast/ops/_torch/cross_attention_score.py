"""`cross_attention_score` in batched PyTorch: equation (3) of `ops/cross_attention_score.py`, block by block."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from ..._checks import work_dtype
from ..._workspace import scratch_bytes
from ...packing import bounds, region_counts, runs, spans
from .. import _attention, _recompute
from .._declare import empty
from ._attention import attended_norm, attention, valid

COPIES = 6  # temporaries [R, L] of a pair that exist at once in the forward pass


def forward(image: Tensor, words: Tensor, *rest) -> Tensor:
    score = empty("cross_attention_score", image, words, *rest)
    for images, args, blocks in _image_spans(False, image, words, *rest):
        _recompute.forward(blocks, args, score[images])
    return score


def backward(grad: Tensor, needs: list[bool], image: Tensor, words: Tensor, *rest) -> list[Tensor]:
    work = work_dtype(image)
    d_image = torch.empty_like(image, dtype=work) if needs[0] else None
    d_words = torch.zeros_like(words, dtype=work) if needs[1] else None
    for images, args, blocks in _image_spans(True, image, words, *rest):
        wanted = [*needs, needs[0]][: len(args)]
        places = [k for k, n in enumerate(wanted) if n]
        found = dict(zip(places, _recompute.backward(blocks, args, wanted, grad[images])))
        if d_image is not None:
            d_image[images] = found[0]
            if 2 in found:  # of G = x x^T
                d_image[images] += (found[2] + found[2].transpose(1, 2)) @ args[0].to(work)
        if d_words is not None:
            d_words += found[1]
    if d_image is not None and rest[1] is not None:
        d_image.masked_fill_(~valid(rest[1], image.shape[1])[:, :, None], 0.0)
    return [d for d in (d_image, d_words) if d is not None]


def _image_spans(backward, image, words, cu_seqlens, region_lengths, direction, *options):
    """Cut the images so that their Gram matrices and copies fill at most a quarter of the scratch memory.

    Yields the images' slice, the blocks' arguments (image, words and for t2i the Gram matrices) and the blocks.
    """
    (I, R, D), op = image.shape, "cross_attention_score"
    edge = bounds(cu_seqlens, words.shape[0], op)
    region_counts(region_lengths, image, op)
    work, device = work_dtype(image), image.device
    entries = _recompute.tile_bytes(device, backward) // (COPIES * work.itemsize)
    function = partial(_score, direction, *options)
    each = work.itemsize * R * (R + D)  # an image's Gram matrix, and its copy where it is masked or widened
    for images in spans(I, max(1, scratch_bytes(device) // (4 * each))):
        part, lengths = image[images], None if region_lengths is None else region_lengths[images]
        if lengths is not None:
            part = part.masked_fill(~valid(lengths, R)[:, :, None], 0.0)
        args: tuple[Tensor, ...] = (part, words)
        if direction == "t2i" and options[-1] != "product":
            args = (part, words, part.to(work) @ part.to(work).transpose(1, 2))
        yield images, args, _rectangles(len(part), R, edge, device, entries, lengths, function, len(args))


def _rectangles(I, R, edge, device, entries, region_lengths, function, arguments) -> Iterator[_recompute.Block]:
    for run in runs(edge, device, max(_recompute.MIN_QUERIES, entries // (8 * R))):
        for images in spans(I, max(1, entries // (R * run.length * run.size))):
            lengths = None if region_lengths is None else region_lengths[images]
            yield _recompute.Block(
                ((images,), (run.rows,), (images,))[:arguments],
                (images, run.captions),
                partial(function, run.length, lengths),
            )


def _score(
    direction, norm, scale, pool, pool_scale, weights, threshold, similarity, length, region_lengths, image, words,
    gram=None,
):  # fmt: skip
    work = work_dtype(image)
    image, caption = image.to(work), words.to(work).view(-1, length, words.shape[-1])
    mask = None if region_lengths is None else valid(region_lengths, image.shape[1])
    t2i = direction == "t2i"
    context, query = (image, caption) if t2i else (caption, image)
    masks = mask if t2i else None, None if t2i else mask
    B, (C, Q) = len(context), query.shape[:2]
    if (weights, similarity, norm) == ("hard", "product", "none"):
        r = _largest(context, query, masks[0])
    else:
        if gram is None and similarity != "product":
            gram = context @ context.transpose(1, 2)
        affinity, alpha = attention(context, query, norm, scale, *masks, weights, threshold)
        length = None
        if gram is not None:
            length = attended_norm(alpha, gram, context).view(B, C, Q)
        if similarity == "cosine":
            length = torch.linalg.vector_norm(query, dim=-1) * length
        # r_j = alpha_j . s_j / max(|q_j| |P_j|, eps)
        r = (alpha * affinity).sum(1).view(B, C, Q)
        r = r if length is None else r / length.clamp_min(_attention.EPS)
    if pool in _attention.NEGATIVE:
        r = _attention.negative(r, query, pool, pool_scale, threshold, masks[1])
        pool = "mean"
    if not t2i and mask is not None:
        if pool == "mean":
            return (r.sum(-1) / mask.sum(-1)).t()
        r = r.masked_fill(~mask, 0.0 if pool == "sum" else float("-inf"))
    score = _attention.pooled(r, pool, pool_scale, dim=-1)
    return score if t2i else score.t()


def _largest(context: Tensor, query: Tensor, context_mask: Tensor | None) -> Tensor:
    """The largest affinity of each query [C, Q, D] with the contexts [B, X, D]: [B, C, Q]."""
    affinity = (context.flatten(0, 1) @ query.flatten(0, 1).t()).view(*context.shape[:2], *query.shape[:2])
    if context_mask is not None:
        affinity = affinity.masked_fill(~context_mask[:, :, None, None], float("-inf"))
    return affinity.amax(1)
