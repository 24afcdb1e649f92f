"""What every op shares: its schema, its fake, its autograd rule and the call of the chosen backend.

An implementation offers `forward(*args) -> Tensor | tuple` and `backward(grad, needs, *args) -> list[Tensor]`, one
gradient for each differentiable argument that `needs` marks, in the dtype it was summed in. It is imported only when
it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .._backends import OFFERS
from .._workspace import current_gib, workspace
from . import _pairs


class Op:
    """One op of `torch.ops.itm_fast`, differentiable in its first arguments.

    Args:
        name: the op's stem.
        schema: its arguments in torch's schema language, the differentiable ones first; `backend` is added.
        returns: its results. Only the first one carries gradients.
        offered: the backends that exist, best first.
        differentiable: how many of the first arguments may need a gradient.
        implementation: backend -> object with forward and backward.
        fake: the arguments -> empty results of the right shapes.
        pairs: for an op whose result is the score of every pair, its arguments' first dimensions; see `_pairs`.
        keeps: backward is also given the results, as `results=`, which are kept until then; `fake` is told the
            backend, for what a backend keeps for itself is its own affair.
    """

    def __init__(
        self,
        name: str,
        schema: str,
        returns: str,
        *,
        offered: tuple[str, ...],
        differentiable: int,
        implementation: Callable[[str], Any],
        fake: Callable[..., Any],
        pairs: str | None = None,
        keeps: bool = False,
    ) -> None:
        OFFERS[name] = offered
        forward, backward = f"itm_fast::{name}", f"itm_fast::{name}_backward"
        torch.library.define(forward, f"({schema}, str backend) -> {returns}")
        kept = ", Tensor[] results" if keeps else ""
        torch.library.define(backward, f"(Tensor grad, bool[] needs, {schema}{kept}, str backend) -> Tensor[]")

        @torch.library.impl(forward, "CompositeExplicitAutograd")
        def _forward(*args):
            # Autocast has chosen the inputs' dtype by now; what is computed from them keeps the op's own precision.
            with torch.autocast(args[0].device.type, enabled=False):
                return implementation(args[-1]).forward(*args[:-1])

        @torch.library.impl(backward, "CompositeExplicitAutograd")
        def _backward(grad, needs, *args):
            with torch.autocast(args[0].device.type, enabled=False):
                dense = implementation(args[-1]).backward
                if keeps:
                    found = dense(grad, needs, *args[:-2], results=args[-2])
                elif pairs is None:
                    found = dense(grad, needs, *args[:-1])
                else:
                    found = _pairs.backward(dense, pairs, grad, needs, args[:-1])
            wanted = [a for a, n in zip(args, needs, strict=False) if n]
            return [g.to(a.dtype).contiguous() for g, a in zip(found, wanted, strict=True)]

        @torch.library.register_fake(forward)
        def _fake(*args):
            return fake(*args) if keeps else fake(*args[:-1])

        @torch.library.register_fake(backward)
        def _fake_backward(grad, needs, *args):
            return [a.new_empty(a.shape) for a, n in zip(args[:differentiable], needs, strict=True) if n]

        op_backward = getattr(torch.ops.itm_fast, f"{name}_backward").default

        def setup_context(ctx, inputs, output):
            if not isinstance(output, Tensor):
                ctx.mark_non_differentiable(*output[1:])
            ctx.scratch = current_gib()  # autograd may run backward on a thread that does not see the context
            ctx.is_tensor = [isinstance(a, Tensor) for a in inputs]
            ctx.save_for_backward(*(a for a in inputs if isinstance(a, Tensor)), *(output if keeps else ()))
            ctx.rest = [a for a in inputs if not isinstance(a, Tensor)]

        def differentiate(ctx, grad, *_):
            if torch.is_grad_enabled():
                raise NotImplementedError(
                    f"{name} has no second derivative; differentiate it without create_graph=True"
                )
            tensors, rest = iter(ctx.saved_tensors), iter(ctx.rest)
            args = [next(tensors) if t else next(rest) for t in ctx.is_tensor]
            needs = list(ctx.needs_input_grad[:differentiable])
            if keeps:
                args.insert(-1, list(tensors))
            with workspace(ctx.scratch):
                found = iter(op_backward(grad, needs, *args))
            return tuple(next(found) if n else None for n in needs) + (None,) * (len(ctx.is_tensor) - differentiable)

        torch.library.register_autograd(forward, differentiate, setup_context=setup_context)
        self.call = getattr(torch.ops.itm_fast, name).default

    def __call__(self, *args: Any) -> Any:
        return self.call(*args)


def by_autograd(function: Callable[..., Any]) -> SimpleNamespace:
    """An implementation whose backward is torch's own: the function is run again and differentiated."""

    def backward(grad: Tensor, needs: Sequence[bool], *args: Any, results: Sequence[Tensor] = ()) -> list[Tensor]:
        with torch.enable_grad():
            args = tuple(a.detach().requires_grad_(needs[k]) if k < len(needs) else a for k, a in enumerate(args))
            result = function(*args)
            result = result if isinstance(result, Tensor) else result[0]
            wanted = [a for a, n in zip(args, needs, strict=False) if n]
            if not result.requires_grad:  # the options leave out all that needs a gradient
                return [torch.zeros_like(a) for a in wanted]
            return list(torch.autograd.grad(result, wanted, grad, materialize_grads=True))

    return SimpleNamespace(forward=function, backward=backward)
