"""Scores of a batch, one caption at a time with all images: dropout is drawn in this order, as in published loops.

No intermediate result is saved. Backward scores each caption again, with the same dropout masks, but only with images
whose score has a gradient: under the hardest-negative loss about three of the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .._checks import work_dtype
from ..ops import _recompute
from ..packing import bounds

# (length, cu_seqlens [2], rows, region_lengths, image, words, *parameters) -> scores [I, 1]. `rows` are the places in
# the batch of the images that are given, None if all are: dropout is drawn for all images in both cases.
Run = Callable[..., Tensor]


def score(
    run: Run,
    image: Tensor,
    words: Tensor,
    cu_seqlens: Tensor,
    region_lengths: Tensor | None,
    parameters: tuple[Tensor, ...],
) -> Tensor:
    """Differentiable scores [I, T] of images [I, R, D] and packed captions [N, D]."""
    return _Columns.apply(run, cu_seqlens, region_lengths, image, words, *parameters)


class _Columns(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: Run, cu_seqlens: Tensor, region_lengths: Tensor | None, image: Tensor, *rest: Tensor):
        words, *parameters = rest
        ctx.run, ctx.as_now, ctx.states = run, _recompute.as_now(image.device.type), []
        ctx.save_for_backward(cu_seqlens, region_lengths, image, *rest)
        columns = [image.new_empty(len(image), 0)]
        for length, own, at in _captions(cu_seqlens, words):
            ctx.states.append(_random_state(image.device))
            columns.append(run(length, own, None, region_lengths, image, words[at], *parameters))
        return torch.cat(columns, 1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor):
        cu_seqlens, region_lengths, image, *rest = ctx.saved_tensors
        words, *parameters = rest
        needs, device = ctx.needs_input_grad[3:], image.device
        total = [
            torch.zeros_like(x, dtype=work_dtype(x)) if need else None for x, need in zip((image, *rest), needs)
        ]
        scored = grad.ne(0)
        rows_of = scored.t().nonzero()[:, 1].split(scored.sum(0).tolist())  # of all captions, so a GPU is awaited once
        for t, ((length, own, at), rows) in enumerate(zip(_captions(cu_seqlens, words), rows_of, strict=True)):
            if not len(rows):
                continue
            counts = None if region_lengths is None else region_lengths[rows]
            given = image[rows], words[at], *parameters
            with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.enable_grad():
                _set_random_state(ctx.states[t], device)
                inputs = [x.detach().requires_grad_(need) for x, need in zip(given, needs)]
                column = ctx.as_now(ctx.run, length, own, rows, counts, *inputs)
            wanted = [x for x, need in zip(inputs, needs) if need]
            found = iter(torch.autograd.grad(column, wanted, grad[rows, t : t + 1], materialize_grads=True))
            for whole, index in zip(total, (rows, at, *[()] * len(parameters))):
                if whole is not None:
                    whole[index] += next(found)
        return None, None, None, *(None if d is None else d.to(x.dtype) for d, x in zip(total, (image, *rest)))


def _captions(cu_seqlens: Tensor, words: Tensor):
    """Each caption's length, its cu_seqlens alone [2], and its rows in `words`."""
    edge = bounds(cu_seqlens, len(words), "cu_seqlens")
    for t, (start, stop) in enumerate(pairwise(edge)):
        yield stop - start, cu_seqlens[t : t + 2] - start, slice(start, stop)


def _random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _set_random_state(state: Tensor, device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)
