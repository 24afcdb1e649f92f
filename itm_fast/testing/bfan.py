"""BFAN's published scoring loop (Liu et al., ACM MM 2019): one caption an iteration, all images at once.

The same PyTorch operations in the same order as the authors' code, copies and `repeat` included, so that it is both the
oracle of the tests and an honest baseline of the benchmarks. It differs where that code fails: a single image or a
single query keeps its axis, and a query whose contexts all have the same weight keeps them all, instead of 0 / 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .scan import cosine, l2norm


def attend(query: Tensor, context: Tensor, scale: float, focal_type: str) -> Tensor:
    """Every query's focal attention: query [I, Q, D], context [I, C, D] -> attended vectors [I, Q, D]."""
    images, contexts = context.shape[:2]
    queries = query.shape[1]
    affinity = l2norm(F.leaky_relu(torch.bmm(context, torch.transpose(query, 1, 2)), 0.1), 2)
    weight = torch.transpose(affinity, 1, 2).contiguous().view(images * queries, contexts)
    weight = F.softmax(weight * scale, dim=1)
    if focal_type == "equal":
        excess = weight * contexts - weight.sum(1, keepdim=True)
    elif focal_type == "prob":
        root = torch.sqrt(weight)[:, None, :]
        excess = (torch.bmm(weight[:, :, None], root) - weight[:, None, :] * root).sum(-1)
    else:
        raise ValueError(f"focal_type {focal_type!r} is unknown: choose equal or prob")
    kept = torch.where(excess > 0, torch.ones_like(weight), torch.zeros_like(weight))
    kept = torch.where(kept.sum(1, keepdim=True) > 0, kept, torch.ones_like(kept))
    weight = kept * weight
    weight = (weight / weight.sum(1, keepdim=True)).view(images, queries, contexts)
    weight = torch.transpose(weight, 1, 2).contiguous()  # [I, C, Q]
    return torch.transpose(torch.bmm(torch.transpose(context, 1, 2), weight), 1, 2)


def loop(
    state: object,
    image: Tensor,
    caption: Tensor,
    lengths: Sequence[int] | Tensor,
    *,
    lambda_softmax: float = 20.0,
    focal_type: str = "equal",
) -> Tensor:
    """Score every image against every caption as the authors' code does.

    Args:
        state: not used: the scorer has no parameters.
        image: [I, R, D], unit rows.
        caption: [T, W, D], padded.
        lengths: T tokens per caption.
        lambda_softmax: inverse temperature of the attention's softmax.
        focal_type: "equal" or "prob".

    Returns:
        Scores, [I, T].

    Raises:
        ValueError: `focal_type` is unknown.

    >>> loop({}, torch.ones(2, 3, 4), torch.ones(5, 6, 4), [6, 2, 3, 4, 5]).shape
    torch.Size([2, 5])
    """
    scores = []
    for t in range(caption.size(0)):
        words = caption[t, : int(lengths[t]), :].unsqueeze(0).contiguous()
        words = words.repeat(image.size(0), 1, 1)
        t2i = cosine(words, attend(words, image, lambda_softmax, focal_type), 2)
        i2t = cosine(image, attend(image, words, lambda_softmax, focal_type), 2)
        scores.append(t2i.mean(dim=1, keepdim=True) + i2t.mean(dim=1, keepdim=True))
    return torch.cat(scores, 1)
