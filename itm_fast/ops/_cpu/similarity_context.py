"""`similarity_context` in C++: csrc/cpu/similarity_context.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _native
from ...packing import bounds
from .._declare import empty
from . import DTYPES


def forward(*args) -> Tensor:
    result = empty("similarity_context", *args)
    _native.call("similarity_context", *_arguments(*args), result, torch.get_num_threads())
    return result


def backward(grad: Tensor, needs: list[bool], *args) -> list[Tensor]:
    overall, local, assignment = args[:3]
    d_overall, d_local = (
        torch.empty_like(x, memory_format=torch.contiguous_format) if n else None
        for x, n in zip((overall, local), needs)
    )
    d_assignment = torch.zeros(assignment.shape, dtype=torch.float64)
    _native.call(
        "similarity_context_backward",
        *_arguments(*args),
        grad.contiguous(),
        *(d_overall, d_local, d_assignment),
        torch.get_num_threads(),
    )
    return [d for d, n in zip((d_overall, d_local, d_assignment), needs, strict=True) if n]  # type: ignore[misc]


def _arguments(overall, local, assignment, cu_seqlens, sizes):
    """What both functions take first, in their order; the bounds are checked, for C++ reads wherever they point."""
    (I, N, S), edge = local.shape, bounds(cu_seqlens, local.shape[1], "similarity_context")
    return (
        *(a.contiguous() for a in (overall, local, assignment)),
        DTYPES[local.dtype],
        *(I, N, S, len(assignment), len(edge) - 1),
        torch.tensor(edge, dtype=torch.int64),
        torch.tensor(sizes, dtype=torch.int64),
    )
