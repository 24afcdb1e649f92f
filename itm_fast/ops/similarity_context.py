"""Add context nodes to every pair's similarity vectors, level by level, from assignments that are learned.

For one pair with the global node `overall` [S] and local nodes X [L, S] it equals this program:

    nodes = [overall[None], X]
    for Wa in assignment.split(sizes): X = (X @ Wa.T).softmax(0).T @ X; nodes.append(X)
    result = torch.cat(nodes)

Forward, level l = 1, 2, ... with X^0 the local nodes and W_l [c_l, S] the rows of the assignment that are its own:

    A^l = softmax over the nodes of X^{l-1} W_l^T,     X^l = A^l^T X^{l-1}                         (1)
    result = [s_g; X^0; X^1; ...]                                                               (2)

This is the context of TSHSR's hierarchical similarity reasoning, reconstructed from the paper's abstract: the
equations are not public to us.

Backward of a level, d X^l being what comes from the result and from level l + 1:

    d A = X^{l-1} d X^l^T,   d Z = A (d A - sum over the nodes of A d A)                        (3)
    d X^{l-1} += A d X^l + d Z W_l,   d W_l = d Z^T X^{l-1}                                     (4)

Saved for backward: the inputs. Everything per pair is computed again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._backends import resolve
from .._checks import Arguments, autocast
from ..packing import bounds
from ._op import Op, by_autograd

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
    empty = _fake(overall, local, assignment, cu_seqlens, sizes)
    return (overall.sum() + local.sum() + assignment.sum()) * torch.zeros_like(empty)


def _fake(overall, local, assignment, *_):
    (I, T, S), N = overall.shape, local.shape[1]
    return local.new_empty(I, N + T * (1 + assignment.shape[0]), S)


def _implementation(backend: str):
    if backend == "reference":
        return by_autograd(reference)
    if backend == "triton":
        from ..kernels import similarity_context as kernels

        return kernels
    if backend == "cpu":
        from ._cpu import similarity_context as native

        return native
    from ._torch import similarity_context

    return similarity_context


_op = Op(
    "similarity_context",
    "Tensor overall, Tensor local, Tensor assignment, Tensor cu_seqlens, int[] sizes",
    "Tensor",
    offered=OFFERED,
    differentiable=3,
    implementation=_implementation,
    fake=_fake,
)


def similarity_context(
    overall: Tensor,
    local: Tensor,
    cu_seqlens: Tensor,
    assignment: Tensor,
    sizes: Sequence[int],
    *,
    backend: str | None = None,
) -> Tensor:
    """Join each pair's global node, its local nodes and the context nodes made of these.

    The result holds I x (N + T (1 + C)) x S numbers: score large sets by blocks.

    Args:
        overall: [I, T, S] the global node of every pair, float64, float32, float16 or bfloat16.
        local: [I, N, S] packed local nodes: those of image i and caption t are
            `local[i, cu_seqlens[t]:cu_seqlens[t + 1]]`. Same dtype and device as all tensors of floats.
        cu_seqlens: [T + 1] int32 or int64 bounds of the captions' local nodes, the last one N.
        assignment: [C, S], one row for every context node: the first level's, then the second's, ...
        sizes: context nodes of each level; their sum is C.
        backend: one of `OFFERED`, or None to let itm_fast choose.

    Returns:
        [I, N + T (1 + C), S], for every caption its global node, its local nodes and its context nodes level by level:
        from `cu_seqlens[t] + t * (1 + C)` on. Dtype of `local` (under autocast, autocast's).

    Raises:
        ValueError: a shape or length is wrong, or the sizes do not add up to C.
        TypeError: a dtype is wrong.
        NotImplementedError: the backend asked for cannot run here; the message says why.

    >>> import torch, itm_fast
    >>> overall, local, cu_seqlens = torch.rand(4, 2, 16), torch.rand(4, 11, 16), torch.tensor([0, 6, 11])
    >>> itm_fast.similarity_context(overall, local, cu_seqlens, torch.randn(5, 16), (4, 1)).shape
    torch.Size([4, 23, 16])
    """
    check = Arguments("similarity_context")
    check.floats(overall=(overall, "I T S"), local=(local, "I N S"), assignment=(assignment, "C S"))
    check.integers("cu_seqlens", cu_seqlens, "T+1")
    T, sizes = overall.shape[1], [int(n) for n in sizes]
    if cu_seqlens.shape[0] != T + 1:
        raise ValueError(
            f"similarity_context: cu_seqlens must be [T+1] with T = {T} as in overall, got {list(cu_seqlens.shape)}"
        )
    if sum(sizes) != assignment.shape[0] or min(sizes, default=0) < 1:
        raise ValueError(
            f"similarity_context: sizes must be positive and add up to the {assignment.shape[0]} rows of assignment, "
            f"got {sizes}"
        )
    name = resolve(check.op, backend, local.device, local.dtype)
    return _op(*autocast(overall, local, assignment), cu_seqlens, sizes, name)
