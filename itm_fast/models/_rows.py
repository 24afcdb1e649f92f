"""Products and the sigmoid of what depends on one image, one caption or one pair alone.

While gradients are recorded they are torch's, by the faster of its libraries. Without, and where the `cpu` backend
scores, they are made in C++ (csrc/cpu/linear.cpp): a row's bits then depend on neither the rows beside it nor the
number of threads, and so a pair's score does not either.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import _native
from .._backends import requested
from .._checks import FLOATS, work_dtype
from ..ops import _cpu_calls
from ..ops._torch._linear import linear as by_torch


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Rows [..., K], weight [S, K] and bias [S] -> [..., S], as torch.nn.functional.linear.

    Raises:
        ValueError: the sizes do not fit.
    """
    K, S = x.shape[-1], len(weight)
    if weight.shape != (S, K) or (bias is not None and bias.shape != (S,)):
        sizes = " and ".join(str(list(t.shape)) for t in (weight, bias) if t is not None)
        raise ValueError(
            f"features of {K} numbers cannot be multiplied by weights {sizes}; image, words and model must agree in "
            "their sizes"
        )
    if not apart(x, weight, *(() if bias is None else (bias,))):
        return by_torch(x, weight, bias)
    return _cpu_calls.linear(x.reshape(-1, K), weight, bias).view(*x.shape[:-1], S)


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + e^-x), in float32 or better; torch's own rounds otherwise at the end of a tensor than within."""
    return (1 / (1 + (-x.to(work_dtype(x))).exp())).to(x.dtype) if apart(x) else x.sigmoid()


def apart(*tensors: Tensor) -> bool:
    """Whether rows are to be kept apart: the `cpu` backend scores these tensors, and nothing is differentiated."""
    return (
        not torch.compiler.is_compiling()
        and not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors))
        and not torch.is_autocast_enabled("cpu")
        and all(x.device.type == "cpu" and x.dtype == tensors[0].dtype in FLOATS for x in tensors)
        and forward_ad._current_level < 0
        and not any(torch._C._functorch.is_functorch_wrapped_tensor(x) for x in tensors)  # torch.func's transforms
        and requested() in ("auto", "cpu")
        and _native.why_not() is None
    )
