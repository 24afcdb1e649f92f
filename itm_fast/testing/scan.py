"""SCAN's published scoring loop (Lee et al., ECCV 2018, section 3): one caption an iteration, all images at once.

The same PyTorch operations in the same order as the authors' code, copies and `repeat` included, so that it is
both the oracle of the tests and an honest baseline of the benchmarks. Two differences, neither of which costs or
saves time: the l1 normalisations, which call an undefined function there, are x / (sum |x| + 1e-8); and a single
image or a single query keeps its axis.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def l1norm(x: Tensor, dim: int) -> Tensor:
    """x / (sum |x| + 1e-8) along `dim`."""
    return torch.div(x, torch.abs(x).sum(dim=dim, keepdim=True) + 1e-8)


def l2norm(x: Tensor, dim: int) -> Tensor:
    """x / (sqrt(sum x^2) + 1e-8) along `dim`: eps stands outside the root."""
    return torch.div(x, torch.pow(x, 2).sum(dim=dim, keepdim=True).sqrt() + 1e-8)


def cosine(x: Tensor, y: Tensor, dim: int) -> Tensor:
    """x . y / max(|x| |y|, 1e-8) along `dim`."""
    dot = torch.sum(x * y, dim)
    x_norm = torch.linalg.vector_norm(x, 2, dim)
    y_norm = torch.linalg.vector_norm(y, 2, dim)
    return dot / (x_norm * y_norm).clamp(min=1e-8)


def attend(query: Tensor, context: Tensor, affinity_norm: str, scale: float) -> Tensor:
    """Every query's weighted sum of its context: query [I, Q, D], context [I, C, D] -> [I, Q, D].

    The affinity is normalised over the queries, the attention over the context.
    """
    images, contexts = context.shape[:2]
    queries = query.shape[1]
    affinity = torch.bmm(context, torch.transpose(query, 1, 2))  # [I, C, Q]
    if affinity_norm.startswith("clipped"):
        affinity = F.leaky_relu(affinity, 0.1)
    if affinity_norm == "softmax":
        affinity = F.softmax(affinity.view(images * contexts, queries), dim=1).view(images, contexts, queries)
    elif affinity_norm in ("l2norm", "clipped_l2norm"):
        affinity = l2norm(affinity, 2)
    elif affinity_norm in ("l1norm", "clipped_l1norm"):
        affinity = l1norm(affinity, 2)
    elif affinity_norm not in ("clipped", "none"):
        raise ValueError(f"affinity_norm {affinity_norm!r} is unknown")
    weight = torch.transpose(affinity, 1, 2).contiguous().view(images * queries, contexts)
    weight = F.softmax(weight * scale, dim=1).view(images, queries, contexts)
    weight = torch.transpose(weight, 1, 2).contiguous()  # [I, C, Q]
    attended = torch.bmm(torch.transpose(context, 1, 2), weight)  # [I, D, Q]
    return torch.transpose(attended, 1, 2)


def loop(
    image: Tensor,
    caption: Tensor,
    lengths: Sequence[int] | Tensor,
    *,
    direction: str = "t2i",
    affinity_norm: str = "clipped_l2norm",
    scale: float = 9.0,
    pool: str = "lse",
    pool_scale: float = 6.0,
) -> Tensor:
    """Score every image against every caption as the authors' code does.

    Args:
        image: [I, R, D], unit rows.
        caption: [T, W, D], padded.
        lengths: T tokens per caption.
        direction: "t2i" (words attend to regions) or "i2t".
        affinity_norm: softmax, l2norm, clipped_l2norm, l1norm, clipped_l1norm, clipped or none.
        scale: inverse temperature of the attention's softmax.
        pool: lse, max, sum or mean over the queries.
        pool_scale: inverse temperature of "lse".

    Returns:
        Scores, [I, T].

    Raises:
        ValueError: `direction`, `affinity_norm` or `pool` is unknown.

    >>> loop(torch.ones(2, 3, 4), torch.ones(5, 6, 4), [6, 2, 3, 4, 5], pool="mean").shape
    torch.Size([2, 5])
    """
    if direction not in ("t2i", "i2t"):
        raise ValueError(f"direction {direction!r} is unknown: choose t2i or i2t")
    scores = []
    images = image.size(0)
    for t in range(caption.size(0)):
        words = caption[t, : int(lengths[t]), :].unsqueeze(0).contiguous()
        words = words.repeat(images, 1, 1)
        if direction == "t2i":
            attended = attend(words, image, affinity_norm, scale)
            similarity = cosine(words.contiguous(), attended.contiguous(), 2)  # [I, W]
        else:
            similarity = cosine(image, attend(image, words, affinity_norm, scale), 2)  # [I, R]
        if pool == "lse":
            similarity.mul_(pool_scale).exp_()
            similarity = torch.log(similarity.sum(dim=1, keepdim=True)) / pool_scale
        elif pool == "max":
            similarity = similarity.max(dim=1, keepdim=True)[0]
        elif pool == "sum":
            similarity = similarity.sum(dim=1, keepdim=True)
        elif pool == "mean":
            similarity = similarity.mean(dim=1, keepdim=True)
        else:
            raise ValueError(f"pool {pool!r} is unknown: choose lse, max, sum or mean")
        scores.append(similarity)
    return torch.cat(scores, 1)
