"""`similarity_filter` in batched PyTorch: some images with captions of one length at a time."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ..._checks import work_dtype
from ...packing import bounds, runs, spans
from .. import _attention, _recompute
from .._declare import empty

COPIES = 3  # temporaries [L + 1, S] of a pair that exist at once in the forward pass


def forward(*args) -> tuple[Tensor, Tensor, Tensor]:
    z, mean, var = empty("similarity_filter", *args)
    for part in _parts(False, *args):
        result, means, variances = part.function(*(a[at] for a, at in zip(args, part.inputs, strict=False)))
        z[part.result] = result.to(z.dtype)
        if len(mean):
            mean[part.result[1]], var[part.result[1]] = means.to(mean.dtype), variances.to(var.dtype)
    return z, mean, var


def backward(grad: Tensor, needs: list[bool], *args) -> list[Tensor]:
    parts = (p._replace(function=lambda *a, f=p.function: f(*a)[0]) for p in _parts(True, *args))
    return _recompute.backward(parts, args[:5], needs, grad)


def _parts(backward, nodes, weight, bias, norm_weight, norm_bias, running_mean, running_var, cu_seqlens, training, eps):
    (I, M, S), op = nodes.shape, "similarity_filter"
    edge = bounds(cu_seqlens, M, op)
    rows = _recompute.tile_bytes(nodes.device, backward) // (COPIES * S * work_dtype(nodes).itemsize)
    function = partial(filtered, running_mean, running_var, training, eps)
    for run in runs(edge, nodes.device, max(1, rows // max(I, 1)) if training else _recompute.MIN_QUERIES):
        # A caption's statistics are over all images, so in training no block may split them.
        for images in spans(I, I if training else max(1, rows // (run.length * run.size))):
            yield _recompute.Block(
                ((images, run.rows), (), (), (), ()), (images, run.captions), partial(function, run.length)
            )


def filtered(running_mean, running_var, training, eps, length, nodes, weight, bias, norm_weight, norm_bias):
    """A block: nodes [b, c * length, S] -> z [b, c, S] and the captions' means and variances."""
    work = work_dtype(nodes)
    (b, _, S), scale, shift = nodes.shape, norm_weight.to(work), norm_bias.to(work)
    X = nodes.to(work).reshape(b, -1, length, S)
    a = X @ weight.to(work) + bias.to(work)
    if training:
        var, mean = torch.var_mean(a, dim=(0, 2), correction=0, keepdim=True)
    else:
        var, mean = running_var.to(work), running_mean.to(work)
    g = ((a - mean) * (scale * (var + eps).rsqrt()) + shift).sigmoid()
    beta = g / (g.sum(-1, keepdim=True) + _attention.EPS)
    m = (beta[:, :, None, :] @ X).squeeze(2)
    return _attention.l2norm(m), mean.detach().flatten(), var.detach().flatten()
