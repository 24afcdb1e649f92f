"""`similarity_filter` in C++: csrc/cpu/similarity_filter.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _native
from ...packing import bounds
from .._declare import empty
from . import DTYPES


def forward(*args) -> tuple[Tensor, Tensor, Tensor]:
    z, mean, var = empty("similarity_filter", *args)
    _native.call("similarity_filter", *_arguments(*args), z, mean, var, torch.get_num_threads())
    return z, mean, var


def backward(grad: Tensor, needs: list[bool], nodes: Tensor, *rest) -> list[Tensor]:
    S = nodes.shape[2]
    d_nodes = nodes.new_empty(nodes.shape) if needs[0] else None
    parameters = torch.zeros(S + 3, dtype=torch.float64)
    _native.call(
        "similarity_filter_backward",
        *_arguments(nodes, *rest),
        grad.contiguous(),
        d_nodes,
        parameters,
        torch.get_num_threads(),
    )
    found = d_nodes, *parameters.split([S, 1, 1, 1])
    return [d for d, n in zip(found, needs, strict=True) if n]


def _arguments(nodes, weight, bias, norm_weight, norm_bias, running_mean, running_var, cu_seqlens, training, eps):
    """What both functions take first, in their order; the bounds are checked, for C++ reads wherever they point."""
    (I, M, S), edge = nodes.shape, bounds(cu_seqlens, nodes.shape[1], "similarity_filter")
    mean, var = (x.to(torch.float64) for x in (running_mean, running_var))
    return (
        *(a.contiguous() for a in (nodes, weight, bias, norm_weight, norm_bias)),
        *(mean, var),
        DTYPES[nodes.dtype],
        *(I, M, S, len(edge) - 1),
        torch.tensor(edge, dtype=torch.int64),
        training,
        eps,
    )
