"""Cross-attention of one pair (SCAN, section 3.1): the equations that both cross-attention ops share.

    A     = x q^T                                                        [X, Q]
    A'    = the affinity norm of A, over the queries
    alpha = softmax over the contexts of scale * A'
    P     = alpha^T x                                                    [Q, D]

Direction t2i: the queries q are the words, the contexts x the regions. i2t: the other way round.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

DIRECTIONS = ("t2i", "i2t")
NORMS = ("softmax", "l2norm", "clipped_l2norm", "l1norm", "clipped_l1norm", "clipped", "none")
POOLS = ("lse", "max", "sum", "mean")
SLOPE = 0.1  # the papers write ReLU; the published code clips with this slope
EPS = 1e-8
# A squared length |P|^2 or |v|^2 that is summed from terms such as alpha^T G alpha, not computed from the vector, has
# the rounding error of its largest term M: 2^-24 M in float32. Where the sum is below CANCELLED * M, that error exceeds
# 6e-5 of the result, three of its seven digits. There the backends compute it from the vector itself. The kernels
# (`_tl.py`, `attention.h`) have the same constant.
CANCELLED = 1e-3


def l2norm(x: Tensor, dim: int = -1) -> Tensor:
    """x / (|x| + 1e-8): eps outside the root, as published."""
    return x / (torch.linalg.vector_norm(x, dim=dim, keepdim=True) + EPS)


def affinity_norm(affinity: Tensor, norm: str, dim: int) -> Tensor:
    """Normalise affinities over the queries, which lie along `dim`."""
    if norm == "softmax":
        return affinity.softmax(dim)
    if norm.startswith("clipped"):
        affinity = F.leaky_relu(affinity, SLOPE)
    if norm.endswith("l2norm"):
        return l2norm(affinity, dim)
    if norm.endswith("l1norm"):
        return affinity / (affinity.abs().sum(dim, keepdim=True) + EPS)
    return affinity


def attend(query: Tensor, context: Tensor, norm: str, scale: float) -> Tensor:
    """The attended vectors P [Q, D]: for each query [Q, D] its weighted sum of the contexts [X, D]."""
    affinity = context @ query.t()
    alpha = (scale * affinity_norm(affinity, norm, dim=1)).softmax(dim=0)
    return alpha.t() @ context


def pooled(r: Tensor, pool: str, pool_scale: float, dim: int) -> Tensor:
    """Pool the cosines r of the queries, which lie along `dim`, into one score."""
    if pool == "lse":
        return (pool_scale * r).logsumexp(dim) / pool_scale
    if pool == "max":
        return r.max(dim).values
    return r.sum(dim) if pool == "sum" else r.mean(dim)


def pairs(image: Tensor, words: Tensor, edge: list[int], region_lengths: Tensor | None, op: str):
    """Yield every image's valid regions with every caption's words: one row of pairs per image."""
    counts = region_counts(region_lengths, image, op)
    for v, n in zip(image, counts, strict=True):
        yield [(v[:n], words[start:stop]) for start, stop in zip(edge, edge[1:], strict=False)]


def region_counts(region_lengths: Tensor | None, image: Tensor, op: str) -> list[int]:
    """Regions per image as Python integers.

    Raises:
        ValueError: a count lies outside 1..R.
    """
    I, R = image.shape[:2]
    if region_lengths is None:
        return [R] * I
    counts = region_lengths.tolist()
    for i, n in enumerate(counts):
        if not 1 <= n <= R:
            raise ValueError(f"{op}: region_lengths must lie in 1..{R} (R), got {n} for image {i}")
    return counts
