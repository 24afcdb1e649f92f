"""`similarity_graph` in C++: csrc/cpu/similarity_graph*.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _native
from ..._checks import work_dtype
from ...packing import bounds
from .._declare import empty
from . import DTYPES, bfloat16_products


def forward(nodes: Tensor, *rest: Tensor) -> Tensor:
    result = empty("similarity_graph", nodes, *rest)
    _native.call("similarity_graph", *_arguments(nodes, *rest), result, torch.get_num_threads())
    return result


def backward(grad: Tensor, needs: list[bool], nodes: Tensor, *rest: Tensor) -> list[Tensor]:
    *weights, _ = rest
    d_nodes = nodes.new_empty(nodes.shape) if needs[0] else None
    found = [torch.zeros(w.shape, dtype=work_dtype(w)) for w in weights] if any(needs[1:]) else [None] * 6
    Wq, bq, Wk, _, Wr, br = found
    _native.call(
        "similarity_graph_backward",
        *_arguments(nodes, *rest),
        grad.contiguous(),
        d_nodes,
        *(Wq, bq, Wk, Wr, br),
        torch.get_num_threads(),
    )
    return [d for d, n in zip((d_nodes, *found), needs, strict=True) if n]


def _arguments(nodes, query_weight, query_bias, key_weight, key_bias, value_weight, value_bias, cu_seqlens):
    """What both functions take first, in their order; the bounds are checked, for C++ reads wherever they point."""
    (I, M, S), edge = nodes.shape, bounds(cu_seqlens, nodes.shape[1], "similarity_graph")
    tensors = nodes, query_weight, query_bias, key_weight, value_weight, value_bias
    return (
        *(a.contiguous() for a in tensors),
        DTYPES[nodes.dtype],
        *(I, M, S, len(query_weight), len(edge) - 1),
        torch.tensor(edge, dtype=torch.int64),
        bfloat16_products(nodes.dtype),
    )
