"""Query and key weights of graph reasoning, folded into one: equation (3) of `ops/similarity_graph.py`."""

from __future__ import annotations

from torch import Tensor


def folded(query_weight: Tensor, query_bias: Tensor, key_weight: Tensor) -> tuple[Tensor, Tensor]:
    """M^T [K, S, S] and u [K, S] of weights [K, S, S] and biases [K, S], computed in their dtype.

    >>> import torch
    >>> two = 2 * torch.eye(3)[None]
    >>> folded(two, torch.ones(1, 3), two)[1]
    tensor([[2., 2., 2.]])
    """
    return key_weight.transpose(1, 2) @ query_weight, (query_bias[:, None] @ key_weight).squeeze(1)


def folded_exactly(query_weight: Tensor, query_bias: Tensor, key_weight: Tensor) -> tuple[Tensor, Tensor]:
    """M^T in the weights' dtype and u in float32, computed in float64 so that folding adds no rounding error."""
    ask, shift = folded(query_weight.double(), query_bias.double(), key_weight.double())
    return ask.to(query_weight.dtype), shift.float()
