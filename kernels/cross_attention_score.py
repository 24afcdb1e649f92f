"""`cross_attention_score`: equations (1) to (3) of `ops/cross_attention_score.py`, and its backward (8) to (11).

For each piece of all pairs, `_affinity` computes the affinities, `_attention` the similarities r, `_pooling` the
scores. Queries are words and contexts are regions (t2i), or the other way round (i2t). A projection is a cosine with
|q| = 1; a product needs no Gram matrices.
"""

from __future__ import annotations

import torch
from torch import Tensor

from itm_fast._workspace import scratch_bytes

from . import _attention, _launch, _tiles
from ._affinity import lengths
from ._attention_backward import EACH_ROW, EACH_SET, Gradients, gram_gradient, logit_gradient
from ._norms import norm_of
from ._pooling import pool_backward, pooled

OP = "cross_attention_score"


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
    weights: str,
    threshold: float,
    similarity: str,
) -> Tensor:
    """Scores [I, T]."""
    score = image.new_empty(image.shape[0], len(cu_seqlens) - 1)
    with _launch.on(image.device):
        query, context = _launch.sets(OP, image, words, cu_seqlens, region_lengths, direction)
        length, norm = _lengths(query, similarity), norm_of(affinity_norm)
        out = score if direction == "t2i" else score.t()
        limit, each = scratch_bytes(image.device), (_attention.EACH_ROW, _attention.EACH_SET)
        pieces = _launch.pieces(query, context, *each, limit, _tiles.PIECE)
        for piece, gram in _attention.with_grams(context, pieces, similarity != "product"):
            attended = _attention.attend(
                "score", query, context, piece, gram, length, norm, scale, weights=weights, bound=scale * threshold
            )
            pooled(attended, query, piece, out, pool, pool_scale, threshold)
    return score


def _lengths(query: _launch.Sets, similarity: str) -> Tensor | None:
    """|q| of all queries as the similarity has it, [query rows] float32; None for products."""
    if similarity == "product":
        return None
    return lengths(query.rows) if similarity == "cosine" else torch.ones_like(query.rows[:, 0], dtype=torch.float32)


def backward(
    grad: Tensor,
    needs: list[bool],
    image: Tensor,
    words: Tensor,
    cu_seqlens: Tensor,
    region_lengths: Tensor | None,
    direction: str,
    affinity_norm: str,
    scale: float,
    pool: str,
    pool_scale: float,
    weights: str,
    threshold: float,
    similarity: str,
) -> list[Tensor]:
    """Float32 gradients of image and words, those that `needs` marks."""
    with _launch.on(image.device):
        image = _launch.zero_padding(image, region_lengths)
        query, context = _launch.sets(OP, image, words, cu_seqlens, region_lengths, direction)
        length, norm = _lengths(query, similarity), norm_of(affinity_norm)
        # Hard weights are constant: their gradient is 0, as with a scale of 0, whatever the norm.
        through = (norm_of("none"), 0.0) if weights == "hard" else (norm, scale)
        t2i = direction == "t2i"
        out = grad if t2i else grad.t()
        sums = Gradients(query, context, (needs[1], needs[0]) if t2i else (needs[0], needs[1]))
        limit, each = scratch_bytes(image.device), (EACH_ROW, EACH_SET)
        pieces = _launch.pieces(query, context, *each, limit, _tiles.PIECE)
        for piece, gram, m in sums.with_grams(pieces, similarity != "product"):
            attended = _attention.attend(
                "backward", query, context, piece, gram, None, norm, scale, weights=weights, bound=scale * threshold
            )
            w = pool_backward(query, piece, attended, length, out, pool, pool_scale, threshold)
            if attended.gram:
                gram_gradient(context, piece, attended, w[2], m)
            sums.add(piece, logit_gradient(query, context, piece, attended, None, w, *through))
            if sums.query is not None and similarity == "cosine":
                sums.query[piece.q].addcmul_(query.rows[piece.q], w[3].sum(1, keepdim=True))
        d_image, d_words = (sums.context, sums.query) if t2i else (sums.query, sums.context)
        return [d for d in (d_image if d_image is None else d_image.view(image.shape), d_words) if d is not None]
