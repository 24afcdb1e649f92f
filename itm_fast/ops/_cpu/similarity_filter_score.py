"""`similarity_filter_score` in C++: csrc/cpu/similarity_filter_score.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _native
from .._declare import empty
from . import bfloat16_products, lengths, shape

OP = "similarity_filter_score"


def forward(*args) -> Tensor:
    tensors, (cu_seqlens, region_lengths, scale, eps) = [a.contiguous() for a in args[:16]], args[16:]
    image, _, words, caption_global, weight = tensors[:5]
    score = empty(OP, *args)
    running = [x.to(torch.float64) for x in tensors[14:]]
    _native.call(
        OP,
        *tensors[:12],
        *running,
        *tensors[12:14],
        *lengths(OP, image, words, cu_seqlens, region_lengths),
        score,
        *shape(image, caption_global, weight),
        scale,
        eps,
        bfloat16_products(image.dtype),
        torch.get_num_threads(),
    )
    return score
