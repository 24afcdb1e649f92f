"""Backward of SGRAF's pair scorers, some images at a time: the nodes are made again, and the gradients of the ops that
a score is made of are put together. Equations: `ops/_pair_score.py`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..._checks import work_dtype
from ..._workspace import scratch_bytes
from ...packing import node_places, spans
from .. import _attention
from .._pair_score import NORM, score
from . import DTYPES, lengths

NODES = 256 << 20  # bytes of the nodes, their gradients and one copy of each, of the images taken at a time


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
    (I, _, _), (T, _), N = tensors[0].shape, tensors[3].shape, len(tensors[2])
    S = len(tensors[4])
    edge, counts = lengths(op, tensors[0], tensors[2], cu_seqlens, region_lengths)
    place, node_edge = node_places(edge)
    each = 4 * (N + T) * S * work.itemsize
    for images in spans(I, max(1, min(NODES, scratch_bytes(grad.device)) // max(each, 1))):
        part = [tensors[0][images], tensors[1][images], *tensors[2:]]
        rest = (edge, None if counts is None else counts[images], "t2i", NORM, scale, "cpu")
        similar = [part[0], part[2], part[4], part[5]]
        local = torch.ops.itm_fast.cross_attention_similarity.default(*similar, *rest)
        with torch.enable_grad():
            globals_ = [part[k].detach().requires_grad_(needs[k]) for k in (1, 3, 6, 7)]
            overall = _overall(*globals_)
            similar_all = torch.cat([overall.detach(), local], 1)
            nodes = torch.empty_like(similar_all).index_copy_(1, place, similar_all).requires_grad_()
            parameters = [x.detach().requires_grad_(n) for x, n in zip(part[8:], needs[8:], strict=True)]
            result = score(head(nodes, node_edge, *parameters[:-2]), *parameters[-2:])
        del local, similar_all
        leaves = [nodes, *(x for x in parameters if x.requires_grad)]
        d_nodes, *found = torch.autograd.grad(result, leaves, grad[images].to(work))
        del result, nodes
        d_nodes = d_nodes.index_select(1, place)
        d_overall, d_local = d_nodes[:, :T], d_nodes[:, T:].contiguous()
        taken = [needs[k] for k in (0, 2, 4, 5)]
        d_similar = iter(
            torch.ops.itm_fast.cross_attention_similarity_backward.default(d_local, taken, *similar, *rest)
            if any(taken)
            else ()
        )
        leaves = [x for x in globals_ if x.requires_grad]
        d_globals = iter(torch.autograd.grad(overall, leaves, d_overall) if leaves else ())
        d_head = iter(found)
        for k, whole in enumerate(total):
            if whole is not None:
                source = d_similar if k in (0, 2, 4, 5) else d_globals if k < 8 else d_head
                (whole[images] if k < 2 else whole).add_(next(source))
    return [x for x in total if x is not None]


def _overall(image_global: Tensor, caption_global: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    square = (image_global[:, None] - caption_global).square()
    return _attention.l2norm(square @ weight.t() + bias)
