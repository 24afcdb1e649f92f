"""A linear map and a sigmoid for rows that belong to one image, one caption or one pair each.

If the `cpu` backend scores and no gradient is recorded, they run in C++ (csrc/cpu/linear.cpp). A row's bits then depend
on neither the other rows nor the number of threads, so that a pair's score does not either. Otherwise torch computes
them, with its fastest library.
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
            f"features of size {K} cannot be multiplied by weights {sizes}; image, words and model must have the same "
            "sizes"
        )
    if not apart(x, weight, *(() if bias is None else (bias,))):
        return by_torch(x, weight, bias)
    return _cpu_calls.linear(x.reshape(-1, K), weight, bias).view(*x.shape[:-1], S)


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + e^-x), in float32 or better; torch.sigmoid rounds the last elements of a tensor differently."""
    return (1 / (1 + (-x.to(work_dtype(x))).exp())).to(x.dtype) if apart(x) else x.sigmoid()


def apart(*tensors: Tensor) -> bool:
    """Whether each row is computed apart from the others: the `cpu` backend scores, and no gradient is recorded."""
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
