"""Scores of a batch, for which dropout is drawn one caption at a time with all images, as in published loops.

Saved for backward: what dropout kept, a bit for each number. Everything else is computed again, only for pairs whose
score has a gradient: under the hardest-negative loss about three of each caption.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops import _recompute
from ..packing import bounds
from ._pair_blocks import Pairs, matched


class Scorer(NamedTuple):
    """What a pair scorer gives to `score`.

    Attributes:
        draw: words of a caption -> what dropout keeps of it with all images, bool [I, ..., rows, S].
        run: (length, cu_seqlens [2], region_lengths, kept, image, words, *parameters) -> scores [I, 1] of a caption.
        pairs: (`Pairs`, kept [P, ..., rows, S], image, words, *parameters) -> scores of P pairs.
        pair_bytes: words of a caption -> bytes that a pair takes in float32, forward.
        whole: (bits of all captions, `packed`, their rows side by side) -> scores [I, T], or None if only `run` can.
    """

    draw: Callable[[int], Tensor]
    run: Callable[..., Tensor]
    pairs: Callable[..., Tensor]
    pair_bytes: Callable[[int], int]
    whole: Callable[[Tensor], Tensor] | None


def score(
    scorer: Scorer,
    image: Tensor,
    words: Tensor,
    cu_seqlens: Tensor,
    region_lengths: Tensor | None,
    parameters: tuple[Tensor, ...],
) -> Tensor:
    """Differentiable scores [I, T] of images [I, R, D] and packed captions [N, D]."""
    return _Columns.apply(scorer, cu_seqlens, region_lengths, image, words, *parameters)


def packed(kept: Tensor) -> Tensor:
    """bool [..., S] -> int64 [..., ceil(S / 64)]: bit s % 64 of number s // 64."""
    kept = torch.nn.functional.pad(kept, (0, -kept.shape[-1] % 64))
    # Of eight bytes that are 0 or 1, this product has the eight bits in its highest byte, in their order.
    bits = (kept.view(torch.int64) * 0x0102040810204080) >> 56
    return bits.to(torch.uint8).view(torch.int64)


def unpacked(bits: Tensor, S: int) -> Tensor:
    """The inverse of `packed`."""
    each = bits.unsqueeze(-1).bitwise_right_shift(torch.arange(64, device=bits.device)) & 1
    return each.flatten(-2)[..., :S].bool()


class _Columns(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scorer: Scorer, cu_seqlens: Tensor, region_lengths: Tensor | None, image: Tensor, *rest):
        words, *parameters = rest
        ctx.scorer, ctx.as_now, ctx.S, ctx.bits = scorer, _recompute.as_now(image.device.type), 0, []
        ctx.save_for_backward(cu_seqlens, region_lengths, image, *rest)
        columns = [image.new_empty(len(image), 0)]
        for length, own, at in _captions(cu_seqlens, words):
            kept = scorer.draw(length)
            ctx.S = kept.shape[-1]
            ctx.bits.append(packed(kept))
            if scorer.whole is None:
                columns.append(scorer.run(length, own, region_lengths, kept, image, words[at], *parameters))
        if scorer.whole is None or not ctx.bits:
            return torch.cat(columns, 1)
        return scorer.whole(torch.cat(ctx.bits, -2))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor):
        cu_seqlens, region_lengths, *tensors = ctx.saved_tensors
        needs = ctx.needs_input_grad[3:]
        cut = _matched if grad.is_cpu and _recompute.few(grad) else _columns
        blocks = cut(ctx, grad, cu_seqlens, region_lengths, *tensors)
        found = iter(ctx.as_now(_recompute.backward, blocks, tensors, needs, grad))
        return None, None, None, *(next(found).to(x.dtype) if need else None for x, need in zip(tensors, needs))


def _columns(ctx: Any, grad: Tensor, cu_seqlens: Tensor, region_lengths: Tensor | None, image: Tensor, *rest: Tensor):
    """A block for each caption, with the images with which its score has a gradient."""
    words, *parameters = rest
    scored = grad.ne(0)
    rows_of = scored.t().nonzero()[:, 1].split(scored.sum(0).tolist())  # of all captions, so a GPU is awaited once
    for t, ((length, own, at), rows) in enumerate(zip(_captions(cu_seqlens, words), rows_of, strict=True)):
        if len(rows):
            counts = None if region_lengths is None else region_lengths[rows]
            kept = unpacked(ctx.bits[t][rows], ctx.S)
            yield _recompute.Block(
                ((rows,), (at,), *[()] * len(parameters)),
                (rows, slice(t, t + 1)),
                lambda *args, given=(length, own, counts, kept): ctx.scorer.run(*given, *args),
            )


def _matched(ctx: Any, grad: Tensor, cu_seqlens: Tensor, region_lengths: Tensor | None, *tensors: Tensor):
    """Blocks of the pairs whose score has a gradient, from several captions."""

    def run(pairs: Pairs, *args: Tensor) -> Tensor:
        bits = [ctx.bits[t][i] for i, t in zip(pairs.images.tolist(), pairs.captions.tolist(), strict=True)]
        return ctx.scorer.pairs(pairs, unpacked(torch.stack(bits), ctx.S), *args)

    axes = "IN" + "." * (len(tensors) - 2)
    return matched(axes, ctx.scorer.pair_bytes, run, grad, *tensors, cu_seqlens, region_lengths)


def _captions(cu_seqlens: Tensor, words: Tensor):
    """Each caption's length, its cu_seqlens alone [2], and its rows in `words`."""
    edge = bounds(cu_seqlens, len(words), "cu_seqlens")
    for t, (start, stop) in enumerate(pairwise(edge)):
        yield stop - start, cu_seqlens[t : t + 2] - start, slice(start, stop)
