"""`similarity_context` in batched PyTorch: some images with captions of one length at a time."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from ..._checks import work_dtype
from ...packing import Index, Run, bounds, runs, spans
from .. import _recompute
from .._declare import empty

COPIES = 2  # temporaries [L, S] of a pair that exist at once in the forward pass


def forward(overall: Tensor, local: Tensor, assignment: Tensor, *rest) -> Tensor:
    args = overall, local, assignment
    return _recompute.forward(_cut(False, *args, *rest), args, empty("similarity_context", *args, *rest))


def backward(grad: Tensor, needs: list[bool], overall: Tensor, local: Tensor, assignment: Tensor, *rest):
    args = overall, local, assignment
    return _recompute.backward(_cut(True, *args, *rest), args, needs, grad)


def _cut(backward, overall, local, assignment, cu_seqlens, sizes) -> Iterator[_recompute.Block]:
    (I, N, S), more = local.shape, 1 + len(assignment)
    edge = bounds(cu_seqlens, N, "similarity_context")
    rows = _recompute.tile_bytes(local.device, backward) // (COPIES * S * work_dtype(local).itemsize)
    for run in runs(edge, local.device, _recompute.MIN_QUERIES):
        for images in spans(I, max(1, rows // ((run.length + more) * run.size))):
            inputs = ((images, run.captions), (images, run.rows), ())
            yield _recompute.Block(inputs, (images, _places(run, edge, more)), partial(joined, run.length, sizes))


def _places(run: Run, edge: list[int], more: int) -> Index:
    """Rows of the result that a run's nodes occupy."""
    if isinstance(run.captions, slice):
        first, last = run.captions.start, run.captions.stop
        return slice(edge[first] + first * more, edge[last] + last * more)
    start = run.rows.view(run.size, -1)[:, :1] + more * run.captions[:, None]  # type: ignore[union-attr]
    return (start + torch.arange(run.length + more, device=start.device)).flatten()


def joined(length: int, sizes: list[int], overall: Tensor, local: Tensor, assignment: Tensor) -> Tensor:
    """A block: global nodes [b, c, S], local nodes [b, c * length, S] -> [b, c * (1 + length + C), S]."""
    work = work_dtype(local)
    b, c, S = overall.shape
    X = local.to(work).reshape(b * c, length, S)
    nodes = [overall.to(work).reshape(b * c, 1, S), X]
    for weight in assignment.to(work).split(sizes):
        A = (X @ weight.t()).softmax(1)
        X = torch.bmm(A.transpose(1, 2), X)
        nodes.append(X)
    return torch.cat(nodes, 1).view(b, -1, S)
