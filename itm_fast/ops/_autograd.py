"""An implementation whose backward is torch's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor


def by_autograd(function: Callable[..., Any]) -> SimpleNamespace:
    """Make an implementation from a function alone: its backward runs the function again under autograd."""

    def backward(grad: Tensor, needs: Sequence[bool], *args: Any, results: Sequence[Tensor] = ()) -> list[Tensor]:
        with torch.enable_grad():
            args = tuple(a.detach().requires_grad_(needs[k]) if k < len(needs) else a for k, a in enumerate(args))
            result = function(*args)
            result = result if isinstance(result, Tensor) else result[0]
            wanted = [a for a, n in zip(args, needs, strict=False) if n]
            if not result.requires_grad:  # with these options the result does not depend on what needs a gradient
                return [torch.zeros_like(a) for a in wanted]
            return list(torch.autograd.grad(result, wanted, grad, materialize_grads=True))

    return SimpleNamespace(forward=function, backward=backward)
