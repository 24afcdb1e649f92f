"""Cross-attention of one pair (SCAN, section 3.1): the equations that both cross-attention ops share.

    A     = x q^T                                                        [X, Q]
    A'    = the affinity norm of A, over the queries
    alpha = softmax over the contexts of scale * A'
    P     = alpha^T x                                                    [Q, D]

Direction t2i: the queries q are the words, the contexts x the regions. i2t: the other way round.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from ..packing import kept, region_counts

DIRECTIONS = ("t2i", "i2t")
NORMS = ("softmax", "l2norm", "clipped_l2norm", "l1norm", "clipped_l1norm", "clipped", "none")
POOLS = ("lse", "max", "sum", "mean")
OUTPUTS = "score", "logit"  # of pair scorers that end in a sigmoid
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
    if torch.compiler.is_compiling() or is_fake(edge):
        return beyond_cuda(size["R"], size["D"], 0, False)
    few = torch.cuda.get_device_capability(edge.device) < TENSOR_FLOAT32
    return beyond_cuda(size["R"], size["D"], kept(edge, "longest", longest), few)


def longest(cu_seqlens: Tensor) -> int:
    """Words of the longest caption, 0 without captions."""
    return int(cu_seqlens.diff().max()) if len(cu_seqlens) > 1 else 0
