"""Ops that keep more than inputs and results for their backward pass, where a gradient may be asked for.

In C++ (`Keeping`) these are tensors, saved as autograd saves tensors, so that they are freed with the graph, and
torch.utils.checkpoint and hooks for saved tensors see them. In batched PyTorch (`Recording`) it is what autograd
records of a small call, which would take as long again to compute.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._checks import without_autocast, work_dtype
from .._workspace import current_gib, workspace
from ._declare import DECLARED
from ._recompute import recordable, refuse_second


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

    def run(self, needs: list[bool], args: Sequence[Any]) -> tuple[Tensor, list[Tensor], None]:
        return *self.forward(*args), None

    def gradients(self, grad: Tensor, needs: list[bool], args: Sequence[Any], kept: list[Tensor], _: None) -> Any:
        return self.backward(grad, needs, *args, kept=kept)


@dataclass(frozen=True)
class Recording:
    """The same in the torch backend, whose module has `forward_recorded(needs, *args) -> (result, record or None)` and
    `backward(..., record=...)`: of calls whose record is `recordable`.

    Attributes:
        name: the op's.
        entries: (sizes by letter, direction or None) -> numbers that autograd records, about.
    """

    name: str
    entries: Callable[[dict[str, int], str | None], int]

    def __call__(self, *args: Any) -> Tensor:
        op = DECLARED[self.name]
        size, direction = op.size(args), dict(zip(op.names, args)).get("direction")
        held = self.entries(size, direction) * work_dtype(args[0]).itemsize
        if not recordable(size["I"] * size["T"], held, args[0].device):
            return getattr(torch.ops.itm_fast, self.name).default(*args, "torch")
        return _Function.apply(self, *args)

    def run(self, needs: list[bool], args: Sequence[Any]) -> tuple[Tensor, list[Tensor], Any]:
        with without_autocast("cpu"):
            result, record = self._module().forward_recorded(needs, *args)
        return result, [], record

    def gradients(self, grad: Tensor, needs: list[bool], args: Sequence[Any], kept: list[Tensor], record: Any) -> Any:
        if record is None:
            return getattr(torch.ops.itm_fast, f"{self.name}_backward").default(grad, needs, *args, "torch")
        return self._module().backward(grad, needs, *args, record=record)

    def _module(self) -> Any:
        return DECLARED[self.name].implementation("torch")  # type: ignore[attr-defined]  # an `Op`


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, op: Keeping | Recording, *args: Any) -> Tensor:
        needs = list(ctx.needs_input_grad[1 : 1 + DECLARED[op.name].differentiable])
        result, kept, ctx.record = op.run(needs, args)
        ctx.op, ctx.scratch, ctx.is_tensor = op, current_gib(), [isinstance(a, Tensor) for a in args]
        ctx.save_for_backward(*(a for a in args if isinstance(a, Tensor)), *kept)
        ctx.rest = [a for a in args if not isinstance(a, Tensor)]
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        op: Keeping | Recording = ctx.op
        refuse_second(op.name)
        tensors, rest = iter(ctx.saved_tensors), iter(ctx.rest)
        args = [next(tensors) if t else next(rest) for t in ctx.is_tensor]
        kept = [x for x in tensors if x.untyped_storage().size()]
        needs = list(ctx.needs_input_grad[1 : 1 + DECLARED[op.name].differentiable])
        record, ctx.record = ctx.record, None  # autograd frees it; a second pass through the graph does without
        with workspace(ctx.scratch), without_autocast("cpu"):
            try:
                found = iter(op.gradients(grads[0], needs, args, kept, record))
            finally:
                free(kept)  # also where it failed halfway
        gradients = [next(found).to(x.dtype) if need else None for x, need in zip(args, needs)]
        return (None, *gradients, *[None] * (len(args) - len(needs)))
