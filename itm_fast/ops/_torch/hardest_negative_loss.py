"""`hardest_negative_loss` in PyTorch: the hardest negative first, its cost after, so that no cost matrix is formed."""

from __future__ import annotations

from torch import Tensor

from ..._checks import work_dtype
from .._autograd import by_autograd
from .._negatives import positives


def _loss(score: Tensor, image_ids: Tensor | None, margin: float, hardest: bool) -> Tensor:
    work = score.to(work_dtype(score))
    negative = work.masked_fill(positives(score, image_ids), float("-inf"))
    match = work.diagonal()
    if hardest and len(score):
        cost = (margin + negative.max(1).values - match).clamp_min(0) + (
            margin + negative.max(0).values - match
        ).clamp_min(0)
    else:
        cost = (margin + negative - match[:, None]).clamp_min(0) + (margin + negative - match[None, :]).clamp_min(0)
    return cost.sum().to(score.dtype)


_autograd = by_autograd(_loss)
forward, backward = _autograd.forward, _autograd.backward
