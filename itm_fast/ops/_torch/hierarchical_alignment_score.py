"""`hierarchical_alignment_score` in batched PyTorch, block by block.

With scalar gates no vector of a pair is formed: (8) and (9) of `ops/hierarchical_alignment_score.py` (`_Scalar`). With
vector gates, and for pairs where a squared length from (8) is dominated by cancellation error, attended and context
vectors are formed (`_Explicit`). Inside a block the order is [C, B, R, L]: captions of one length, images, regions,
words.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._checks import work_dtype
from ...packing import bounds, region_counts, runs, spans, valid
from .. import _attention, _recompute
from .._declare import empty

COPIES = 8  # temporaries [R, L] of a pair that exist at once in the forward pass
ROWS = 4  # temporaries [D] of each region or word of a pair, with vector gates
TILES = 2  # of `_recompute.tile_bytes`, forward


class Options(NamedTuple):
    """The op's last arguments."""

    direction: str
    scale: float
    pool: str
    local_mix: float
    global_mix: float

    def mixed(self, of_image: Tensor | None, of_caption: Tensor | None, mix: float) -> Tensor:
        if of_image is None or of_caption is None:
            found = of_image if of_caption is None else of_caption
            assert found is not None
            return found
        return mix * of_image + (1 - mix) * of_caption


def forward(image: Tensor, *args) -> Tensor:
    score = empty("hierarchical_alignment_score", image, *args)
    return _recompute.forward(_cut(False, image, *args), (image, *args[:7]), score)


def backward(grad: Tensor, needs: list[bool], *args) -> list[Tensor]:
    return _recompute.backward(_cut(True, *args), args[:8], needs, grad)


def _cut(backward, image, image_key, image_gate, words, *rest) -> Iterator[_recompute.Block]:
    *_, cu_seqlens, region_lengths, direction, scale, pool, local_mix, global_mix = rest
    (I, R, D), op = image.shape, "hierarchical_alignment_score"
    edge = bounds(cu_seqlens, len(words), op)
    region_counts(region_lengths, image, op)
    options = Options(direction, scale, pool, local_mix, global_mix)
    vector = image_gate.shape[3] > 1
    limit = _recompute.tile_bytes(image.device, backward, 1 if backward else TILES) // work_dtype(image).itemsize
    for run in runs(edge, image.device, _recompute.MIN_QUERIES):
        pair = COPIES * R * run.length
        if vector:
            pair += ROWS * D * (R * (direction != "t2i") + run.length * (direction != "i2t"))
        each = run.size * pair + R * (R + 2 * D)
        for images in spans(I, max(1, limit // each)):
            lengths = None if region_lengths is None else region_lengths[images]
            yield _recompute.Block(
                ((images,), (images,), (images,), (run.rows,), (run.rows,), (run.rows,), (), ()),
                (images, run.captions),
                partial(_score, options, run.length, lengths),
            )


def _score(
    options: Options, length, region_lengths, image, image_key, image_gate, words, word_key, word_gate, *pools
) -> Tensor:
    """Scores [B, C] of images [B, R, D] and captions of one length [C * L, D]."""
    work = work_dtype(image)
    image, image_key, image_gate = (x.to(work) for x in (image, image_key, image_gate))
    caption, word_key, word_gate = (x.to(work).unflatten(0, (-1, length)) for x in (words, word_key, word_gate))
    pools = tuple(x.to(work) for x in pools)
    real = None
    if region_lengths is not None:
        real = valid(region_lengths, image.shape[1])
        image, image_key = (x.masked_fill(~real[:, :, None], 0.0) for x in (image, image_key))
        image_gate = image_gate.masked_fill(~real[:, :, None, None], 0.0)
    logits = options.scale * _products(image_key, word_key)
    rest = caption, image_gate, word_gate, real
    if image_gate.shape[3] > 1:
        return _Explicit(options, logits, image, *rest).score(*pools).t()
    pairs = _Scalar(options, logits, image, *rest)
    score = pairs.score(*pools)
    if pairs.poor.any():
        score = torch.stack(list(_replaced(score, pairs, logits, image, *rest, *pools)), 1)
    return score.t()


def _replaced(score, pairs, logits, image, caption, image_gate, word_gate, real, *pools) -> Iterator[Tensor]:
    """The scores [C] of every image; those of pairs marked `poor` are computed again by `_Explicit`."""
    for b, (one, poor) in enumerate(zip(score.unbind(1), pairs.poor.unbind(1))):
        if poor.any():
            at, c = slice(b, b + 1), poor.nonzero().flatten()
            rest = caption[c], image_gate[at], word_gate[c], None if real is None else real[at]
            exact = _Explicit(pairs.options, logits[c, at], image[at], *rest).score(*pools)[:, 0]
            one = one.index_copy(0, c, exact)
        yield one


def _products(image: Tensor, caption: Tensor) -> Tensor:
    """[B, R, D] and [C, L, D] -> [C, B, R, L]."""
    (B, R, D), (C, L, _) = image.shape, caption.shape
    return (image.reshape(B * R, D) @ caption.reshape(C * L, D).t()).view(B, R, C, L).permute(2, 0, 1, 3).contiguous()


def _quadratic(x: Tensor, gram: Tensor) -> tuple[Tensor, Tensor]:
    """G x and x . G x of [..., n, K] with [..., K, K]."""
    product = x @ gram
    return product, (product * x).sum(-1)


def _cosine(dot: Tensor, square_a: Tensor, square_b: Tensor) -> Tensor:
    return dot / (_root(square_a) * _root(square_b)).clamp_min(_attention.EPS)


def _root(square: Tensor) -> Tensor:
    return square.clamp_min(torch.finfo(square.dtype).tiny).sqrt()


class _Pairs:
    """What scalar and vector gates share: the masked softmaxes and poolings over regions and words."""

    def __init__(self, options, logits, image, caption, image_gate, word_gate, real) -> None:
        self.options, self.image, self.caption, self.real = options, image, caption, real
        self.image_gate, self.word_gate = image_gate, word_gate
        self.alpha = logits.softmax(3) if options.direction != "t2i" else None  # [C, B, R, L]
        self.beta = None
        if options.direction != "i2t":
            self.beta = self.over_regions(logits.transpose(2, 3))  # [C, B, L, R]
        self.image_norm = torch.linalg.vector_norm(image, dim=-1)  # [B, R]
        self.word_norm = torch.linalg.vector_norm(caption, dim=-1)[:, None]  # [C, 1, L]

    def over_regions(self, logits: Tensor) -> Tensor:
        """Softmax over the last dimension, regions of [C, B, ..., R]."""
        if self.real is not None:
            real = self.real.view(len(self.real), *[1] * (logits.dim() - 3), -1)
            logits = logits.masked_fill(~real, float("-inf"))
        return logits.softmax(-1)

    def pooled_regions(self, r: Tensor) -> Tensor:
        """Sum or mean of cosines [C, B, R]; padding regions are rows of zeros, so their cosines are zero."""
        return r.sum(-1) if self.options.pool == "sum" else r.sum(-1) / self.counts()

    def pooled_words(self, r: Tensor) -> Tensor:
        """Sum or mean of cosines [C, B, L]."""
        return r.sum(-1) if self.options.pool == "sum" else r.mean(-1)

    def counts(self) -> Tensor | int:
        """Regions of each image, [B]."""
        return self.image.shape[1] if self.real is None else self.real.sum(1)

    def mean_weights(self) -> Tensor:
        """Weights [B, R] with which the sum of an image's regions is their mean."""
        if self.real is None:
            return self.image_norm.new_full(self.image_norm.shape, 1 / self.image_norm.shape[1])
        return self.real.to(self.image.dtype) / self.real.sum(1, keepdim=True)

    def cosines(self, dot: Tensor, norm: Tensor, square: Tensor) -> Tensor:
        return dot / (norm * _root(square)).clamp_min(_attention.EPS)

    def score(self, image_pool: Tensor, caption_pool: Tensor) -> Tensor:
        raise NotImplementedError

    def total(self, terms: list[Any], both: Tensor) -> Tensor:
        """(7), from the terms of r_i, r_j, v_c and t_c (None where the direction has none) and cos(v_g, t_g)."""
        options, (r_v, r_t, whole_v, whole_t) = self.options, terms
        return options.mixed(r_v, r_t, options.local_mix) + options.mixed(whole_v, whole_t, options.global_mix) + both


class _Scalar(_Pairs):
    """Scalar gates: each vector is held as its coefficients: p or s [C, B, R] of regions, q or r [C, B, L] of words."""

    def __init__(self, options, logits, image, caption, image_gate, word_gate, real) -> None:
        super().__init__(options, logits, image, caption, image_gate, word_gate, real)
        self.cross = _products(image, caption)  # [C, B, R, L]
        self.gram_v = image @ image.transpose(1, 2)  # [B, R, R]
        self.gram_t = (caption @ caption.transpose(1, 2))[:, None]  # [C, 1, L, L]
        largest_v, largest_t = self.image_norm.square().amax(1), self.word_norm.square().amax((1, 2))[:, None]
        largest = (largest_v, largest_t, torch.maximum(largest_v, largest_t))
        self.least = tuple(_attention.CANCELLED * x for x in largest)
        self.poor = torch.zeros_like(self.least[2], dtype=torch.bool)  # [C, B]

    def watched(self, square: Tensor, of: int) -> Tensor:
        """Return `square`, and mark as `poor` the pairs where it is dominated by cancellation error.

        Args:
            square: [C, B] or [C, B, n], squared lengths of combinations of rows.
            of: which rows: 0 regions, 1 words, 2 both.
        """
        low = square if square.dim() == 2 else square.amin(2)
        self.poor |= low.detach() < self.least[of].detach()
        return square

    def both(self, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        """(8): x . v_i [C, B, R] and x . t_j [C, B, L] of x = V^T p + T^T q."""
        of_v = self.by_gram_v(p) + (self.cross @ q[..., None])[..., 0]
        of_t = (p[..., None, :] @ self.cross)[..., 0, :] + (q @ self.gram_t[:, 0])
        return of_v, of_t

    def by_gram_v(self, p: Tensor) -> Tensor:
        return (p.transpose(0, 1) @ self.gram_v).transpose(0, 1)

    def score(self, image_pool: Tensor, caption_pool: Tensor) -> Tensor:
        cross = self.cross
        terms: list[Any] = [None] * 4
        if self.alpha is not None:
            alpha = self.alpha
            product, square = _quadratic(alpha, self.gram_t)
            r = self.cosines((alpha * cross).sum(-1), self.image_norm, self.watched(square, 1))
            terms[0] = self.pooled_regions(r)
            others = torch.stack([self.word_gate[:, :, 0, 0], self.caption @ image_pool], -1)[:, None]  # [C, 1, L, 2]
            attended = alpha @ others  # [C, B, R, 2]
            gate = (self.image_gate[:, :, 0, 0] + attended[..., 0]).sigmoid()
            gamma = self.over_regions(gate * (self.image @ image_pool) + (1 - gate) * attended[..., 1])
            p = gamma * gate
            q = ((gamma - p)[..., None, :] @ alpha)[..., 0, :]
            w, u = self.both(p, q)  # of v_c
            square_c = self.watched((p * w).sum(-1) + (q * u).sum(-1), 2)
            found = self.cosines(u, self.word_norm, square_c[..., None]).softmax(-1)  # of t*_c
            dot = (found * u).sum(-1)
            product, square = _quadratic(found, self.gram_t[:, 0])
            terms[2] = _cosine(dot, square_c, self.watched(square, 1))
            image_side = p, q, w, u, found, product, self.watched(square_c + 2 * dot + square, 2)
        if self.beta is not None:
            beta = self.beta
            product, square = _quadratic(beta, self.gram_v)
            r = self.cosines((beta * cross.transpose(2, 3)).sum(-1), self.word_norm, self.watched(square, 0))
            terms[1] = self.pooled_words(r)
            others = torch.stack([self.image_gate[:, :, 1, 0], self.image @ caption_pool], -1)  # [B, R, 2]
            attended = beta @ others  # [C, B, L, 2]
            gate = (self.word_gate[:, None, :, 1, 0] + attended[..., 0]).sigmoid()
            own = (self.caption @ caption_pool)[:, None]
            gamma = (gate * own + (1 - gate) * attended[..., 1]).softmax(-1)
            r = gamma * gate
            s = ((gamma - r)[..., None, :] @ beta)[..., 0, :]
            x, y = self.both(s, r)  # of t_c
            square_c = self.watched((s * x).sum(-1) + (r * y).sum(-1), 2)
            back = self.over_regions(self.cosines(x, self.image_norm, square_c[..., None]))  # of v*_c
            dot = (back * x).sum(-1)
            back_product = self.by_gram_v(back)
            square = (back * back_product).sum(-1)
            terms[3] = _cosine(dot, square_c, self.watched(square, 0))
            caption_side = s, r, x, y, back, back_product, self.watched(square_c + 2 * dot + square, 2)
        if self.alpha is None:
            m = self.mean_weights()
            _, _, x, _, _, back_product, square_t = caption_side
            square_v = self.watched(((m[:, None] @ self.gram_v)[:, 0] * m).sum(-1).expand_as(square_t), 0)
            dot = (m * (x + back_product)).sum(-1)
        elif self.beta is None:
            _, _, _, u, _, product, square_v = image_side
            square_t = self.watched(self.gram_t.mean((2, 3)).expand_as(square_v), 1)
            dot = (u + product).mean(-1)
        else:
            p, q, w, u, found, _, square_v = image_side
            s, r, x, y, back, _, square_t = caption_side
            dot = ((s + back) * w).sum(-1) + (r * u).sum(-1) + (found * y).sum(-1)
            dot = dot + (back * (cross @ found[..., None])[..., 0]).sum(-1)
        return self.total(terms, _cosine(dot, square_v, square_t))


class _Explicit(_Pairs):
    """Gates of any width: attended vectors [C, B, n, D] and context vectors [C, B, D] are formed."""

    def fused(self, local, weight, others, own, pool, softmax) -> tuple[Tensor, Tensor, Tensor]:
        """Equations (2) to (4) of one side.

        Args:
            local: [.., n, D] its rows.
            weight: [C, B, n, m] their attention over the other side's rows.
            others: [.., m, D + K] the other side's rows, each with its term of the gates.
            own: [.., n, K] its rows' terms of their own gates.
            pool: [D].
            softmax: over the last dimension, its rows.

        Returns:
            [C, B, n] dot products of rows and attended vectors, [C, B, n] squared lengths of attended vectors, and
            [C, B, D] context vectors.
        """
        attended, gate = (weight @ others).split([local.shape[-1], own.shape[-1]], -1)
        dot, square = (attended * local).sum(-1), attended.square().sum(-1)
        gate = (gate + own).sigmoid()
        fused = torch.lerp(attended, local.expand_as(attended), gate)
        context = (softmax(fused @ pool)[..., None, :] @ fused)[..., 0, :]
        return dot, square, context

    def score(self, image_pool: Tensor, caption_pool: Tensor) -> Tensor:
        terms: list[Any] = [None] * 4
        image, caption = self.image, self.caption
        image_global, caption_global = (self.mean_weights()[:, None] @ image)[None, :, 0], caption.mean(1)[:, None]
        if self.alpha is not None:
            others = torch.cat([caption, self.word_gate[:, :, 0]], 2)[:, None]  # [C, 1, L, D + K]
            own = self.image_gate[:, :, 0]
            dot, square, context = self.fused(image, self.alpha, others, own, image_pool, self.over_regions)
            terms[0] = self.pooled_regions(self.cosines(dot, self.image_norm, square))
            square = context.square().sum(-1)
            similar = self.cosines(context @ caption.transpose(1, 2), self.word_norm, square[..., None])
            found = similar.softmax(-1) @ caption
            terms[2] = _cosine((context * found).sum(-1), square, found.square().sum(-1))
            image_global = context + found
        if self.beta is not None:
            others = torch.cat([image, self.image_gate[:, :, 1]], 2)  # [B, R, D + K]
            own = self.word_gate[:, None, :, 1]
            local = caption[:, None]
            dot, square, context = self.fused(local, self.beta, others, own, caption_pool, lambda x: x.softmax(-1))
            terms[1] = self.pooled_words(self.cosines(dot, self.word_norm, square))
            square = context.square().sum(-1)
            similar = (context.transpose(0, 1) @ image.transpose(1, 2)).transpose(0, 1)
            similar = self.cosines(similar, self.image_norm, square[..., None])
            found = (self.over_regions(similar).transpose(0, 1) @ image).transpose(0, 1)
            terms[3] = _cosine((context * found).sum(-1), square, found.square().sum(-1))
            caption_global = context + found
        dot = (image_global * caption_global).sum(-1)
        both = _cosine(dot, image_global.square().sum(-1), caption_global.square().sum(-1))
        return self.total(terms, both)
