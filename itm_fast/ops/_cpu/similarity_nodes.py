"""`similarity_nodes` in C++: csrc/cpu/cross_attention_similarity*.cpp, which does it beside that op."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import _native
from ..._checks import work_dtype
from .._declare import empty
from . import bfloat16_products, lengths, shape


def forward(*args) -> tuple[Tensor, Tensor]:
    nodes, inverse = empty("similarity_nodes", *args, backend="cpu")
    pairs = bfloat16_products(nodes.dtype)
    _native.call("similarity_nodes", *_arguments(*args), nodes, inverse, pairs, torch.get_num_threads())
    return nodes, inverse


def backward(grad: Tensor, needs: list[bool], *args, results: Sequence[Tensor]) -> list[Tensor]:
    work = work_dtype(grad)
    found = [torch.zeros(a.shape, dtype=work) if n else None for a, n in zip(args, needs, strict=False)]
    _native.call(
        "similarity_nodes_backward", *_arguments(*args), *results, grad.contiguous(), *found, torch.get_num_threads()
    )
    return [d for d in found if d is not None]


def _arguments(*args):
    """What both functions take first, in their order; the lengths are checked, for C++ reads wherever they point."""
    tensors, (cu_seqlens, region_lengths, scale) = [a.contiguous() for a in args[:8]], args[8:]
    image, _, words, caption_global, weight = tensors[:5]
    return (
        *tensors,
        *shape(image, caption_global, weight),
        *lengths("similarity_nodes", image, words, cu_seqlens, region_lengths),
        scale,
    )
