"""Cross-attention of one pair (SCAN, section 3.1): the equations that both cross-attention ops share.

    A     = x q^T                                                        [X, Q]
    A'    = the affinity norm of A, over the queries
    alpha = softmax over the contexts of scale * A', or over those of them that `weights` keeps
    P     = alpha^T x                                                    [Q, D]

Which contexts x of a query are kept, with a_x the softmax over all n of them; the others have alpha_x = 0:

    focal_equal   a_x > sum_y a_y / n                                 (BFAN, equal attention)
    focal_prob    sum_y (a_x - a_y) sqrt(a_y) > 0                     (BFAN, attention by probability)
    hard          A'_x is the largest; equal ones share the weight    (ColBERT's MaxSim, CHAN)
    threshold     A'_x > threshold; if there is none, alpha = 0       (NAAF)

If all a_x are equal, as with one context, the focal rules keep none, where BFAN's code divides 0 by 0; here all are
kept then. The gradient takes which contexts are kept as constant.

Direction t2i: the queries q are the words, the contexts x the regions. i2t: the other way round.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from .._checks import traced
from .._names import Direction, Negative, Norm, Output, Pool, Similarity, Weights
from ..packing import kept, region_counts

DIRECTIONS: tuple[Direction, ...] = get_args(Direction)
NORMS: tuple[Norm, ...] = get_args(Norm)
POOLS: tuple[Pool, ...] = get_args(Pool)
OUTPUTS: tuple[Output, ...] = get_args(Output)  # of pair scorers that end in a sigmoid
NEGATIVE: tuple[Negative, ...] = get_args(Negative)  # pools of `cross_attention_score` alone
WEIGHTS: tuple[Weights, ...] = get_args(Weights)
SIMILARITIES: tuple[Similarity, ...] = get_args(Similarity)
DEFAULT = ("softmax", 0.0, "cosine")  # weights, threshold and similarity of SCAN
SLOPE = 0.1  # the papers write ReLU; the published code clips with this slope
EPS = 1e-8
# A squared length |P|^2 or |v|^2 that is summed from terms such as alpha^T G alpha, not computed from the vector, has
# the rounding error of its largest term M: 2^-24 M in float32. Where the sum is below CANCELLED * M, that error exceeds
# 6e-5 of the result, three of its seven digits. There the backends compute it from the vector itself. The kernels
# (`_tl.py`, `attention.h`) have the same constant.
CANCELLED = 1e-3
# What the CUDA kernels take: regions of an image, words of a caption, and of a caption with more than NARROW regions
# where a block has 64 KiB of shared memory, as before TENSOR_FLOAT32.
REGIONS, WORDS, NARROW, FEW_WORDS = 128, 127, 72, 64
TENSOR_FLOAT32 = (8, 0)  # least compute capability for products of bfloat16 and TF32, and for 99 KiB of shared memory


def l2norm(x: Tensor, dim: int = -1) -> Tensor:
    """x / (|x| + 1e-8): eps outside the root, as published."""
    return x / (torch.linalg.vector_norm(x, dim=dim, keepdim=True) + EPS)


def clipped(norm: str) -> tuple[bool, str]:
    """Whether a norm applies the LeakyReLU first, and the norm that follows.

    >>> clipped("clipped_l2norm"), clipped("clipped"), clipped("softmax")
    ((True, 'l2norm'), (True, 'none'), (False, 'softmax'))
    """
    return norm.startswith("clipped"), norm.removeprefix("clipped").removeprefix("_") or "none"


def affinity_norm(affinity: Tensor, norm: str, dim: int) -> Tensor:
    """Normalise affinities over the queries, which lie along `dim`."""
    first, norm = clipped(norm)
    if first:
        affinity = F.leaky_relu(affinity, SLOPE)
    if norm == "softmax":
        return affinity.softmax(dim)
    if norm == "l2norm":
        return l2norm(affinity, dim)
    if norm == "l1norm":
        return affinity / (affinity.abs().sum(dim, keepdim=True) + EPS)
    return affinity


def attend(
    query: Tensor, context: Tensor, norm: str, scale: float, weights: str = "softmax", threshold: float = 0.0
) -> Tensor:
    """The attended vectors P [Q, D]: for each query [Q, D] its weighted sum of the contexts [X, D]."""
    affinity = context @ query.t()
    alpha = attention_weights(scale * affinity_norm(affinity, norm, dim=1), weights, scale * threshold, dim=0)
    return alpha.t() @ context


def attention_weights(logits: Tensor, weights: str, bound: float, dim: int) -> Tensor:
    """alpha from the logits scale * A' of the contexts, which lie along `dim`; those of masked contexts are -inf.

    `bound` is scale * threshold.
    """
    alpha = logits.softmax(dim)
    if weights == "softmax":
        return alpha
    with torch.no_grad():  # comparisons are such that NaN is kept
        if weights == "hard":
            largest = (~(logits < logits.max(dim, keepdim=True).values)).to(alpha.dtype)
            return largest / largest.sum(dim, keepdim=True)
        if weights == "threshold":
            kept = ~(logits <= bound)
        else:
            if weights == "focal_equal":
                cut = 1.0 / (logits != float("-inf")).sum(dim, keepdim=True).to(alpha.dtype)
            else:
                root = alpha.sqrt()
                cut = (alpha * root).sum(dim, keepdim=True) / root.sum(dim, keepdim=True)
            kept = ~(alpha <= cut)
            kept |= ~kept.any(dim, keepdim=True)
    chosen = alpha * kept
    total = chosen.sum(dim, keepdim=True)
    return chosen / total.masked_fill(total == 0, 1.0)


def similarities(query: Tensor, P: Tensor, similarity: str) -> Tensor:
    """r of queries [Q, D] and their attended vectors [Q, D]."""
    r = (query * P).sum(1)
    if similarity == "product":
        return r
    length = torch.linalg.vector_norm(P, dim=1)
    if similarity == "cosine":
        length = torch.linalg.vector_norm(query, dim=1) * length
    return r / length.clamp_min(EPS)


def pooled(r: Tensor, pool: str, pool_scale: float, dim: int) -> Tensor:
    """Pool the cosines r of the queries, which lie along `dim`, into one score."""
    if pool == "lse":
        return (pool_scale * r).logsumexp(dim) / pool_scale
    if pool == "max":
        return r.max(dim).values
    return r.sum(dim) if pool == "sum" else r.mean(dim)


def negative(
    r: Tensor, query: Tensor, pool: str, pool_scale: float, threshold: float, mask: Tensor | None = None
) -> Tensor:
    """What the pools of `NEGATIVE` average: r - threshold of the queries that match no context, 0 of the others.

    Args:
        r: [..., Q].
        query: [..., Q, D]; its leading dimensions are those of r, or broadcast to them.
        mask: [..., Q] of the real queries; None: all are.
    """
    r = r - threshold
    with torch.no_grad():
        smooth = r
        if pool == "smoothed_negative":
            near = pool_scale * (query @ query.transpose(-1, -2))
            if mask is not None:
                near = near.masked_fill(~mask[..., None, :], float("-inf"))
            smooth = torch.einsum("...ij,...j->...i", near.softmax(-1), r)  # matmul would copy near for each image
        kept = ~(smooth >= 0)
    return r * (kept if mask is None else kept & mask)


def pairs(image: Tensor, words: Tensor, edge: list[int], region_lengths: Tensor | None, op: str):
    """Yield every image's valid regions with every caption's words: one row of pairs per image."""
    counts = region_counts(region_lengths, image, op)
    for v, n in zip(image, counts, strict=True):
        yield [(v[:n], words[start:stop]) for start, stop in zip(edge, edge[1:], strict=False)]


def beyond_cuda(R: int, D: int, longest: int, few_words: bool) -> str | None:
    """Why no CUDA kernel takes R regions of D numbers and captions of up to `longest` words, one sentence; None if one
    does. `few_words`: whether the GPU's compute capability is below TENSOR_FLOAT32."""
    if not 1 <= R <= REGIONS:
        return f"CUDA kernels take images of 1 to {REGIONS} regions, got {R}"
    if D % 8 or not D:
        return f"CUDA kernels need D to be a multiple of 8, got {D}"
    most = FEW_WORDS if few_words and R > NARROW else WORDS
    return f"CUDA kernels take captions of at most {most} words here, got {longest}" if longest > most else None


def too_large(backend: str, size: Mapping[str, int], given: Mapping[str, Any]) -> str | None:
    """Why the CUDA kernels cannot take a call's arguments, as `beyond_cuda`; None for the other backends.

    While torch.compile traces, and of fake tensors, lengths and device are not known: then only what follows from the
    shapes is told. `resolve` leaves the rest to the call.
    """
    edge = given["cu_seqlens"]
    if backend != "cuda" or edge.device.type == "cpu":
        return None
    if traced(edge):
        return beyond_cuda(size["R"], size["D"], 0, False)
    few = torch.cuda.get_device_capability(edge.device) < TENSOR_FLOAT32
    return beyond_cuda(size["R"], size["D"], kept(edge, "longest", longest), few)


def longest(cu_seqlens: Tensor) -> int:
    """Words of the longest caption, 0 without captions."""
    return int(cu_seqlens.diff().max()) if len(cu_seqlens) > 1 else 0
