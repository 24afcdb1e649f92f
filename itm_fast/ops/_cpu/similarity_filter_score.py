"""`similarity_filter_score` in C++: csrc/cpu/similarity_filter_score.cpp; backward by the ops that it is made of."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ... import _native
from .._pair_score import fake
from . import _pair_score, bfloat16_products, lengths

OP = "similarity_filter_score"


def forward(*args) -> Tensor:
    tensors, (cu_seqlens, region_lengths, scale, eps) = [a.contiguous() for a in args[:16]], args[16:]
    image, _, words, caption_global, weight = tensors[:5]
    score = fake(*tensors)
    running = [x.to(torch.float64) for x in tensors[14:]]
    _native.call(
        OP,
        *tensors[:12],
        *running,
        *tensors[12:14],
        *lengths(OP, image, words, cu_seqlens, region_lengths),
        score,
        *_pair_score.shape(image, caption_global, weight),
        scale,
        eps,
        bfloat16_products(image.dtype),
        torch.get_num_threads(),
    )
    return score


def backward(grad: Tensor, needs: list[bool], *args) -> list[Tensor]:
    running_mean, running_var, cu_seqlens, region_lengths, scale, eps = args[14:]
    head = partial(_head, running_mean, running_var, eps)
    return _pair_score.backward(OP, head, grad, needs, args[:14], cu_seqlens, region_lengths, scale)


def _head(running_mean, running_var, eps, nodes: Tensor, bounds: Tensor, *parameters: Tensor) -> Tensor:
    running = running_mean.to(nodes.dtype), running_var.to(nodes.dtype)
    return torch.ops.itm_fast.similarity_filter.default(nodes, *parameters, *running, bounds, False, eps, "cpu")[0]
