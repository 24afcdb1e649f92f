"""Backward of SGRAF's pair scorers, some images at a time: the nodes are made again, and the gradients of the ops that
a score is made of are put together. Equations: `ops/_pair_score.py`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from itm_fast._workspace import current_gib, scratch_bytes, workspace
from itm_fast.packing import node_bounds, spans


def backward(
    head: Callable[..., Tensor],
    grad: Tensor,
    needs: Sequence[bool],
    tensors: Sequence[Tensor],
    cu_seqlens: Tensor,
    region_lengths: Tensor | None,
    scale: float,
) -> list[Tensor]:
    """Gradients of `tensors`, the differentiable arguments in the op's order, summed in float32.

    `head(nodes, bounds, *parameters)` makes z [I, T, S] of nodes [I, M, S] by a differentiable op.
    """
    total = [torch.zeros_like(x, dtype=torch.float32) if n else None for x, n in zip(tensors, needs, strict=True)]
    I, M, S = len(tensors[0]), len(tensors[2]) + len(tensors[3]), len(tensors[4])
    # The nodes and their gradients take half of the scratch, and the ops that run on them the other.
    most = scratch_bytes(grad.device) // max(4 * M * S * grad.element_size(), 1)
    with workspace(current_gib() / 2):
        for images in spans(I, max(1, most)):
            inputs = [tensors[0][images], tensors[1][images], *tensors[2:8]]
            rest = cu_seqlens, None if region_lengths is None else region_lengths[images], scale
            nodes, empty = torch.ops.itm_fast.similarity_nodes.default(*inputs, *rest, "triton")
            with torch.enable_grad():
                leaf = nodes.detach().requires_grad_()
                parameters = [x.detach().requires_grad_(n) for x, n in zip(tensors[8:], needs[8:], strict=True)]
                z = head(leaf, node_bounds(cu_seqlens), *parameters[:-2])
                result = (z @ parameters[-2] + parameters[-1]).sigmoid()
            leaves = [leaf, *(x for x in parameters if x.requires_grad)]
            d_nodes, *d_head = torch.autograd.grad(result, leaves, grad[images])
            del result, z
            d_inputs = []
            if any(needs[:8]):
                d_inputs = torch.ops.itm_fast.similarity_nodes_backward.default(
                    d_nodes, needs[:8], *inputs, *rest, [nodes, empty], "triton"
                )
            found = iter([*d_inputs, *d_head])
            for k, whole in enumerate(total):
                if whole is not None:
                    (whole[images] if k < 2 else whole).add_(next(found))
    return [x for x in total if x is not None]


def graph(nodes: Tensor, bounds: Tensor, *parameters: Tensor) -> Tensor:
    return torch.ops.itm_fast.similarity_graph.default(nodes, *parameters, bounds, "triton")


def filtration(
    running_mean: Tensor, running_var: Tensor, eps: float, nodes: Tensor, bounds: Tensor, *parameters: Tensor
) -> Tensor:
    running = running_mean.to(nodes.dtype), running_var.to(nodes.dtype)
    return torch.ops.itm_fast.similarity_filter.default(nodes, *parameters, *running, bounds, False, eps, "triton")[0]
