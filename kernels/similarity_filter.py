"""`similarity_filter` in Triton: equations in `ops/similarity_filter.py`, kernels in `_filter`.

Evaluation takes one kernel forward and one backward; the only scratch is the backward programs' partial gradients of
the parameters. In training a caption's statistics are over all images, so a window of captions is as many captions as
have room in the scratch memory for their nodes' values in all images.
"""

from __future__ import annotations

import torch
from torch import Tensor

from itm_fast._workspace import scratch_bytes
from itm_fast.packing import node_plan, spans

from . import _filter, _launch
from ._graph import Rows

OP = "similarity_filter"


def _plan(nodes: Tensor, cu_seqlens: Tensor, floats: int):
    """Windows of captions for which `floats` floats per node and image fit the scratch memory; for 0, one window."""
    I, M, _ = nodes.shape
    window = max(1, M)
    if floats:
        window = min(window, max(1, scratch_bytes(nodes.device) // (4 * floats * max(I, 1))))
    return node_plan(cu_seqlens, M, OP, (), window)


def forward(
    nodes: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    cu_seqlens: Tensor,
    training: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    (I, M, S), T = nodes.shape, len(cu_seqlens) - 1
    z = nodes.new_empty(I, T, S)
    mean, var = (nodes.new_empty(T if training else 0, dtype=torch.float32) for _ in range(2))
    plan = _plan(nodes, cu_seqlens, int(training))
    with _launch.on(nodes.device):
        given = _filter.parameters(weight, bias, norm_weight, norm_bias, running_mean, running_var)
        nodes = _launch.aligned(nodes)
        for window in plan.windows if I else ():
            if training:
                statistics = _statistics(given, nodes, plan, window, eps)[1]
                given = given._replace(mean=statistics[0], var=statistics[1])
                mean[window.captions], var[window.captions] = statistics
            x, to = Rows(nodes, 0, M, 0), Rows(z, 0, T, 0)
            _filter.filtered(given, x, to, plan.start, I, window.captions, training, eps)
    return z, mean, var


def _statistics(given, nodes, plan, window, eps):
    """a of a window's nodes, and its mean and variance for each caption."""
    a = _filter.significances(given, nodes, window.rows)
    return a, _filter.moments(a, plan.start, window.captions, window.rows.start, eps)


def backward(grad: Tensor, needs: list[bool], nodes: Tensor, *rest) -> list[Tensor]:
    *tensors, cu_seqlens, training, eps = rest
    (I, _, S), device = nodes.shape, nodes.device
    plan = _plan(nodes, cu_seqlens, 4 * int(training))
    total = torch.zeros(S + 3, dtype=torch.float64, device=device)
    with _launch.on(device):
        given = _filter.parameters(*tensors)
        nodes, grad = _launch.aligned(nodes), _launch.aligned(grad)
        d_nodes = torch.empty_like(nodes)
        for window in plan.windows if I else ():
            captions, means = window.captions, (given.mean, given.var)
            if training:
                a, (mean, var) = _statistics(given, nodes, plan, window, eps)
                given = given._replace(mean=mean, var=var)
                h = torch.empty_like(a)
                _filter.d_arguments(given, nodes, grad, plan.start, captions, window.rows.start, eps, h)
                means = _filter.moments(a, plan.start, captions, window.rows.start, eps, h, mean, var)
                del a, h
            for images in spans(I, _filter.images_at_once(nodes, captions, scratch_bytes(device) // 2)):
                total += _filter.backward(
                    given, nodes, grad, plan.start, captions, images, training, eps, means, d_nodes
                )
    found = d_nodes, *total.split([S, 1, 1, 1])
    return [d for d, n in zip(found, needs, strict=True) if n]
