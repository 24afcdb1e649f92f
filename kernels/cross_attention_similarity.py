"""`cross_attention_similarity`: equations (1) to (7) of `ops/cross_attention_similarity.py`.

For each piece of all pairs, `_attention` computes alpha, and one pass of `_projection` over D computes the rest.
Queries are words and contexts are regions (t2i), or the other way round (i2t).
"""

from __future__ import annotations

import torch
from torch import Tensor

from itm_fast._workspace import scratch_bytes

from . import _attention, _launch, _tiles
from ._attention_backward import EACH_ROW, EACH_SET, Gradients, coefficients, gram_gradient, logit_gradient
from ._norms import norm_of
from ._pair_rows import context_products, pair_rows, weighted_sum
from ._projection import project
from ._projection_backward import difference_gradient

OP = "cross_attention_similarity"


def forward(
    image: Tensor,
    words: Tensor,
    weight: Tensor,
    bias: Tensor,
    cu_seqlens: Tensor,
    region_lengths: Tensor | None,
    direction: str,
    affinity_norm: str,
    scale: float,
) -> Tensor:
    """Similarity vectors: [I, N, S] for t2i, [I, T, R, S] for i2t."""
    (I, R, _), S, N, T = image.shape, len(weight), len(words), len(cu_seqlens) - 1
    result = image.new_empty((I, N, S) if direction == "t2i" else (I, T, R, S))
    with _launch.on(image.device):
        query, context = _launch.sets(OP, image, words, cu_seqlens, region_lengths, direction)
        weight, bias, norm = _launch.aligned(weight), _launch.aligned(bias), norm_of(affinity_norm)
        out = pair_rows(result, I, T, R, direction)
        limit, each = scratch_bytes(image.device), (_attention.EACH_ROW, _attention.EACH_SET)
        pieces = _launch.pieces(query, context, *each, limit, _tiles.PIECE)
        for piece, gram in _attention.with_grams(context, pieces):
            attended = _attention.attend("weights", query, context, piece, gram, None, norm, scale)
            project(
                query, context, piece, attended, weight, bias, out.place, result.flatten(0, -3),
                out_first=piece.contexts.start,
            )  # fmt: skip
    return result


def backward(
    grad: Tensor,
    needs: list[bool],
    image: Tensor,
    words: Tensor,
    weight: Tensor,
    bias: Tensor,
    cu_seqlens: Tensor,
    region_lengths: Tensor | None,
    direction: str,
    affinity_norm: str,
    scale: float,
) -> list[Tensor]:
    """Float32 gradients of image, words, weight and bias, those that `needs` marks."""
    S, D = weight.shape
    with _launch.on(image.device):
        image = _launch.zero_padding(image, region_lengths)
        query, context = _launch.sets(OP, image, words, cu_seqlens, region_lengths, direction)
        weight, bias, norm = _launch.aligned(weight), _launch.aligned(bias), norm_of(affinity_norm)
        out = pair_rows(_launch.aligned(grad), len(image), len(cu_seqlens) - 1, image.shape[1], direction)
        t2i = direction == "t2i"
        sums = Gradients(query, context, (needs[1], needs[0]) if t2i else (needs[0], needs[1]))
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if needs[2] else None
        d_bias = torch.zeros_like(bias, dtype=torch.float32) if needs[3] else None
        # Scratch in addition to attention's: F per context row; d y, d u and (u - q)^2 per set.
        limit, each = scratch_bytes(image.device), (EACH_ROW + 1, EACH_SET + S + 2 * D)
        for piece, gram, m in sums.with_grams(_launch.pieces(query, context, *each, limit, _tiles.PIECE)):
            attended = _attention.attend("backward", query, context, piece, gram, None, norm, scale)
            queries, sets = piece.q.stop - piece.q.start, piece.contexts.stop - piece.contexts.start
            dy = torch.empty(queries, sets, S, dtype=torch.float32, device=image.device)
            project(
                query, context, piece, attended, weight, bias, out.place, out.rows.flatten(0, -3),
                out_first=piece.contexts.start, gradient=dy,
            )  # fmt: skip
            du, squares = difference_gradient(query, context, piece, attended, weight, dy)
            if d_weight is not None:
                d_weight.addmm_(dy.view(-1, S).t(), squares.view(-1, D))
            if d_bias is not None:
                d_bias += dy.sum((0, 1))
            if sums.query is not None:
                sums.query[piece.q] -= du.sum(1)
            if sums.query is None and sums.context is None:
                continue
            w = coefficients(attended.out, 3)
            f = torch.empty_like(attended.alpha)
            context_products(context, piece, du, f, attended, w)
            if sums.context is not None:
                weighted_sum(context, piece, attended.alpha, w[1], du, sums.context)
            gram_gradient(context, piece, attended, w[2], m)
            sums.add(piece, logit_gradient(query, context, piece, attended, f, w, norm, scale))
        d_image, d_words = (sums.context, sums.query) if t2i else (sums.query, sums.context)
        d_image = None if d_image is None else d_image.view(image.shape)
        return [d for d in (d_image, d_words, d_weight, d_bias) if d is not None]
