"""The backward pass of `hierarchical_alignment_score`, and what the `cpu` backend keeps for it.

C++ takes the affinities and, with scalar gates, the products of features of all pairs, which the forward pass keeps
where they fit; else some images at a time are scored again. With scalar gates, pairs whose vectors have to be formed
are left to the `torch` backend, as are calls of other backends.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .._checks import work_dtype
from .._workspace import scratch_bytes
from ..packing import spans
from . import _recompute
from ._cpu_calls import implementation
from ._declare import DECLARED
from ._kept import Keeping

NAME = "hierarchical_alignment_score"
SHARE = 8  # of the scratch memory: what C++ takes is kept if it takes at most an eighth
GRAM_MATRICES = 33  # of each image, at most, among C++'s scratch: its own, its gradient and that of 31 parts


def _products_fit(args: Sequence[Any]) -> int:
    """How many images' affinities and products of features `SHARE` allows, where Gram matrices have to fit too."""
    image, words = args[0], args[3]
    R, kinds, matrices = image.shape[1], *((2, GRAM_MATRICES) if _scalar(args) else (1, 0))
    each = (SHARE * kinds * R * len(words) + matrices * R * R) * work_dtype(image).itemsize
    return scratch_bytes(image.device) // (each or 1)


def _scalar(args: Sequence[Any]) -> bool:
    return args[2].shape[3] == 1


def _forward(*args: Any) -> tuple[Tensor, list[Tensor]]:
    if _products_fit(args) >= len(args[0]):
        score, products = implementation(f"{NAME}_kept").forward(*args)
        return score, [products]
    return implementation(NAME).forward(*args), []


def backward(
    backend: str, grad: Tensor, needs: Sequence[bool], *args: Any, kept: list[Tensor] | None = None
) -> list[Tensor]:
    """The gradients of (1) to (7) that `needs` marks; `kept`: the products of the forward pass, or none."""
    axes = DECLARED[NAME].pairs
    assert axes is not None
    if kept:
        return _by_products(grad, needs, args, kept[0])
    return _recompute.of_pairs(_scored_again if backend == "cpu" else _by_torch, axes, grad, needs, args)


def _by_torch(grad: Tensor, needs: Sequence[bool], *args: Any) -> list[Tensor]:
    from ._torch.hierarchical_alignment_score import backward

    return backward(grad, list(needs), *args)


def _scored_again(grad: Tensor, needs: Sequence[bool], *args: Any) -> list[Tensor]:
    total = [torch.zeros_like(x, dtype=work_dtype(x)) if need else None for x, need in zip(args, needs)]
    region_lengths = args[9]
    for images in spans(len(grad), max(1, _products_fit(args))):
        part = [x[images] for x in args[:3]] + list(args[3:])
        part[9] = None if region_lengths is None else region_lengths[images]
        products = implementation(f"{NAME}_kept").forward(*part)[1]
        found = iter(_by_products(grad[images], needs, part, products))
        for k, whole in enumerate(total):
            if whole is not None:
                (whole[images] if k < 3 else whole).add_(next(found))
    return [x for x in total if x is not None]


def _by_products(grad: Tensor, needs: Sequence[bool], args: Sequence[Any], products: Tensor) -> list[Tensor]:
    """The gradients in C++, which overwrites the products; those of the pairs that it leaves out by torch."""
    (I, R, _), N, T = args[0].shape, len(args[3]), grad.shape[1]
    formed = products[2 * I * R * N :][: I * T].view(I, T) != 0 if _scalar(args) else None
    grad = grad.to(products.dtype)
    found = implementation(f"{NAME}_kept").backward(grad, needs, *args, results=[products])
    if formed is not None and formed.any():
        axes, rest = DECLARED[NAME].pairs, grad.masked_fill(~formed, 0)
        assert axes is not None
        for whole, more in zip(found, _recompute.of_pairs(_by_torch, axes, rest, needs, args), strict=True):
            whole.add_(more)
    return found


KEEPING = Keeping(NAME, _forward, partial(backward, "cpu"))
