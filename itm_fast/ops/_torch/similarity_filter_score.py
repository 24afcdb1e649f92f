"""`similarity_filter_score` in batched PyTorch: block by block, with the running statistics."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from .. import _recompute
from .._declare import empty
from . import _pair_score
from .similarity_filter import COPIES, filtered


def forward(*args) -> Tensor:
    return _recompute.forward(_cut(False, *args), args[:14], empty("similarity_filter_score", *args))


def backward(grad: Tensor, needs: list[bool], *args) -> list[Tensor]:
    return _recompute.backward(_cut(True, *args), args[:14], needs, grad)


def _cut(backward, *args):
    running_mean, running_var, cu_seqlens, region_lengths, scale, eps = args[14:]
    head = partial(_filtered, running_mean, running_var, eps)
    op = "similarity_filter_score"
    return _pair_score.cut(op, backward, head, COPIES, args[:14], cu_seqlens, region_lengths, scale)


def _filtered(running_mean, running_var, eps, *args) -> Tensor:
    return filtered(running_mean, running_var, False, eps, *args)[0]
