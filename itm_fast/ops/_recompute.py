"""Scores block by block, and their backward pass, which computes each block anew: nothing of a block is kept for it.

An op of batched PyTorch, or a model that scores by several ops, names its blocks; `forward` fills the result from them,
and `backward` runs each again and differentiates it. Of the score of every pair, `of_pairs` takes the blocks of pairs
that have a gradient: the hardest-negative loss gives one to about three pairs of a row of the score matrix. The others
would add exact zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .._backends import requested, use_backend
from .._checks import work_dtype
from .._workspace import current_gib, scratch_bytes, workspace
from ..packing import Index, spans

CPU_TILE = 8 << 20  # bytes: a block and its temporaries then stay in the last caches of a core
MIN_QUERIES = 384  # words in a block below which matrix products run far from their peak
IMAGES = 4  # that `of_pairs` takes at a time: of more, more pairs without a gradient come along; fewer cost more calls
GPU_IMAGES = 64  # the same on a GPU, where a call costs more than pairs without a gradient; untuned
SPARSE = 8  # at most one pair in so many has a gradient, or `of_pairs` takes all at once


class Block(NamedTuple):
    """One call: where its inputs lie in the differentiable arguments, and its result in the whole result."""

    inputs: tuple[tuple[Index, ...], ...]
    result: tuple[Index, ...]
    function: Callable[..., Tensor]


Blocks = Callable[..., Iterator[Block]]  # (backward, *tensors, cu_seqlens, region_lengths) -> blocks


def tile_bytes(device: torch.device, backward: bool, tiles: int = 1) -> int:
    """Scratch that one block's forward temporaries may take; backward keeps several of each.

    `tiles` is how many of CPU_TILE an op with many steps a block is fastest with.
    """
    limit = scratch_bytes(device) // (6 if backward else 2)
    return min(tiles * CPU_TILE, limit) if device.type == "cpu" else limit


def forward(blocks: Iterator[Block], args: Sequence[Tensor], result: Tensor) -> Tensor:
    """Fill `result` block by block."""
    for block in blocks:
        value = block.function(*(a[at] for a, at in zip(args, block.inputs, strict=True)))
        result[block.result] = value.to(result.dtype)
    return result


def backward(blocks: Iterator[Block], args: Sequence[Tensor], needs: Sequence[bool], grad: Tensor) -> list[Tensor]:
    """Run each block again, differentiate it, and add up, in float32 or better: one gradient for each of `needs`."""
    work = work_dtype(grad)
    total = [torch.zeros_like(a, dtype=work) if n else None for a, n in zip(args, needs, strict=True)]
    for block in blocks:
        with torch.enable_grad():
            inputs = [
                a[at].detach().to(work).requires_grad_(n) for a, at, n in zip(args, block.inputs, needs, strict=True)
            ]
            value = block.function(*inputs)
        if not value.requires_grad:  # the options leave out all that needs a gradient
            continue
        wanted = [x for x, n in zip(inputs, needs, strict=True) if n]
        found = iter(torch.autograd.grad(value, wanted, grad[block.result].to(value.dtype), materialize_grads=True))
        for whole, at in zip(total, block.inputs, strict=True):
            if whole is not None:
                whole[at] += next(found)
    return [t for t in total if t is not None]


def of_pairs(
    dense: Callable[..., list[Tensor]], axes: str, grad: Tensor, needs: Sequence[bool], args: Sequence[Any]
) -> list[Tensor]:
    """Gradients as `dense(grad, needs, *args)` gives them, from the pairs where `grad` [I, T] is not zero.

    Some images are taken at a time, with the captions that any of them needs.

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


def score(
    cut: Blocks, axes: str, tensors: Sequence[Tensor], cu_seqlens: Tensor, region_lengths: Tensor | None
) -> Tensor:
    """Scores [I, T] that several ops make together, differentiable.

    Args:
        cut: the blocks of a call; their inputs index `tensors`, their results [I, T].
        axes: what lies along the first dimension of each of `tensors`, as in `of_pairs`; I of the first.
        tensors: what may need a gradient.
        cu_seqlens: [T + 1].
        region_lengths: [I] or None.
    """
    return _Scored.apply(cut, axes, cu_seqlens, region_lengths, *tensors)


class _Scored(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, cut: Blocks, axes: str, cu_seqlens: Tensor, region_lengths: Tensor | None, *tensors: Tensor):
        ctx.cut, ctx.axes, ctx.as_now = cut, axes, as_now(tensors[0].device.type)
        ctx.save_for_backward(*tensors, cu_seqlens, region_lengths)  # which refuses what is written to meanwhile
        score = tensors[0].new_empty(len(tensors[0]), len(cu_seqlens) - 1)
        return forward(cut(False, *tensors, cu_seqlens, region_lengths), tensors, score)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor):
        *tensors, cu_seqlens, region_lengths = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[4:])

        def dense(grad, needs, *args):
            return backward(ctx.cut(True, *args), args[: len(tensors)], needs, grad)

        args = *tensors, cu_seqlens, region_lengths
        found = iter(ctx.as_now(of_pairs, dense, f"{ctx.axes}EI", grad, needs, args))
        return None, None, None, None, *(next(found).to(x.dtype) if n else None for x, n in zip(tensors, needs))


def again(function: Callable[..., Any], device: str) -> Callable[..., Any]:
    """Make a function of which autograd keeps the inputs, and runs it anew in backward, as it ran now."""
    return partial(checkpoint, partial(as_now(device), function), use_reentrant=False, preserve_rng_state=False)


def as_now(device: str) -> Callable[..., Any]:
    """Make a caller `run(function, *args)` that keeps the backend, the scratch and the autocast of now.

    Autograd may run a backward pass on a thread that does not see the context of the forward pass.
    """
    backend, gib = requested(), current_gib()
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)

    def run(function: Callable[..., Any], *args: Any) -> Any:
        with use_backend(backend), workspace(gib), torch.autocast(device, dtype, enabled=enabled):
            return function(*args)

    return run
