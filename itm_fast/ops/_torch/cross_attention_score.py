"""`cross_attention_score` in batched PyTorch: equation (3) of `ops/cross_attention_score.py`, block by block."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from itertools import groupby, pairwise

import torch
from torch import Tensor

from ..._checks import work_dtype
from ..._workspace import scratch_bytes
from ...packing import bounds, region_counts, spans, valid
from .. import _attention, _recompute
from .._declare import empty
from ._attention import attended_norm, attention
from ._groups import Padding, groups, in_order

COPIES = 6  # temporaries [R, L] of a pair that exist at once in the forward pass
Part = tuple[slice, tuple[Tensor, ...], Iterable[_recompute.Recorded]]  # images, the blocks' arguments, and the blocks


def forward(image: Tensor, words: Tensor, *rest) -> Tensor:
    score = empty("cross_attention_score", image, words, *rest)
    for images, args, blocks in _image_spans(False, image, words, *rest):
        _recompute.forward(blocks, args, score[images])
    return score


def forward_recorded(needs: list[bool], image: Tensor, words: Tensor, *rest) -> tuple[Tensor, list[Part] | None]:
    """The scores, and what autograd records where `needs` marks an argument that needs a gradient, for `backward`."""
    score = empty("cross_attention_score", image, words, *rest)
    record: list[Part] = []
    finite = True
    for images, args, blocks in _image_spans(True, image, words, *rest):
        kept = _recompute.forward_recorded(blocks, args, _wanted(needs, args), score[images])
        finite = finite and kept is not None
        record.append((images, args, kept or []))
    return score, record if finite else None


def backward(
    grad: Tensor, needs: list[bool], image: Tensor, words: Tensor, *rest, record: list[Part] | None = None
) -> list[Tensor]:
    work = work_dtype(image)
    d_image: Tensor | None = None
    d_words: Tensor | None = None
    parts: Iterable[Part] = record or (
        (images, args, _recompute.recorded(blocks, args, _wanted(needs, args)))
        for images, args, blocks in _image_spans(True, image, words, *rest)
    )
    for images, args, blocks in parts:
        wanted = _wanted(needs, args)
        places = [k for k, n in enumerate(wanted) if n]
        found = dict(zip(places, _recompute.differentiate(blocks, args, wanted, grad[images])))
        if needs[0]:
            d = found[0]
            if 2 in found:  # of G = x x^T
                d = d + (found[2] + found[2].transpose(1, 2)) @ args[0].to(work)
            if rest[1] is not None:
                d = d.masked_fill(~valid(rest[1][images], image.shape[1])[:, :, None], 0.0)
            if len(d) == len(image):
                d_image = d
            else:
                d_image = torch.empty_like(image, dtype=work) if d_image is None else d_image
                d_image[images] = d
        if needs[1]:
            d_words = found[1] if d_words is None else d_words + found[1]
    total = (d_image, image, needs[0]), (d_words, words, needs[1])
    return [torch.zeros_like(x, dtype=work) if d is None else d for d, x, need in total if need]


def _wanted(needs: list[bool], args: tuple[Tensor, ...]) -> list[bool]:
    """Which of a span's arguments need a gradient."""
    return [*needs, needs[0]][: len(args)]


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
    norm, _, pool, *_ = options
    apart = direction == "t2i" and norm in ("none", "clipped")
    copies = 2 if pool == "smoothed_negative" else R
    each = work.itemsize * R * (R + D)  # an image's Gram matrix, and its copy where it is masked or widened
    for images in spans(I, max(1, scratch_bytes(device) // (4 * each))):
        part, lengths = image[images], None if region_lengths is None else region_lengths[images]
        if lengths is not None:
            part = part.masked_fill(~valid(lengths, R)[:, :, None], 0.0)
        args: tuple[Tensor, ...] = (part, words)
        if direction == "t2i" and options[-1] != "product":
            args = (part, words, part.to(work) @ part.to(work).transpose(1, 2))
        blocks = _rectangles(len(part), R, edge, device, entries, lengths, function, len(args), apart, copies)
        yield images, args, blocks


def _rectangles(I, R, edge, device, entries, region_lengths, function, arguments, apart, copies):
    """Blocks of some images and captions of several lengths; `apart`: no norm or maximum is over one caption's words.

    Then captions need not be sorted by length, nor where this would make less than half as many sets: a few more take
    less time than copying the words. `copies`: padded captions have at most so many times a block's most words.
    """
    most = max(_recompute.MIN_QUERIES, entries // (8 * R))
    padded = copies * most  # with R, an image's cosines with padded captions take no more than its affinities
    length = [stop - start for start, stop in pairwise(edge)]
    unsorted = apart or len(list(groupby(length))) <= 2 * len(set(length))
    for group in in_order(edge, most, padded) if unsorted else groups(edge, device, most, padded):
        sizes = R * sum(length * size for length, size in group.sets)
        if len(group.sets) > 1:
            sizes += max(length for length, _ in group.sets) * sum(size for _, size in group.sets)
        padding = Padding([length for length, size in group.sets for _ in range(size)], device)
        for images in spans(I, max(1, entries // sizes)):
            lengths = None if region_lengths is None else region_lengths[images]
            yield _recompute.Block(
                ((images,), (group.rows,), (images,))[:arguments],
                (images, group.captions),
                partial(function, group.sets, padding, lengths),
            )


def _score(
    direction, norm, scale, pool, pool_scale, weights, threshold, similarity, sets, padding, region_lengths, image,
    words, gram=None,
):  # fmt: skip
    """Scores [b, c] of images [b, R, D] and `sets` of (length, how many) captions, which `padding` pads."""
    work = work_dtype(image)
    image, words = image.to(work), words.to(work)
    mask = None if region_lengths is None else valid(region_lengths, image.shape[1])
    similar = partial(_similarities, norm, scale, weights, threshold, similarity)
    counts, (b, R, D) = [length * size for length, size in sets], image.shape
    regions = image.reshape(b * R, D)
    if direction == "t2i":
        r = similar((regions @ words.t()).view(b, R, -1), image, words, sets, gram, mask, None)
        return _pooled_words(pool, pool_scale, threshold, padding, r, words)
    captions = [c.view(-1, n, D) for c, (n, _) in zip(words.split(counts), sets)]
    affinities = (words @ regions.t()).split(counts)
    each = ((affinity.view(*caption.shape[:2], b * R), caption) for affinity, caption in zip(affinities, captions))
    r = torch.cat([similar(affinity, caption, regions, [(R, b)], None, None, mask) for affinity, caption in each])
    return _pooled(pool, pool_scale, threshold, r.view(-1, b, R), image, mask).t()


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


def _pooled_words(pool, pool_scale, threshold, padding, r, words) -> Tensor:
    """Scores [B, C] from r [B, Q] of the words [Q, D] of captions, which are padded to the longest."""
    if pool == "smoothed_negative":
        r = _attention.negative(padding(r), padding(words.detach()[None])[0], pool, pool_scale, threshold, padding.real)
        return r.sum(-1) / padding.counts
    if pool == "negative":
        r, pool = _attention.negative(r, words, pool, pool_scale, threshold), "mean"
    if pool == "mean":
        return padding(r).sum(-1) / padding.counts
    return _attention.pooled(padding(r, 0.0 if pool == "sum" else float("-inf")), pool, pool_scale, dim=-1)
