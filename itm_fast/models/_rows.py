"""Products and the sigmoid of what depends on one image, one caption or one pair alone.

While gradients are recorded they are torch's, by the faster of its libraries. Without, and where the `cpu` backend
scores, they are made in C++ (csrc/cpu/linear.cpp): a row's bits then depend on neither the rows beside it nor the
number of threads, and so a pair's score does not either.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _native
from .._backends import requested, why_not
from .._checks import FLOATS
from ..ops._cpu import DTYPES
from ..ops._torch._linear import linear as by_torch


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Rows [..., K], weight [S, K] and bias [S] -> [..., S], as torch.nn.functional.linear."""
    if not apart(x, weight):
        return by_torch(x, weight, bias)
    rows, K = x.reshape(-1, x.shape[-1]).contiguous(), x.shape[-1]
    result = x.new_empty(*x.shape[:-1], len(weight))
    tensors = rows, weight.contiguous(), None if bias is None else bias.contiguous()
    _native.call("linear", *tensors, DTYPES[x.dtype], len(rows), K, len(weight), result, torch.get_num_threads())
    return result


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + e^-x); torch's own rounds otherwise at the end of a tensor than within."""
    return 1 / (1 + (-x).exp()) if apart(x) else x.sigmoid()


def apart(*tensors: Tensor) -> bool:
    """Whether rows are to be kept apart: the `cpu` backend scores these tensors, and nothing is differentiated."""
    return (
        not torch.compiler.is_compiling()
        and not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors))
        and not torch.is_autocast_enabled("cpu")
        and all(x.device.type == "cpu" and x.dtype == tensors[0].dtype in FLOATS for x in tensors)
        and requested() in ("auto", "cpu")
        and why_not("cpu") is None
    )
