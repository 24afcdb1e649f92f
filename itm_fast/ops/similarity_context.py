"""Add context nodes to every pair's similarity vectors: weighted means of its nodes, level by level (TSHSR).

For one pair with the global node `overall` [S] and local nodes X [L, S] it equals this program:

    nodes = [overall[None], X]
    for Wa in assignment.split(sizes): X = (X @ Wa.T).softmax(0).T @ X; nodes.append(X)
    result = torch.cat(nodes)

Forward, with s_g the global node and X^0 the local nodes; level l = 1, 2, ... makes c_l context nodes, sizes[l - 1],
with its own rows W_l [c_l, S] of `assignment`:

    A^l = softmax over the nodes of X^{l-1} W_l^T,     X^l = A^l^T X^{l-1}                         (1)
    result = [s_g; X^0; X^1; ...]                                                               (2)

This is our reconstruction of TSHSR's hierarchical similarity reasoning from the paper's abstract: we have no access to
its equations.

Backward of a level, where d X^l is the gradient from the result plus that from level l + 1:

    d A = X^{l-1} d X^l^T,   d Z = A (d A - sum over the nodes of A d A)                        (3)
    d X^{l-1} += A d X^l + d Z W_l,   d W_l = d Z^T X^{l-1}                                     (4)

Saved for backward: the inputs. Everything per pair is computed again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._names import Backend
from ..packing import bounds
from . import _draws
from ._declare import Counts, Floats, Given, Integers, Result, empty
from ._register import Op

OFFERED = ("triton", "cpu", "torch", "reference")


def reference(overall: Tensor, local: Tensor, assignment: Tensor, cu_seqlens: Tensor, sizes: list[int]) -> Tensor:
    """(1) and (2), pair by pair."""
    edge = bounds(cu_seqlens, local.shape[1], "similarity_context")
    rows = []
    for i in range(len(local)):
        row = [local.new_empty(0, local.shape[2])]
        for t, (start, stop) in enumerate(zip(edge, edge[1:], strict=False)):
            X = local[i, start:stop]
            row += [overall[i, t : t + 1], X]
            for weight in assignment.split(sizes):
                X = (X @ weight.t()).softmax(0).t() @ X
                row.append(X)
        rows.append(torch.cat(row))
    if rows and len(edge) > 1:
        return torch.stack(rows)
    none = empty("similarity_context", overall, local, assignment, cu_seqlens, sizes)
    return (overall.sum() + local.sum() + assignment.sum()) * torch.zeros_like(none)


def _refuse(size: dict[str, int], given: Given) -> str | None:
    sizes = [int(n) for n in given["sizes"]]
    if sum(sizes) == size["C"] and min(sizes, default=0) >= 1:
        return None
    return f"sizes must be positive and add up to the {size['C']} rows of assignment, got {sizes}"


def _example(size: _draws.Size, draw: _draws.Draw) -> list[Any]:
    T, N = len(size.lengths), sum(size.lengths)
    overall, local = (_draws.unit(draw, size.images, n, size.similarity) for n in (T, N))
    bounds = torch.tensor([0, *size.lengths]).cumsum(0).int()
    return [overall, local, bounds, 3 * draw(5, size.similarity), (4, 1)]


_op = Op(
    "similarity_context",
    [
        Floats("overall", "I T S"),
        Floats("local", "I N S"),
        Floats("assignment", "C S"),
        Integers("cu_seqlens", "T+1"),
        Counts("sizes"),
    ],
    [Result("nodes", "I N+T+T*C S")],
    offered=OFFERED,
    reference=reference,
    examples=[_example],
    refuse=_refuse,
)


@_op.public
def similarity_context(
    overall: Tensor,
    local: Tensor,
    cu_seqlens: Tensor,
    assignment: Tensor,
    sizes: Sequence[int],
    *,
    backend: Backend | None = None,
) -> Tensor:
    """Compute each pair's context nodes, and join them to its global node and its local nodes.

    The result has I x (N + T (1 + C)) x S elements, so take large sets block by block.

    Args:
        overall: [I, T, S] the global node of every pair, float64, float32, float16 or bfloat16.
        local: [I, N, S] packed local nodes: those of image i and caption t are
            `local[i, cu_seqlens[t]:cu_seqlens[t + 1]]`. All floating-point tensors have one dtype and device.
        cu_seqlens: [T + 1] int32 or int64 bounds of the captions' local nodes, the last one N.
        assignment: [C, S] learned weights, one row for every context node: the first level's, then the second's, ...
        sizes: the number of context nodes of each level; their sum is C.
        backend: "triton", "cpu", "torch" or "reference"; None lets itm_fast choose.

    Returns:
        [I, N + T (1 + C), S], dtype of `local` (under autocast, autocast's). Those of caption t begin at row
        `cu_seqlens[t] + t * (1 + C)`: its global node, its local nodes, then its context nodes level by level.

    Raises:
        ValueError: a shape or length is wrong, or the sizes do not add up to C.
        TypeError: a dtype is wrong.
        NotImplementedError: the backend asked for cannot run here; the message says why.

    >>> import torch, itm_fast
    >>> overall, local, cu_seqlens = torch.rand(4, 2, 16), torch.rand(4, 11, 16), torch.tensor([0, 6, 11])
    >>> itm_fast.similarity_context(overall, local, cu_seqlens, torch.randn(5, 16), (4, 1)).shape
    torch.Size([4, 23, 16])
    """
    return _op(overall=overall, local=local, assignment=assignment, cu_seqlens=cu_seqlens, sizes=sizes, backend=backend)
