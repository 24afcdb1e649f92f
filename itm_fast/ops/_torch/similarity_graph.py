"""`similarity_graph` in batched PyTorch: equation (3) of `ops/similarity_graph.py`, last step at node 0 only."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ...packing import bounds
from ..similarity_graph import _fake
from . import _blocks

COPIES = 5  # [L + 1, S] temporaries of a pair alive at once, forward


def forward(*args: Tensor) -> Tensor:
    return _blocks.forward(_cut(*args), args[:-1], _fake(*args))


def backward(grad: Tensor, needs: list[bool], *args: Tensor) -> list[Tensor]:
    return _blocks.backward(_cut(*args), args[:-1], needs, grad)


def _cut(nodes, *args):
    (I, M, S), op = nodes.shape, "similarity_graph"
    edge = bounds(args[-1], M, op)
    rows = _blocks.tile_bytes(nodes.device) // (COPIES * S * _blocks.work_dtype(nodes).itemsize)
    for run in _blocks.runs(edge, nodes.device, _blocks.MIN_QUERIES):
        for images in _blocks.spans(I, max(1, rows // (run.length * run.size))):
            inputs = ((images, run.rows), *((),) * 6)
            yield _blocks.Block(inputs, (images, run.captions), partial(_reason, run.length))


def _reason(length, nodes, Wq, bq, Wk, bk, Wr, br):
    work = _blocks.work_dtype(nodes)
    (b, _, S), K = nodes.shape, len(Wq)
    X = nodes.to(work).reshape(-1, length, S)
    Wq, bq, Wk, bk, Wr, br = (w.to(work) for w in (Wq, bq, Wk, bk, Wr, br))
    M, u = Wq.transpose(1, 2) @ Wk, (bq[:, None, :] @ Wk).squeeze(1)
    for k in range(K):
        asked = X[:, :1] if k == K - 1 else X
        Y = torch.addmm(u[k], asked.reshape(-1, S), M[k]).view_as(asked)
        E = torch.bmm(Y, X.transpose(1, 2)).softmax(-1)
        Z = torch.bmm(E, X)
        X = torch.addmm(br[k], Z.view(-1, S), Wr[k].t()).relu_().view_as(Z)
    return X.view(b, -1, S) + 0 * bk.sum()
