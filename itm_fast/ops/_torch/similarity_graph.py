"""`similarity_graph` in batched PyTorch: equation (3) of `ops/similarity_graph.py`, last step at node 0 only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..._checks import work_dtype
from ..._folding import folded
from ...packing import bounds, runs, spans
from .. import _recompute
from .._declare import empty
from ._linear import linear

COPIES = 6  # temporaries [L + 1, S] of a pair that exist at once in the forward pass


class Folded:
    """The six weights folded into three: [M^T; Wr] [K, 2 S, S], [u; 0] [K, 2 S] and br [K, S].

    One product of the nodes X with the first then gives both X M + u and X Wr^T.

    Attributes:
        values: these three, detached.
        needs: which of them need a gradient, given which of the six do.
    """

    def __init__(self, weights: Sequence[Tensor], needs: Sequence[bool] = (False,) * 6) -> None:
        self._leaves = [w.detach().requires_grad_(n) for w, n in zip(weights, needs, strict=True)]
        with torch.enable_grad():
            self._folded = _fold(*self._leaves)
        self.values = [f.detach() for f in self._folded]
        self.needs = [f.requires_grad for f in self._folded]

    def gradients(self, found: Sequence[Tensor]) -> list[Tensor]:
        """Gradients of the weights that need one, from those of the folded weights (`found`)."""
        outputs = [f for f in self._folded if f.requires_grad]
        inputs = [x for x in self._leaves if x.requires_grad]
        return list(torch.autograd.grad(outputs, inputs, found, materialize_grads=True)) if inputs else []


def _fold(Wq: Tensor, bq: Tensor, Wk: Tensor, bk: Tensor, Wr: Tensor, br: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The folded weights. bk is added with weight zero, so that its gradient is zero and not None."""
    Wq, bq, Wk, bk, Wr, br = (w.to(work_dtype(Wq)) for w in (Wq, bq, Wk, bk, Wr, br))
    M, u = folded(Wq, bq, Wk)
    return torch.cat([M, Wr], 1), torch.cat([u, torch.zeros_like(u)], 1), br + 0 * bk


def forward(nodes: Tensor, *rest: Tensor) -> Tensor:
    *weights, cu_seqlens = rest
    args = (nodes, *Folded(weights).values)
    return _recompute.forward(_cut(False, nodes, cu_seqlens), args, empty("similarity_graph", nodes, *rest))


def forward_recorded(needs: list[bool], nodes: Tensor, *rest: Tensor) -> tuple[Tensor, Any]:
    *weights, cu_seqlens = rest
    z, folded = empty("similarity_graph", nodes, *rest), Folded(weights, needs[1:])
    args, wanted = (nodes, *folded.values), [needs[0], *folded.needs]
    kept = _recompute.forward_recorded(_cut(True, nodes, cu_seqlens), args, wanted, z)
    return z, None if kept is None else (folded, kept)


def backward(grad: Tensor, needs: list[bool], nodes: Tensor, *rest: Tensor, record: Any = None) -> list[Tensor]:
    *weights, cu_seqlens = rest
    folded, kept = record or (Folded(weights, needs[1:]), None)
    args, wanted = (nodes, *folded.values), [needs[0], *folded.needs]
    blocks = kept or _recompute.recorded(_cut(True, nodes, cu_seqlens), args, wanted)
    found = _recompute.differentiate(blocks, args, wanted, grad)
    mine = int(needs[0])
    return [*found[:mine], *folded.gradients(found[mine:])]


def _cut(backward: bool, nodes: Tensor, cu_seqlens: Tensor) -> Iterator[_recompute.Block]:
    (I, M, S), op = nodes.shape, "similarity_graph"
    edge = bounds(cu_seqlens, M, op)
    rows = _recompute.tile_bytes(nodes.device, backward) // (COPIES * S * work_dtype(nodes).itemsize)
    for run in runs(edge, nodes.device, _recompute.MIN_QUERIES):
        for images in spans(I, max(1, rows // (run.length * run.size))):
            inputs = ((images, run.rows), (), (), ())
            yield _recompute.Block(inputs, (images, run.captions), partial(reason, run.length))


def reason(length: int, nodes: Tensor, product: Tensor, shift: Tensor, br: Tensor) -> Tensor:
    """A block: nodes [b, c * length, S] and the folded weights -> [b, c, S]."""
    (b, _, S), K = nodes.shape, len(product)
    X = nodes.to(product.dtype).reshape(-1, S).view(-1, length, S)
    for k in range(K - 1):
        YH = linear(X.view(-1, S), product[k], shift[k]).view(-1, length, 2 * S)
        # E as [keys, queries]: at these lengths a softmax along the first of two dimensions is several times faster.
        E = torch.bmm(X, YH[:, :, :S].transpose(1, 2)).softmax(1)
        X = torch.baddbmm(br[k], E.transpose(1, 2), YH[:, :, S:]).relu_()  # E (X Wr^T) = (E X) Wr^T
    y = linear(X[:, 0], product[-1, :S], shift[-1, :S])
    E = torch.bmm(y[:, None], X.transpose(1, 2)).softmax(-1)
    return linear(torch.bmm(E, X).squeeze(1), product[-1, S:], br[-1]).relu_().view(b, -1, S)
