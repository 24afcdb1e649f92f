"""Scores of pairs that several ops make together, block by block, forward and backward.

Nothing of a block is kept for backward: the blocks are scored again there, and only those of pairs that have a
gradient, as `ops/_pairs.py` says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .._backends import requested, use_backend
from .._workspace import current_gib, workspace
from ..ops import _pairs
from ..ops._torch import _blocks

Cut = Callable[..., Iterator[_blocks.Block]]  # (backward, *tensors, cu_seqlens, region_lengths) -> blocks


def score(cut: Cut, axes: str, tensors: Sequence[Tensor], cu_seqlens: Tensor, region_lengths: Tensor | None) -> Tensor:
    """Scores [I, T].

    Args:
        cut: the blocks of a call; their inputs index `tensors`, their results [I, T].
        axes: what lies along the first dimension of each of `tensors`, as `ops/_pairs.py` has it; I of the first.
        tensors: what may need a gradient.
        cu_seqlens: [T + 1].
        region_lengths: [I] or None.
    """
    return _Scored.apply(cut, axes, cu_seqlens, region_lengths, *tensors)


class _Scored(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, cut: Cut, axes: str, cu_seqlens: Tensor, region_lengths: Tensor | None, *tensors: Tensor):
        ctx.cut, ctx.axes = cut, axes
        ctx.save_for_backward(*tensors, cu_seqlens, region_lengths)  # which refuses what is written to meanwhile
        ctx.chosen = requested(), current_gib()  # autograd may run backward where the context is not seen
        device = tensors[0].device.type
        ctx.autocast = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        score = tensors[0].new_empty(len(tensors[0]), len(cu_seqlens) - 1)
        return _blocks.forward(cut(False, *tensors, cu_seqlens, region_lengths), tensors, score)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor):
        (backend, gib), (enabled, dtype) = ctx.chosen, ctx.autocast
        *tensors, cu_seqlens, region_lengths = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[4:])

        def dense(grad, needs, *args):
            return _blocks.backward(ctx.cut(True, *args), args[: len(tensors)], needs, grad)

        with use_backend(backend), workspace(gib), torch.autocast(grad.device.type, dtype, enabled=enabled):
            args = *tensors, cu_seqlens, region_lengths
            found = iter(_pairs.backward(dense, f"{ctx.axes}EI", grad, needs, args))
        return None, None, None, None, *(next(found).to(x.dtype) if n else None for x, n in zip(tensors, needs))
