"""`cross_attention_similarity` in C++: csrc/cpu/cross_attention_similarity*.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _native
from ..._checks import work_dtype
from .. import _attention
from .._declare import empty
from . import DTYPES, bfloat16_products, lengths


def forward(image: Tensor, words: Tensor, weight: Tensor, bias: Tensor, *rest) -> Tensor:
    args = image, words, weight, bias, *rest
    result = empty("cross_attention_similarity", *args)
    pairs = bfloat16_products(image.dtype)
    _native.call("cross_attention_similarity", *_arguments(*args), result, pairs, torch.get_num_threads())
    return result


def backward(grad: Tensor, needs: list[bool], image: Tensor, words: Tensor, weight: Tensor, bias: Tensor, *rest):
    args = image, words, weight, bias
    work = work_dtype(image)
    found = [torch.zeros(a.shape, dtype=work) if n else None for a, n in zip(args, needs, strict=True)]
    _native.call(
        "cross_attention_similarity_backward",
        *_arguments(*args, *rest),
        grad.contiguous(),
        *found,
        torch.get_num_threads(),
    )
    return [d for d in found if d is not None]


def _arguments(image, words, weight, bias, cu_seqlens, region_lengths, direction, affinity_norm, scale):
    """What both functions take first, in their order; the lengths are checked, for C++ reads wherever they point."""
    op = "cross_attention_similarity"
    edge, counts = lengths(op, image, words, cu_seqlens, region_lengths)
    return (
        *(a.contiguous() for a in (image, words, weight, bias)),
        DTYPES[image.dtype],
        *(*image.shape, len(edge) - 1, weight.shape[0]),
        edge,
        counts,
        direction == "t2i",
        _attention.NORMS.index(affinity_norm),
        scale,
    )
