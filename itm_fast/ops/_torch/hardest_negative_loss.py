"""`hardest_negative_loss` in PyTorch: the hardest negative first, its cost after, so that no cost matrix is formed."""

from __future__ import annotations

from torch import Tensor

from ..._checks import work_dtype
from .._autograd import by_autograd
from .._negatives import columns, positives


def _loss(
    score: Tensor, positive: Tensor | None, image_ids: Tensor | None, margin: float, hardest: bool, both: bool
) -> Tensor:
    work = score.to(work_dtype(score))
    negative = work.masked_fill(positives(score, positive, image_ids), float("-inf"))
    match = columns(work, positive).diagonal()
    square = columns(negative, positive)
    if hardest and score.numel():
        cost = (margin + negative.max(1).values - match).clamp_min(0)
        if both:
            cost = cost + (margin + square.max(0).values - match).clamp_min(0)
        return cost.sum().to(score.dtype)
    loss = (margin + negative - match[:, None]).clamp_min(0).sum()
    if both:
        loss = loss + (margin + square - match[None, :]).clamp_min(0).sum()
    return loss.to(score.dtype)


_autograd = by_autograd(_loss)
forward, backward = _autograd.forward, _autograd.backward
