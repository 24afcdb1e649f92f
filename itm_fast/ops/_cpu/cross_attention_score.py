"""`cross_attention_score` in C++: csrc/cpu/cross_attention_score*.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _native
from ..._checks import work_dtype
from .. import _attention
from . import DTYPES, bfloat16_products, lengths


def forward(image: Tensor, words: Tensor, *rest) -> Tensor:
    score = image.new_empty(image.shape[0], rest[0].shape[0] - 1)
    pairs = bfloat16_products(image.dtype)
    _native.call("cross_attention_score", *_arguments(image, words, *rest), score, pairs, torch.get_num_threads())
    return score


def backward(grad: Tensor, needs: list[bool], image: Tensor, words: Tensor, *rest) -> list[Tensor]:
    work = work_dtype(image)
    found = [torch.zeros_like(a, dtype=work).contiguous() if n else None for a, n in zip((image, words), needs)]
    _native.call(
        "cross_attention_score_backward",
        *_arguments(image, words, *rest),
        grad.to(work).contiguous(),
        *found,
        torch.get_num_threads(),
    )
    return [d for d in found if d is not None]


def _arguments(image, words, cu_seqlens, region_lengths, direction, affinity_norm, scale, pool, pool_scale):
    """What both functions take first, in their order; the lengths are checked, for C++ reads wherever they point."""
    op = "cross_attention_score"
    I, R, D = image.shape
    edge, counts = lengths(op, image, words, cu_seqlens, region_lengths)
    return (
        image.contiguous(),
        words.contiguous(),
        DTYPES[image.dtype],
        *(I, R, D, len(edge) - 1),
        edge,
        counts,
        direction == "t2i",
        _attention.NORMS.index(affinity_norm),
        scale,
        _attention.POOLS.index(pool),
        pool_scale,
    )
