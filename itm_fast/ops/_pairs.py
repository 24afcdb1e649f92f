"""Backward of a score op over the pairs that have a gradient.

The hardest-negative loss gives one to about three pairs of a row of the score matrix. The others add exact zeros, so
they are left out: some images are taken at a time, with the captions that any of them needs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._checks import work_dtype
from ..packing import spans

IMAGES = 4  # taken at a time: with more, more pairs without a gradient come along; with fewer, the calls cost more
GPU_IMAGES = 64  # there a call costs more than pairs without a gradient; untuned
SPARSE = 8  # one pair in so many has a gradient at most, or all are taken at once


def backward(
    dense: Callable[..., list[Tensor]], axes: str, grad: Tensor, needs: Sequence[bool], args: Sequence[Any]
) -> list[Tensor]:
    """Gradients as `dense(grad, needs, *args)` gives them, from the pairs where `grad` [I, T] is not zero.

    Args:
        dense: an implementation's backward.
        axes: what lies along the first dimension of each argument: I images, T captions, N packed words, E the
            captions' bounds in them, and . none of these.
        grad: the scores' gradient, [I, T].
        needs: which of the differentiable arguments, the first ones, want a gradient.
        args: the op's arguments.
    """
    gpu = grad.device.type == "cuda"
    # A captured CUDA graph is the same for any gradient.
    if (gpu and torch.cuda.is_current_stream_capturing()) or grad.count_nonzero() * SPARSE > grad.numel():
        return dense(grad, needs, *args)
    cu_seqlens = args[axes.index("E")]
    start, length = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
    total = [torch.zeros_like(a, dtype=work_dtype(a)) if n else None for a, n in zip(args, needs)]
    for images in spans(len(grad), GPU_IMAGES if gpu else IMAGES):
        captions = grad[images].ne(0).any(0).nonzero().flatten()
        if not len(captions):
            continue
        bounds = torch.nn.functional.pad(length[captions].cumsum(0), (1, 0))
        shift = (start[captions] - bounds[:-1]).repeat_interleave(length[captions])
        part = {"I": images, "T": captions, "N": shift + torch.arange(len(shift), device=shift.device), ".": ()}
        taken = [
            a if a is None else bounds.to(a.dtype) if axis == "E" else a[part[axis]] if axis != "." else a
            for a, axis in zip(args, axes, strict=True)
        ]
        found = iter(dense(grad[images][:, captions], needs, *taken))
        for whole, axis in zip(total, axes):
            if whole is not None:
                whole[part[axis]] += next(found)
    return [t for t in total if t is not None]
