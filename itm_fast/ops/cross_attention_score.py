"""Score every image with every caption by cross-attention and pooled cosines (SCAN, section 3).

For one pair it equals this program (t2i; for i2t swap `regions` and `words`):

    P = ((scale * affinity_norm(regions @ words.T, dim=1)).softmax(0)).T @ regions
    score = pool(cosine_similarity(words, P))

Forward, with Q queries q_j, contexts x, alpha and P as in `ops/_attention.py`, and lambda = pool_scale:

    r_j   = q_j . P_j / max(|q_j| |P_j|, 1e-8)      for similarity "cosine"                     (1)
            q_j . P_j / max(|P_j|, 1e-8)            for similarity "projection"
            q_j . P_j = sum_x alpha_xj A_xj         for similarity "product"
    score = log(sum_j exp(lambda r_j)) / lambda     for pool "lse"                              (2)
            max_j r_j,  sum_j r_j,  mean_j r_j      for pool "max", "sum", "mean"
            mean_j [n_j < 0] (r_j - threshold)      for pool "negative" and "smoothed_negative"

with n_j = r_j - threshold, or smoothed over queries that are alike, sum_k softmax_k(lambda q_j . q_k) (r_k - threshold)
(NAAF). With weights "hard" and similarity "product" r_j is the largest affinity: pools "sum" and "mean" are MaxSim.

Neither q_j . P_j nor |P_j| needs P: with the affinities s_j = x q_j and the contexts' Gram matrix G = x x^T,

    q_j . P_j = alpha_j . s_j,     |P_j|^2 = alpha_j^T G alpha_j                                (3)

Backward, with c_j = |q_j| |P_j| and g the gradient of a pair's score:

    d r_j   = g exp(lambda (r_j - score))           for pool "lse"                              (4)
            = g at the largest r_j, else 0;  g;  g / Q      for pool "max", "sum", "mean"
            = [n_j < 0] g / Q                               for pool "negative" and "smoothed_negative"
    d P_j   = d r_j (q_j / c_j - r_j P_j / |P_j|^2),   d q_j += d r_j (P_j / c_j - r_j q_j / |q_j|^2)   (5)
    d alpha = x dP^T;  d A' = scale * alpha (d alpha - sum_x alpha d alpha);  d A = d A' through the norm   (6)
    d x += alpha dP + dA q,    d q += dA^T x                                                    (7)

with |q_j| = 1 for "projection", and c_j = 1 without the terms of r_j for "product". The same from (3), without forming
P; p_j = |P_j|, and d c_j = 0 where c_j < 1e-8:

    d (alpha . s)_j = d r_j / max(c_j, 1e-8),   d c_j = -d r_j r_j / c_j,   d (p^2)_j = d c_j |q_j| / (2 p_j)   (8)
    d alpha_j = d (alpha . s)_j s_j + 2 d (p^2)_j G alpha_j,   d s_j = d (alpha . s)_j alpha_j + d A by (6)     (9)
    d G = sum_j d (p^2)_j alpha_j alpha_j^T                                                    (10)
    d x += d s q + 2 d G x,    d q_j += x^T d s_j + d c_j p_j q_j / |q_j|                            (11)

Saved for backward: the inputs, and in the `cpu` backend the affinities of all pairs where these take an eighth of the
workspace at most; in `torch`, of a call with few pairs, what autograd records. Everything else per pair is
computed again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .._names import AnyPool, Backend, Direction, Norm, Similarity, Weights
from ..packing import bounds
from . import _attention, _draws
from ._declare import Choice, Choosing, Floats, Integers, Number, Positive, Result
from ._kept_affinities import KEEPING
from ._register import Op

OFFERED = ("triton", "cuda", "cpu", "torch", "reference")


def reference(
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
    """(1) and (2), pair by pair."""
    op = "cross_attention_score"
    edge = bounds(cu_seqlens, words.shape[0], op)
    rows = []
    for row in _attention.pairs(image, words, edge, region_lengths, op):
        for regions, caption in row:
            query, context = (caption, regions) if direction == "t2i" else (regions, caption)
            P = _attention.attend(query, context, affinity_norm, scale, weights, threshold)
            r = _attention.similarities(query, P, similarity)
            if pool in _attention.NEGATIVE:
                rows.append(_attention.negative(r, query, pool, pool_scale, threshold).mean())
            else:
                rows.append(_attention.pooled(r, pool, pool_scale, dim=0))
    shape = image.shape[0], len(edge) - 1
    return torch.stack(rows).view(shape) if rows else (image.sum() + words.sum()) * image.new_zeros(shape)


def _refuse(size: dict[str, int], given: Mapping[str, Any]) -> str | None:
    threshold = given["threshold"]
    return None if math.isfinite(threshold) else f"threshold must be a finite number, got {threshold}"


def _too_large(backend: str, size: Mapping[str, int], given: Mapping[str, Any]) -> str | None:
    """Why the CUDA kernels cannot take a call's arguments, or None; those in Triton take all."""
    if backend == "cuda" and given["pool"] == "smoothed_negative":
        return "its kernels have no pool 'smoothed_negative'"
    return _attention.too_large(backend, size, given)


_op = Op(
    "cross_attention_score",
    [
        Floats("image", "I R D"),
        Floats("words", "N D"),
        Integers("cu_seqlens", "T+1"),
        Integers("region_lengths", "I", optional=True),
        Choice("direction", _attention.DIRECTIONS, "Direction"),
        Choice("affinity_norm", _attention.NORMS, "Norm"),
        Positive("scale"),
        Choice("pool", (*_attention.POOLS, *_attention.NEGATIVE), "Pool"),
        Positive("pool_scale", when=("pool", ("lse", "smoothed_negative"))),
        Choice("weights", _attention.WEIGHTS, "Weights"),
        Number("threshold"),
        Choice("similarity", _attention.SIMILARITIES, "Similarity"),
    ],
    [Result("score", "I T")],
    keeping=KEEPING,
    trained=Result("affinity", lambda size, given: (size["I"] * size["R"] * size["N"],), wide=True),
    offered=OFFERED,
    reference=reference,
    examples=[_draws.attention],
    choosing=Choosing(
        {
            "direction": "t2i",
            "affinity_norm": "clipped_l2norm",
            "pool": "lse",
            "weights": "softmax",
            "similarity": "cosine",
        },
        _draws.apart,
        frozenset({"weights", "similarity"}),
        {"affinity_norm": "none", "scale": 4.0, "threshold": 0.35},
        # The largest similarity of each pair lies above the threshold, the others below it.
        {("pool", pool): (_draws.standing_out, {"threshold": 0.45}) for pool in ("max", *_attention.NEGATIVE)},
    ),
    refuse=_refuse,
    too_large=_too_large,
)


@_op.public
def cross_attention_score(
    image: Tensor,
    words: Tensor,
    cu_seqlens: Tensor,
    *,
    direction: Direction = "t2i",
    affinity_norm: Norm = "clipped_l2norm",
    scale: float = 9.0,
    pool: AnyPool = "lse",
    pool_scale: float = 6.0,
    weights: Weights = "softmax",
    threshold: float = 0.0,
    similarity: Similarity = "cosine",
    region_lengths: Tensor | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """Score every image with every caption: the pair score of SCAN, and with other options of BFAN, CHAN and NAAF.

    `scale` and `pool_scale` are SCAN's lambda 1 and lambda 2. MaxSim, the mean or sum over words of the largest
    affinity with a region, is `weights="hard", similarity="product", affinity_norm="none"` with pool "mean" or "sum".

    Args:
        image: [I, R, D] region features, float64, float32, float16 or bfloat16.
        words: [N, D] packed word features, same dtype and device; see `itm_fast.pack`.
        cu_seqlens: [T + 1] int32 or int64: caption t is `words[cu_seqlens[t]:cu_seqlens[t + 1]]`.
        direction: "t2i" (words attend to regions) or "i2t" (regions attend to words).
        affinity_norm: how affinities are normalised over the queries: softmax, l2norm, clipped_l2norm, l1norm,
            clipped_l1norm, clipped or none ("clipped" is LeakyReLU with slope 0.1).
        scale: inverse temperature of the attention's softmax.
        pool: how the queries' similarities become one score: lse, max, sum or mean; or the mean of those that are below
            `threshold` ("negative"), or are so on average over similar queries ("smoothed_negative"), less `threshold`.
        pool_scale: inverse temperature of "lse" and of the smoothing; not used by the other pools.
        weights: the contexts that share the attention: softmax (all), focal_equal or focal_prob (those of more than
            average weight, BFAN), hard (the one with the largest affinity) or threshold (those with an affinity above
            `threshold`).
        threshold: a number for `weights` "threshold", where it is compared with the normalised affinities, and for the
            pools "negative" and "smoothed_negative".
        similarity: of a query q with its attended vector P: cosine, product (q . P, the attended affinity) or
            projection (q . P / |P|).
        region_lengths: [I] int32 or int64 regions of each image, from 1 to R; None means R for all.
        backend: "triton", "cuda", "cpu", "torch" or "reference"; None lets itm_fast choose.

    Returns:
        score [I, T], dtype of `image` (under autocast, autocast's).

    Raises:
        ValueError: a shape, a length or an option is wrong.
        TypeError: a dtype is wrong.
        NotImplementedError: the backend asked for cannot run here; the message says why.

    >>> import torch, itm_fast
    >>> image = torch.randn(2, 36, 64)
    >>> words, cu_seqlens = itm_fast.pack(torch.randn(3, 12, 64), [12, 5, 8])
    >>> itm_fast.cross_attention_score(image, words, cu_seqlens, direction="i2t", scale=4.0, pool="mean").shape
    torch.Size([2, 3])
    """
    return _op(
        image=image, words=words, cu_seqlens=cu_seqlens, region_lengths=region_lengths, direction=direction,
        affinity_norm=affinity_norm, scale=scale, pool=pool, pool_scale=pool_scale, weights=weights,
        threshold=threshold, similarity=similarity, backend=backend,
    )  # fmt: skip
