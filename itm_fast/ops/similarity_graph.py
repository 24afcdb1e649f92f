"""Similarity graph reasoning over the nodes of every pair, read out at the global node (SGRAF's SGR, equations 5 to 7).

For one pair with nodes X [L + 1, S], global node first, it equals this program:

    for k in range(K): X = ((X @ Wq[k].T + bq[k]) @ (X @ Wk[k].T + bk[k]).T).softmax(1) @ X @ Wr[k].T + br[k]; X.relu_()
    result = X[0]

Forward, step k:

    Q = X Wq^T + bq,   K = X Wk^T + bk,   E = softmax of each row of Q K^T                      (1)
    X <- relu((E X) Wr^T + br)                                                                  (2)

No scale, mask, residual or normalisation. Terms of Q K^T that are constant along a row do not change its softmax, so

    E = softmax of each row of (X M + u) X^T   with M = Wq^T Wk,   u = Wk^T bq                  (3)

bk has no effect, one product replaces two, and the last step is needed at node 0 only.

Backward of a step from X to X', with Z = E X, Y = X M + u, L = Y X^T, and d H = d X' where X' > 0, else 0:

    d Wr = dH^T Z,   d br = sum dH,   d Z = dH Wr                                               (4)
    d E = dZ X^T,    d L = E (d E - sum along the row of E d E)                                 (5)
    d Y = dL X,      d X = E^T dZ + dL^T Y + dY M^T,   d M = X^T dY,   d u = sum dY             (6)
    d Wq = Wk dM^T,  d Wk = Wq dM + bq du^T,   d bq = Wk du,   d bk = 0                         (7)

Saved for backward: the inputs, and in `torch`, of a call with few pairs, what autograd records. Everything else per
pair is computed again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._names import Backend
from ..packing import bounds
from . import _draws
from ._declare import Floats, Given, Integers, Result
from ._kept import Recording
from ._register import Op

OFFERED = ("triton", "cpu", "torch", "reference")


def reference(
    nodes: Tensor,
    query_weight: Tensor,
    query_bias: Tensor,
    key_weight: Tensor,
    key_bias: Tensor,
    value_weight: Tensor,
    value_bias: Tensor,
    cu_seqlens: Tensor,
) -> Tensor:
    """(1) and (2), pair by pair."""
    edge = bounds(cu_seqlens, nodes.shape[1], "similarity_graph")
    steps = list(zip(query_weight, query_bias, key_weight, key_bias, value_weight, value_bias, strict=True))
    result = []
    for image in nodes:
        for start, stop in zip(edge, edge[1:], strict=False):
            X = image[start:stop]
            for Wq, bq, Wk, bk, Wr, br in steps:
                E = ((X @ Wq.t() + bq) @ (X @ Wk.t() + bk).t()).softmax(1)
                X = ((E @ X) @ Wr.t() + br).relu()
            result.append(X[0])
    shape = nodes.shape[0], len(edge) - 1, nodes.shape[2]
    if result:
        return torch.stack(result).view(shape)
    return sum(w.sum() for w in (nodes, *(w for step in steps for w in step))) * nodes.new_zeros(shape)


PARAMETERS = (
    Floats("query_weight", "K S S"),
    Floats("query_bias", "K S"),
    Floats("key_weight", "K S S"),
    Floats("key_bias", "K S"),
    Floats("value_weight", "K S S"),
    Floats("value_bias", "K S"),
)


def refuse(size: dict[str, int], given: Given) -> str | None:
    return None if size["K"] else "the number of steps K must be more than 0 and finite, got 0"


_op = Op(
    "similarity_graph",
    [Floats("nodes", "I M S"), *PARAMETERS, Integers("cu_seqlens", "T+1")],
    [Result("z", "I T S")],
    offered=OFFERED,
    reference=reference,
    examples=[lambda size, draw: [*_draws.nodes(size, draw), *_draws.graph_weights(size, draw)]],
    refuse=refuse,
    # In batched PyTorch autograd records of each step and node three rows, and about as many edges as the longest has.
    keeping={"torch": Recording("similarity_graph", lambda size, _: 4 * size["K"] * size["I"] * size["M"] * size["S"])},
)


@_op.public
def similarity_graph(
    nodes: Tensor,
    cu_seqlens: Tensor,
    query_weight: Tensor,
    query_bias: Tensor,
    key_weight: Tensor,
    key_bias: Tensor,
    value_weight: Tensor,
    value_bias: Tensor,
    *,
    backend: Backend | None = None,
) -> Tensor:
    """Reason over each pair's graph of similarity vectors and return the global node: SGRAF's SGR.

    The global node is the first of a pair's nodes; `itm_fast.similarity_nodes` makes them.

    Args:
        nodes: [I, M, S] packed nodes: those of image i and caption t are `nodes[i, cu_seqlens[t]:cu_seqlens[t + 1]]`.
            float64, float32, float16 or bfloat16.
        cu_seqlens: [T + 1] int32 or int64 bounds of the captions' nodes, the last one M.
        query_weight: [K, S, S], one matrix per step, like the five parameters that follow.
        query_bias: [K, S].
        key_weight: [K, S, S].
        key_bias: [K, S]. It has no effect on the result, and its gradient is zero.
        value_weight: [K, S, S].
        value_bias: [K, S].
        backend: "triton", "cpu", "torch" or "reference"; None lets itm_fast choose.

    Returns:
        [I, T, S], node 0 of each pair after K steps; dtype of `nodes` (under autocast, autocast's).

    Raises:
        ValueError: a shape or length is wrong, or K is 0.
        TypeError: a dtype is wrong.
        NotImplementedError: the backend asked for cannot run here; the message says why.

    >>> import torch, itm_fast
    >>> K, S = 3, 16
    >>> W = [torch.randn(K, S, S) for _ in range(3)]
    >>> b = [torch.zeros(K, S) for _ in range(3)]
    >>> nodes, cu_seqlens = torch.rand(4, 11, S), torch.tensor([0, 6, 11])
    >>> itm_fast.similarity_graph(nodes, cu_seqlens, W[0], b[0], W[1], b[1], W[2], b[2]).shape
    torch.Size([4, 2, 16])
    """
    return _op(
        nodes=nodes, query_weight=query_weight, query_bias=query_bias, key_weight=key_weight, key_bias=key_bias,
        value_weight=value_weight, value_bias=value_bias, cu_seqlens=cu_seqlens, backend=backend,
    )  # fmt: skip
