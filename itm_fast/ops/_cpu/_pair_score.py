"""Backward of SGRAF's pair scorers, some images at a time: the nodes are made again, and the gradients of the ops that
a score is made of are put together. Equations: `ops/_pair_score.py`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..._checks import work_dtype
from ..._workspace import scratch_bytes
from ...packing import node_bounds, spans
from .._pair_score import score
from . import DTYPES, lengths

NODES = 256 << 20  # bytes of the nodes and of their gradients, of the images taken at a time


def shape(image: Tensor, caption_global: Tensor, weight: Tensor) -> tuple[int, ...]:
    """The dtype's code, I, R, T, D and S."""
    I, R, D = image.shape
    return DTYPES[image.dtype], I, R, len(caption_global), D, len(weight)


def backward(
    op: str,
    head: Callable[..., Tensor],
    grad: Tensor,
    needs: Sequence[bool],
    tensors: Sequence[Tensor],
    cu_seqlens: Tensor,
    region_lengths: Tensor | None,
    scale: float,
) -> list[Tensor]:
    """Gradients of `tensors`, the differentiable arguments in the op's order.

    `head(nodes, bounds, *parameters)` makes z [I, T, S] of nodes [I, M, S] by a differentiable op.
    """
    work = work_dtype(grad)
    tensors = [x.detach().to(work) for x in tensors]
    total = [torch.zeros_like(x) if n else None for x, n in zip(tensors, needs, strict=True)]
    I, M, S = len(tensors[0]), len(tensors[2]) + len(tensors[3]), len(tensors[4])
    edge, counts = lengths(op, tensors[0], tensors[2], cu_seqlens, region_lengths)
    most = min(NODES, scratch_bytes(grad.device)) // max(2 * M * S * work.itemsize, 1)
    for images in spans(I, max(1, most)):
        inputs = [tensors[0][images], tensors[1][images], *tensors[2:8]]
        rest = edge, None if counts is None else counts[images], scale
        nodes, inverse = torch.ops.itm_fast.similarity_nodes.default(*inputs, *rest, "cpu")
        with torch.enable_grad():
            leaf = nodes.detach().requires_grad_()
            parameters = [x.detach().requires_grad_(n) for x, n in zip(tensors[8:], needs[8:], strict=True)]
            result = score(head(leaf, node_bounds(edge), *parameters[:-2]), *parameters[-2:])
        leaves = [leaf, *(x for x in parameters if x.requires_grad)]
        d_nodes, *d_head = torch.autograd.grad(result, leaves, grad[images].to(work))
        del result
        d_inputs = (
            torch.ops.itm_fast.similarity_nodes_backward.default(
                d_nodes, needs[:8], *inputs, *rest, [nodes, inverse], "cpu"
            )
            if any(needs[:8])
            else []
        )
        found = iter([*d_inputs, *d_head])
        for k, whole in enumerate(total):
            if whole is not None:
                (whole[images] if k < 2 else whole).add_(next(found))
    return [x for x in total if x is not None]
