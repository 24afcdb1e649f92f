"""`similarity_graph_score` in C++: csrc/cpu/similarity_graph_score.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _native
from .._declare import empty
from . import bfloat16_products, lengths, shape

OP = "similarity_graph_score"


def forward(*args) -> Tensor:
    tensors, (cu_seqlens, region_lengths, scale) = [a.contiguous() for a in args[:16]], args[16:]
    image, _, words, caption_global, weight = tensors[:5]
    score = empty(OP, *args)
    _native.call(
        OP,
        *(x for k, x in enumerate(tensors) if k != 11),  # the key bias has no effect
        *lengths(OP, image, words, cu_seqlens, region_lengths),
        score,
        *shape(image, caption_global, weight),
        len(tensors[8]),
        scale,
        bfloat16_products(image.dtype),
        torch.get_num_threads(),
    )
    return score
