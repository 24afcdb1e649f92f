"""Ops in C++ that keep more than inputs and results for their backward pass, where a gradient may be asked for.

What is kept is saved as autograd saves tensors, so that it is freed with the graph, and torch.utils.checkpoint and
hooks for saved tensors see it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._workspace import current_gib, workspace
from ._declare import DECLARED
from ._recompute import refuse_second


def free(kept: list[Tensor]) -> None:
    """Free the memory of kept tensors before their graph is freed, and empty the list; a later backward pass does
    without them."""
    for x in kept:
        x.untyped_storage().resize_(0)
    kept.clear()


@dataclass(frozen=True)
class Keeping:
    """A differentiable function of a registered op's arguments, in the cpu backend.

    Attributes:
        name: the op's.
        forward: (*args) -> its result, and the tensors that are kept, or none.
        backward: (grad, needs, *args, kept=...) -> the gradients that `needs` marks. It may overwrite the kept tensors,
            which are freed after it, or `free` them.
    """

    name: str
    forward: Callable[..., tuple[Tensor, list[Tensor]]]
    backward: Callable[..., list[Tensor]]

    def __call__(self, *args: Any) -> Tensor:
        return _Function.apply(self, *args)


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, op: Keeping, *args: Any) -> Tensor:
        result, kept = op.forward(*args)
        ctx.op, ctx.scratch, ctx.is_tensor = op, current_gib(), [isinstance(a, Tensor) for a in args]
        ctx.save_for_backward(*(a for a in args if isinstance(a, Tensor)), *kept)
        ctx.rest = [a for a in args if not isinstance(a, Tensor)]
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        op: Keeping = ctx.op
        refuse_second(op.name)
        tensors, rest = iter(ctx.saved_tensors), iter(ctx.rest)
        args = [next(tensors) if t else next(rest) for t in ctx.is_tensor]
        kept = [x for x in tensors if x.untyped_storage().size()]
        needs = list(ctx.needs_input_grad[1 : 1 + DECLARED[op.name].differentiable])
        with workspace(ctx.scratch), torch.autocast("cpu", enabled=False):
            try:
                found = iter(op.backward(grads[0], needs, *args, kept=kept))
            finally:
                free(kept)  # also where it failed halfway
        gradients = [next(found).to(x.dtype) if need else None for x, need in zip(args, needs)]
        return (None, *gradients, *[None] * (len(args) - len(needs)))
