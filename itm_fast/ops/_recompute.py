"""Compute a result block by block; the backward pass recomputes each block, so no block's intermediates are saved.
Of so few pairs that these are small, they are saved.

An op in batched PyTorch, or a model that scores with several ops, yields its blocks. `forward` fills the result from
them; `backward` runs each again under autograd. For scores [I, T] of all pairs, `of_pairs` computes gradients only for
pairs whose score has one, because the others would add exact zeros: the hardest-negative loss gives a gradient to about
three pairs in a row of the score matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import disable_saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from .._backends import requested, use_backend
from .._checks import capturing, work_dtype
from .._workspace import current_gib, scratch_bytes, workspace
from ..packing import Index, spans, starts

CPU_TILE = 8 << 20  # bytes of a block with its temporaries that stay in the last caches of a core
MIN_QUERIES = 384  # with fewer words in a block, matrix products run far from their peak
IMAGES = 4  # `of_pairs` takes so many at a time: more images bring more pairs without a gradient, fewer need more calls
GPU_IMAGES = 64  # the same on a GPU, where a call costs more than pairs without a gradient; untuned
FEW = 8  # pairs are few where at most one in 8 has a gradient; of more, `of_pairs` takes all pairs at once
FEW_ALONE = 2  # the same of blocks of single pairs, which bring no others; of 3 in 8, a fifth less time than all pairs
# The torch backend keeps on a CPU what autograd records of so few pairs, in so few bytes: to compute these again takes
# longer than the pairs without a gradient do. Of more, the hardest-negative loss gives too few pairs a gradient.
RECORDED_PAIRS, RECORDED_BYTES = 1024, 160 << 20


class Block(NamedTuple):
    """One call: the index of its inputs in each differentiable argument, and of its result in the whole result."""

    inputs: tuple[tuple[Index, ...], ...]
    result: tuple[Index, ...]
    function: Callable[..., Tensor]


Blocks = Callable[..., Iterator[Block]]  # (backward, *tensors, cu_seqlens, region_lengths) -> blocks
Matched = Callable[..., Iterator[Block]]  # (grad, *tensors, cu_seqlens, region_lengths) -> blocks of single pairs


def refuse_second(name: str) -> None:
    """Raise a NotImplementedError if the backward pass that calls this is itself to be differentiated."""
    if torch.is_grad_enabled():
        raise NotImplementedError(f"{name} has no second derivative; differentiate it without create_graph=True")


def tile_bytes(device: torch.device, backward: bool, tiles: int = 1) -> int:
    """Bytes that one block's forward temporaries may take; backward, which keeps several of each, is given fewer.

    `tiles`: how many times CPU_TILE; ops with many steps in a block are fastest with more than 1.
    """
    limit = scratch_bytes(device) // (6 if backward else 2)
    return min(tiles * CPU_TILE, limit) if device.type == "cpu" else limit


def _taken(args: Sequence[Tensor], block: Block) -> list[Tensor]:
    """A block's inputs; where one is all of an argument, the argument itself: a view takes as long as a small op."""
    return [x if at in ((), (slice(0, len(x)),)) else x[at] for x, at in zip(args, block.inputs, strict=True)]


def forward(blocks: Iterator[Block], args: Sequence[Tensor], result: Tensor) -> Tensor:
    """Fill `result` block by block."""
    for block in blocks:
        value = block.function(*_taken(args, block))
        result[block.result] = value.to(result.dtype)
    return result


class Recorded(NamedTuple):
    """A block that autograd has recorded: its inputs, of which some need a gradient, and its result."""

    block: Block
    inputs: list[Tensor]
    value: Tensor


def recorded(blocks: Iterable[Block], args: Sequence[Tensor], needs: Sequence[bool]) -> Iterator[Recorded]:
    """Compute each block, in float32 or better, so that it can be differentiated."""
    work = work_dtype(args[0])
    for block in blocks:
        with torch.enable_grad():
            taken = zip(_taken(args, block), needs, strict=True)
            inputs = [x.detach().to(work).requires_grad_(n) for x, n in taken]
            value = block.function(*inputs)
        yield Recorded(block, inputs, value)


def forward_recorded(
    blocks: Iterable[Block], args: Sequence[Tensor], needs: Sequence[bool], result: Tensor
) -> list[Recorded] | None:
    """`forward` that keeps what autograd records, for a `differentiate` that computes nothing again.

    That takes pairs without a gradient too, so of a result that is not finite nothing is kept: 0 times NaN is NaN.
    """
    kept = list(recorded(blocks, args, needs))
    for block, _, value in kept:
        result[block.result] = value.detach().to(result.dtype)
    return kept if result.sum(dtype=work_dtype(result)).isfinite() else None


def backward(blocks: Iterable[Block], args: Sequence[Tensor], needs: Sequence[bool], grad: Tensor) -> list[Tensor]:
    """Recompute and differentiate each block; return the sums, in float32 or better, of the gradients `needs` marks."""
    return differentiate(recorded(blocks, args, needs), args, needs, grad)


def differentiate(
    blocks: Iterable[Recorded], args: Sequence[Tensor], needs: Sequence[bool], grad: Tensor
) -> list[Tensor]:
    """`backward` of blocks that have been computed."""
    work, places = work_dtype(grad), [k for k, need in enumerate(needs) if need]
    total: dict[int, Tensor] = {}
    own: set[int] = set()  # of the sums, those that may be added to in place
    for block, inputs, value in blocks:
        if not value.requires_grad:  # with these options the block does not depend on what needs a gradient
            continue
        upstream = grad[block.result].to(value.dtype)
        found = torch.autograd.grad(value, [inputs[k] for k in places], upstream, materialize_grads=True)
        for k, d in zip(places, found, strict=True):
            at = block.inputs[k]
            if k not in total and d.shape == args[k].shape and not any(isinstance(x, Tensor) for x in at):
                total[k] = d.contiguous()
                continue
            if k not in own:
                total[k] = total[k].clone() if k in total else torch.zeros_like(args[k], dtype=work)
                own.add(k)
            _add(total[k], at, d)
    return [total[k] if k in total else torch.zeros_like(args[k], dtype=work) for k in places]


def _add(whole: Tensor, at: tuple[Index, ...], found: Tensor) -> None:
    """whole[at] += found, where a tensor of rows may name one several times, whose sum does not depend on threads."""
    if len(at) == 1 and isinstance(at[0], Tensor):
        whole.index_add_(0, at[0].flatten(), found.flatten(0, at[0].dim() - 1))
    else:
        whole[at] += found


def few_pairs(grad: Tensor, one_in: int = FEW) -> bool:
    """Whether at most one pair in `one_in` has a gradient, and backward leaves the others out."""
    # A captured CUDA graph is run again with other gradients, so it must not depend on which of this one are zero.
    if capturing(grad.device):
        return False
    return bool(grad.count_nonzero() * one_in <= grad.numel())


def of_pairs(
    dense: Callable[..., list[Tensor]], axes: str, grad: Tensor, needs: Sequence[bool], args: Sequence[Any]
) -> list[Tensor]:
    """The gradients of `dense(grad, needs, *args)`, computed only from pairs where `grad` [I, T] is not zero.

    Takes some images at a time, with the captions that have a non-zero gradient with any of them.

    Args:
        dense: an implementation's `backward`, over all pairs that it is given.
        axes: the first dimension of each argument: I images, T captions, N packed words, E cu_seqlens, . none of these.
        grad: the scores' gradient, [I, T] or [I, T, K].
        needs: which of the differentiable arguments, which come first, need a gradient.
        args: the op's arguments.
    """
    if not few_pairs(grad):
        return dense(grad, needs, *args)
    cu_seqlens = args[axes.index("E")]
    start, length = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
    total = [torch.zeros_like(a, dtype=work_dtype(a)) if n else None for a, n in zip(args, needs)]
    scored = grad.ne(0) if grad.dim() == 2 else grad.ne(0).any(2)
    for images in spans(len(grad), GPU_IMAGES if grad.is_cuda else IMAGES):
        captions = scored[images].any(0).nonzero().flatten()
        if not len(captions):
            continue
        bounds = starts(length[captions])
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
    cut: Blocks,
    axes: str,
    tensors: Sequence[Tensor],
    cu_seqlens: Tensor,
    region_lengths: Tensor | None,
    each: tuple[int, ...] = (),
    matched: Matched | None = None,
    share: int = FEW_ALONE,
    *,
    numbers: int,
) -> Tensor:
    """Differentiable scores [I, T, *each] that are computed block by block, by one or several ops.

    Args:
        cut: makes the blocks; their inputs index `tensors`, their results index the scores. It and `matched` live as
            long as the scores, so they must hold no tensors of their own.
        axes: the first dimension of each of `tensors`, as in `of_pairs`; the first one's is I.
        tensors: the tensors that may need a gradient.
        cu_seqlens: [T + 1].
        region_lengths: [I] or None.
        each: the shape of a pair's result, () for a score.
        matched: makes blocks of those pairs alone whose score has a gradient, with which backward goes on if these are
            few. On a CPU: a GPU sums rows that a block names several times in any order.
        share: what few is for `matched`, at most one pair in so many.
        numbers: about how many autograd records; see `records`.
    """
    # Asked here: inside a Function autograd is off, and needs_input_grad tells of parameters under no_grad too.
    record = torch.is_grad_enabled() and records(tensors[0], len(cu_seqlens) - 1, numbers)
    return _Scored.apply(cut, matched, share, axes, each, record, cu_seqlens, region_lengths, *tensors)


def recordable(pairs: int, size: int, device: torch.device) -> bool:
    """Whether `size` bytes that autograd records of a call are kept: of few pairs, in a quarter of the scratch
    memory.

    Not inside hooks for saved tensors: torch.utils.checkpoint and save_on_cpu ask for memory, and checkpoint, whose
    forward pass and recomputation both have hooks, must find as many saved tensors in one as in the other, although
    their backends and scratch limits may differ.
    """
    few = pairs <= RECORDED_PAIRS and size <= min(RECORDED_BYTES, scratch_bytes(device) // 4)
    return few and not _hooked()


def _hooked() -> bool:
    """Whether hooks for saved tensors are active: disabling them then fails, in every PyTorch since 2.6, which has no
    function that tells."""
    try:
        with disable_saved_tensors_hooks("itm_fast only asks"):
            return False
    except RuntimeError:
        return True


def dense_record(image: Tensor, words: Tensor, captions: int, S: int) -> int:
    """About how many numbers autograd records of pairs whose regions and words each get vectors of S from rows of D, of
    which they attend to about R. The factors were fitted to the bytes that hooks for saved tensors saw of CMCAN and
    TSHSR."""
    I, R, D = image.shape
    return (7 * D + 14 * S + 8 * R) * I * (captions * R + len(words))


def records(image: Tensor, captions: int, numbers: int) -> bool:
    """Whether a call of `score` keeps what autograd records: by `torch` on a CPU, where that is `recordable`. Not of
    half inputs, whose blocks are computed in float32 where they are recorded: a score would depend on the number of
    pairs. An op's does not, whose blocks are computed in float32 in either case.

    `numbers`: about how many numbers autograd records, those of the ops that are called included.
    """
    if torch.compiler.is_compiling() or requested() != "torch" or not image.is_cpu or work_dtype(image) != image.dtype:
        return False
    return recordable(len(image) * captions, numbers * image.itemsize, image.device)


class _Scored(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, cut: Blocks, matched: Any, share: int, axes: str, each: Any, record: bool, *rest: Any):
        cu_seqlens, region_lengths, *tensors = rest
        ctx.cut, ctx.matched, ctx.share, ctx.axes = cut, matched, share, axes
        ctx.as_now = as_now(tensors[0].device.type)
        ctx.save_for_backward(*tensors, cu_seqlens, region_lengths)  # autograd refuses tensors changed before backward
        score = tensors[0].new_empty(len(tensors[0]), len(cu_seqlens) - 1, *each)
        args, needs = (*tensors, cu_seqlens, region_lengths), ctx.needs_input_grad[8:]
        ctx.kept = None
        if record and any(needs):
            ctx.kept = forward_recorded(cut(True, *args), tensors, needs, score)
            return score
        return forward(cut(False, *args), tensors, score)

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        refuse_second("this model's score")
        *tensors, cu_seqlens, region_lengths = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[8:])
        kept, ctx.kept = ctx.kept, None  # a second pass through the same graph computes all again

        def dense(grad, needs, *args):
            return backward(ctx.cut(True, *args), args[: len(tensors)], needs, grad)

        args = *tensors, cu_seqlens, region_lengths
        if kept is not None:
            gradients = ctx.as_now(differentiate, kept, tensors, needs, grad)
        elif ctx.matched and grad.is_cpu and few_pairs(grad, ctx.share):
            gradients = ctx.as_now(backward, ctx.matched(grad, *args), tensors, needs, grad)
        else:
            gradients = ctx.as_now(of_pairs, dense, f"{ctx.axes}EI", grad, needs, args)
        found = iter(gradients)
        return *[None] * 8, *(next(found).to(x.dtype) if n else None for x, n in zip(tensors, needs))


def again(function: Callable[..., Any], device: str) -> Callable[..., Any]:
    """Wrap a function in torch's checkpoint: autograd saves its inputs only and runs it again in backward, `as_now`."""
    return partial(checkpoint, partial(as_now(device), function), use_reentrant=False, preserve_rng_state=False)


def as_now(device: str) -> Callable[..., Any]:
    """Return run(function, *args), which calls the function with the current backend, scratch limit and autocast.

    Autograd may run a backward pass on a thread where these contexts of the forward pass are not set.
    """
    backend, gib = requested(), current_gib()
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)

    def run(function: Callable[..., Any], *args: Any) -> Any:
        with use_backend(backend), workspace(gib), torch.autocast(device, dtype, enabled=enabled):
            return function(*args)

    return run
