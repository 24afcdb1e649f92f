"""`cross_attention_score` in batched PyTorch: equation (3) of `ops/cross_attention_score.py`, block by block."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from ..._checks import work_dtype
from ..._workspace import scratch_bytes
from ...packing import bounds, groups, region_counts, spans
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
    for group in groups(edge, device, max(_recompute.MIN_QUERIES, entries // (8 * R))):
        words = sum(length * size for length, size in group.sets)
        for images in spans(I, max(1, entries // (R * words))):
            lengths = None if region_lengths is None else region_lengths[images]
            yield _recompute.Block(
                ((images,), (group.rows,), (images,))[:arguments],
                (images, group.captions),
                partial(function, group.sets, lengths),
            )


def _score(
    direction, norm, scale, pool, pool_scale, weights, threshold, similarity, sets, region_lengths, image, words,
    gram=None,
):  # fmt: skip
    """Scores [b, c] of images [b, R, D] and `sets` of (length, how many) captions."""
    work = work_dtype(image)
    image, words = image.to(work), words.to(work)
    mask = None if region_lengths is None else valid(region_lengths, image.shape[1])
    similar = partial(_similarities, norm, scale, weights, threshold, similarity)
    pooled = partial(_pooled, pool, pool_scale, threshold)
    counts, (b, R, D) = [length * size for length, size in sets], image.shape
    regions, captions = image.reshape(b * R, D), [c.view(-1, n, D) for c, (n, _) in zip(words.split(counts), sets)]
    if direction == "t2i":
        r = similar((regions @ words.t()).view(b, R, -1), image, words, sets, gram, mask, None)
        parts = zip(r.split(counts, 1), captions)
        scores = [pooled(part.view(b, *caption.shape[:2]), caption, None) for part, caption in parts]
    else:
        scores = []
        for affinity, caption in zip((words @ regions.t()).split(counts), captions):
            affinity = affinity.view(*caption.shape[:2], b * R)
            r = similar(affinity, caption, regions, [(R, b)], None, None, mask)
            scores.append(pooled(r.view(-1, b, R), image, mask).t())
    return scores[0] if len(scores) == 1 else torch.cat(scores, 1)


def _similarities(
    norm, scale, weights, threshold, similarity, affinity, context, query, sets, gram, context_mask, query_mask
):  # fmt: skip
    """r_j of (1), [B, Q], of queries [Q, D] in contexts [B, X, D], from their affinities [B, X, Q]."""
    if (weights, similarity, norm) == ("hard", "product", "none"):  # r_j is the largest affinity
        if context_mask is not None:
            affinity = affinity.masked_fill(~context_mask[:, :, None], float("-inf"))
        return affinity.amax(1)
    alpha = attention(affinity, sets, norm, scale, context_mask, query_mask, weights, threshold)
    r = (alpha * affinity).sum(1)
    if similarity == "product":
        return r
    length = attended_norm(alpha, context @ context.transpose(1, 2) if gram is None else gram, context)
    if similarity == "cosine":
        length = torch.linalg.vector_norm(query, dim=-1) * length
    return r / length.clamp_min(_attention.EPS)  # alpha_j . s_j / max(|q_j| |P_j|, eps)


def _pooled(pool, pool_scale, threshold, r, query, mask) -> Tensor:
    """Scores [B, C] from r [B, C, Q] of queries [C, Q, D]; `mask` [C, Q] of the real queries, None if all are."""
    if pool in _attention.NEGATIVE:
        r = _attention.negative(r, query, pool, pool_scale, threshold, mask)
        pool = "mean"
    if mask is not None:
        if pool == "mean":
            return r.sum(-1) / mask.sum(-1)
        r = r.masked_fill(~mask, 0.0 if pool == "sum" else float("-inf"))
    return _attention.pooled(r, pool, pool_scale, dim=-1)
