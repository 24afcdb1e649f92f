"""`global_local_score` in C++: csrc/cpu/cross_attention_score*.cpp.

The score of a caption's words, the contexts, with an image of one region is this one where the logits are cosines.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _native
from ..._checks import work_dtype
from .._attention import POOLS
from . import DTYPES, bfloat16_products, lengths

OP = "global_local_score"
COSINE = 7  # Norm of csrc/cpu/attention.h


def forward(vector: Tensor, words: Tensor, cu_seqlens: Tensor, scale: float) -> Tensor:
    score = vector.new_empty(len(vector), len(cu_seqlens) - 1)
    _native.call(
        "cross_attention_score",
        *_arguments(vector, words, cu_seqlens, scale),
        score,
        bfloat16_products(vector.dtype),
        torch.get_num_threads(),
    )
    return score


def backward(
    grad: Tensor, needs: list[bool], vector: Tensor, words: Tensor, cu_seqlens: Tensor, scale: float
) -> list[Tensor]:
    work = work_dtype(vector)
    found = [torch.zeros_like(a, dtype=work).contiguous() if n else None for a, n in zip((vector, words), needs)]
    _native.call(
        "cross_attention_score_backward",
        *_arguments(vector, words, cu_seqlens, scale),
        grad.to(work).contiguous(),
        *found,
        torch.get_num_threads(),
    )
    return [d for d in found if d is not None]


def _arguments(vector: Tensor, words: Tensor, cu_seqlens: Tensor, scale: float) -> tuple:
    """What both functions take first, in their order."""
    (I, D), (edge, _) = vector.shape, lengths(OP, vector, words, cu_seqlens, None)
    return (
        vector.contiguous(),
        words.contiguous(),
        DTYPES[vector.dtype],
        *(I, 1, D, len(edge) - 1),
        edge,
        None,
        False,
        COSINE,
        scale,
        POOLS.index("sum"),
        1.0,
    )
