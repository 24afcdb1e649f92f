"""Blocks of pairs from their features to their scores, around a head: equations in `ops/_pair_score.py`.

A block is some images and some captions of one length. Its nodes go through the head while they are still in cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from ..._checks import work_dtype
from ...packing import bounds, runs, spans
from .. import _attention, _recompute
from .._pair_score import NORM
from ._linear import linear
from .cross_attention_similarity import similarity

TILES = 2  # forward, some forty operations a block: their fixed cost is halved, and a block still fits the last cache
Head = Callable[..., Tensor]  # (rows a pair, nodes [b, c * rows, S], the head's parameters) -> z [b, c, S]


def cut(
    op: str,
    backward: bool,
    head: Head,
    copies: int,
    tensors: Sequence[Tensor],
    cu_seqlens: Tensor,
    region_lengths: Tensor | None,
    scale: float,
) -> Iterator[_recompute.Block]:
    """Blocks over `tensors`: the first eight arguments of the op, the head's parameters, and those of the score.

    `copies` is how many [L + 1, S] temporaries of a pair the head holds at once, forward.
    """
    image, _, words, _, weight, *parameters = tensors
    (I, _, D), S, work = image.shape, len(weight), work_dtype(image)
    edge = bounds(cu_seqlens, len(words), op)
    _attention.region_counts(region_lengths, image, op)
    limit = _recompute.tile_bytes(image.device, backward, 1 if backward else TILES) // work.itemsize
    for run in runs(edge, image.device, _recompute.MIN_QUERIES):
        pair = max(2 * run.length * D, (copies + 1) * (run.length + 1) * S) + 2 * D
        for images in spans(I, max(1, limit // (run.size * pair))):
            lengths = None if region_lengths is None else region_lengths[images]
            yield _recompute.Block(
                ((images,), (images,), (run.rows,), (run.captions,), (), *[()] * len(parameters)),
                (images, run.captions),
                partial(_score, head, run.length, lengths, scale),
            )


def nodes(
    length, region_lengths, scale, image, image_global, words, caption_global, local_weight, local_bias,
    global_weight, global_bias,
) -> Tensor:  # fmt: skip
    """A block of images and of captions of one length: [b, c * (length + 1), S], global vectors first."""
    work = work_dtype(image)
    local = similarity("t2i", NORM, scale, length, region_lengths, image, words, local_weight, local_bias)
    difference = image_global.to(work)[:, None] - caption_global.to(work)
    square = difference.square() if torch.is_grad_enabled() else difference.square_()
    b, c, D = square.shape
    overall = linear(square.view(b * c, D), global_weight.to(work), global_bias.to(work))
    overall = _attention.l2norm(overall).view(b, c, 1, -1)
    return torch.cat([overall, local.view(b, c, length, -1)], 2).view(b, c * (length + 1), -1)


def _score(head, length, region_lengths, scale, *parameters) -> Tensor:
    *head_parameters, score_weight, score_bias = parameters[8:]
    z = head(length + 1, nodes(length, region_lengths, scale, *parameters[:8]), *head_parameters)
    return (z @ score_weight.to(z.dtype) + score_bias.to(z.dtype)).sigmoid()
