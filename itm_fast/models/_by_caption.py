"""Scores of a batch, for which dropout is drawn one caption at a time with all images, as in published loops.

Saved for backward: what dropout kept, a bit for each number. Everything else is computed again, only for pairs whose
score has a gradient, under the hardest-negative loss about three of each caption; or, of few pairs, kept as autograd
records it.

The bits are outside the scratch limit: bytes for each image and caption, an eighth of steps times queries + 1 times S
rounded up to 64. 1,024 images of 36 regions that attend to 1,024 captions take 2.3 GiB at S 256 and 2 steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops import _recompute
from ..ops._torch._groups import Padding
from ..packing import bounds
from ._pair_blocks import Joined, Pairs, blocks, matched


class Scorer(NamedTuple):
    """What a pair scorer gives to `score`.

    Attributes:
        shape: words of a caption -> (..., rows, S), of what dropout keeps of a pair.
        draw: words of a caption -> what dropout keeps of it with all images, bool [I, ..., rows, S].
        run: (`Joined`, cu_seqlens, region_lengths, kept [b, ..., rows, S], image, words, *parameters) -> scores [b, c],
            of some images with some captions, whose rows of `kept` follow each other.
        pairs: (`Pairs`, kept [P, ..., rows, S], image, words, *parameters) -> scores of P pairs.
        pair_bytes: words of a caption -> bytes that a pair takes in float32, forward.
        whole: (bits of all captions, `packed`, their rows side by side, cu_seqlens, region_lengths, image, words,
            *parameters) -> scores [I, T], or None if only `run` can.

    They live as long as the scores, so they must hold no tensors of their own but the model's.
    """

    shape: Callable[[int], tuple[int, ...]]
    draw: Callable[[int], Tensor]
    run: Callable[..., Tensor]
    pairs: Callable[..., Tensor]
    pair_bytes: Callable[[int], int]
    whole: Callable[..., Tensor] | None


def score(
    scorer: Scorer,
    image: Tensor,
    words: Tensor,
    cu_seqlens: Tensor,
    region_lengths: Tensor | None,
    parameters: tuple[Tensor, ...],
    numbers: int,
) -> Tensor:
    """Differentiable scores [I, T] of images [I, R, D] and packed captions [N, D]; `numbers`: see `records`."""
    tensors = image, words, *parameters
    record = torch.is_grad_enabled() and _recompute.records(image, len(cu_seqlens) - 1, numbers)
    return _Columns.apply(scorer, record, cu_seqlens, region_lengths, *tensors)


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
    def forward(ctx: Any, scorer: Scorer, record: bool, cu_seqlens: Tensor, region_lengths: Tensor | None, *tensors):
        image, words, *_ = tensors
        ctx.scorer, ctx.as_now = scorer, _recompute.as_now(image.device.type)
        *steps, _, S = scorer.shape(0)
        size = (len(image), *steps, _rows(scorer, cu_seqlens, words)[-1], -(-S // 64))
        bits = torch.empty(size, dtype=torch.int64, device=image.device)
        for length, _, _, rows in _captions(scorer, cu_seqlens, words):
            bits[..., rows, :] = packed(scorer.draw(length))
        ctx.save_for_backward(bits, cu_seqlens, region_lengths, *tensors)
        ctx.kept, needs = None, ctx.needs_input_grad[4:]
        if scorer.whole is not None and len(cu_seqlens) > 1:
            return scorer.whole(bits, cu_seqlens, region_lengths, *tensors)
        score = image.new_empty(len(image), len(cu_seqlens) - 1)
        record = record and any(needs)
        found = _rectangles(scorer, bits, record, cu_seqlens, region_lengths, *tensors)
        if not record:
            return _recompute.forward(found, tensors, score)
        ctx.kept = _recompute.forward_recorded(found, tensors, needs, score)
        return score

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        _recompute.refuse_second("this model's score")
        bits, cu_seqlens, region_lengths, *tensors = ctx.saved_tensors
        needs, (kept, ctx.kept) = ctx.needs_input_grad[4:], (ctx.kept, None)
        if kept is not None:
            gradients = ctx.as_now(_recompute.differentiate, kept, tensors, needs, grad)
        else:
            given = cu_seqlens, region_lengths, *tensors
            if _recompute.few_pairs(grad, _recompute.FEW_ALONE):
                again = (_matched if grad.is_cpu else _columns)(ctx.scorer, bits, grad, *given)
            else:
                again = _rectangles(ctx.scorer, bits, True, *given)
            gradients = ctx.as_now(_recompute.backward, again, tensors, needs, grad)
        found = iter(gradients)
        return *[None] * 4, *(next(found).to(x.dtype) if need else None for x, need in zip(tensors, needs))


def _axes(tensors: Sequence[Tensor]) -> str:
    return "IN" + "." * (len(tensors) - 2)


def _rectangles(scorer: Scorer, bits: Tensor, backward: bool, cu_seqlens: Tensor, region_lengths, *tensors):
    """Blocks of some images with some captions."""
    start, S = _rows(scorer, cu_seqlens, tensors[1]), scorer.shape(0)[-1]

    def run(of: Joined, own: Tensor, counts: Tensor | None, *args: Tensor) -> Tensor:
        rows = torch.tensor([row for t in of.captions for row in range(start[t], start[t + 1])])
        kept = bits[of.images].index_select(-2, rows.to(bits.device))
        return scorer.run(of, own, counts, unpacked(kept, S), *args)

    given = *tensors, cu_seqlens, region_lengths
    return blocks("cu_seqlens", _axes(tensors), scorer.pair_bytes, run, backward, *given, joined=True)


def _columns(scorer: Scorer, bits: Tensor, grad: Tensor, cu_seqlens: Tensor, region_lengths: Tensor | None, *tensors):
    """A block for each caption, with the images with which its score has a gradient."""
    _, words, *parameters = tensors
    scored = grad.ne(0)
    images_of = scored.t().nonzero()[:, 1].split(scored.sum(0).tolist())  # of all captions, so a GPU is awaited once
    captions = _captions(scorer, cu_seqlens, words)
    for t, ((length, own, at, rows), images) in enumerate(zip(captions, images_of, strict=True)):
        if len(images):
            counts = None if region_lengths is None else region_lengths[images]
            kept = unpacked(bits[..., rows, :][images], scorer.shape(length)[-1])
            of = Joined(images, [t], Padding([length], words.device))
            yield _recompute.Block(
                ((images,), (at,), *[()] * len(parameters)),
                (images, slice(t, t + 1)),
                lambda *args, given=(of, own, counts, kept): scorer.run(*given, *args),
            )


def _matched(scorer: Scorer, bits: Tensor, grad: Tensor, cu_seqlens: Tensor, region_lengths: Tensor | None, *tensors):
    """Blocks of the pairs whose score has a gradient, from several captions."""
    start = _rows(scorer, cu_seqlens, tensors[1])

    def run(pairs: Pairs, *args: Tensor) -> Tensor:
        *_, rows, S = scorer.shape(pairs.length)
        of = zip(pairs.images.tolist(), pairs.captions.tolist(), strict=True)
        kept = torch.stack([bits[i][..., start[t] : start[t] + rows, :] for i, t in of])
        return scorer.pairs(pairs, unpacked(kept, S), *args)

    return matched(_axes(tensors), scorer.pair_bytes, run, grad, *tensors, cu_seqlens, region_lengths)


def _rows(scorer: Scorer, cu_seqlens: Tensor, words: Tensor) -> list[int]:
    """Where each caption's rows of bits start, and where the last one's end."""
    edge = bounds(cu_seqlens, len(words), "cu_seqlens")
    return [0, *accumulate(scorer.shape(stop - start)[-2] for start, stop in pairwise(edge))]


def _captions(scorer: Scorer, cu_seqlens: Tensor, words: Tensor):
    """Each caption's length, its cu_seqlens alone [2], its rows in `words` and its rows of bits."""
    edge = bounds(cu_seqlens, len(words), "cu_seqlens")
    for t, ((start, stop), rows) in enumerate(zip(pairwise(edge), pairwise(_rows(scorer, cu_seqlens, words)))):
        yield stop - start, cu_seqlens[t : t + 2] - start, slice(start, stop), slice(*rows)
