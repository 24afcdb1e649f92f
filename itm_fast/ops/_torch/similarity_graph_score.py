"""`similarity_graph_score` in batched PyTorch: block by block, with the graph's weights folded once."""

from __future__ import annotations

from torch import Tensor

from .. import _recompute
from .._declare import empty
from . import _pair_score
from .similarity_graph import COPIES, Folded, reason


def forward(*args) -> Tensor:
    folded = Folded(args[8:14])
    tensors = (*args[:8], *folded.values, *args[14:16])
    return _recompute.forward(_cut(False, tensors, args[16:]), tensors, empty("similarity_graph_score", *args))


def backward(grad: Tensor, needs: list[bool], *args) -> list[Tensor]:
    folded = Folded(args[8:14], needs[8:14])
    tensors = (*args[:8], *folded.values, *args[14:16])
    wanted = [*needs[:8], *folded.needs, *needs[14:]]
    found = _recompute.backward(_cut(True, tensors, args[16:]), tensors, wanted, grad)
    start, stop = sum(needs[:8]), sum(needs[:8]) + sum(folded.needs)
    return [*found[:start], *folded.gradients(found[start:stop]), *found[stop:]]


def _cut(backward, tensors, rest):
    return _pair_score.cut("similarity_graph_score", backward, reason, COPIES, tensors, *rest)
