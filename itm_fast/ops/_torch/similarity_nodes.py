"""`similarity_nodes` in batched PyTorch, some images and some captions of one length at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from ..._checks import work_dtype
from ...packing import Index, bounds, region_counts, runs, spans
from .. import _attention, _recompute
from .._declare import empty
from ._linear import linear
from .cross_attention_similarity import similarity


def forward(*args) -> tuple[Tensor, Tensor]:
    result, kept = empty("similarity_nodes", *args)
    return _recompute.forward(_cut(False, *args), args[:8], result), kept


def backward(grad: Tensor, needs: list[bool], *args, results: Sequence[Tensor]) -> list[Tensor]:
    return _recompute.backward(_cut(True, *args), args[:8], needs, grad)


def _cut(backward: bool, *args) -> Iterator[_recompute.Block]:
    image, _, words, _, weight, *_, cu_seqlens, region_lengths, scale = args
    (I, _, D), S, work = image.shape, len(weight), work_dtype(image)
    edge = bounds(cu_seqlens, len(words), "similarity_nodes")
    region_counts(region_lengths, image, "similarity_nodes")
    limit = _recompute.tile_bytes(image.device, backward) // work.itemsize
    for run in runs([start + t for t, start in enumerate(edge)], image.device, _recompute.MIN_QUERIES):
        length = run.length - 1
        at = run.captions
        if isinstance(at, slice):
            words_at: Index = slice(edge[at.start], edge[at.stop])
        else:
            node = torch.as_tensor(run.rows).view(-1, run.length)
            words_at = (node[:, 1:] - at[:, None] - 1).flatten()
        pair = run.length * (2 * D + S)
        for images in spans(I, max(1, limit // (run.size * pair))):
            lengths = None if region_lengths is None else region_lengths[images]
            yield _recompute.Block(
                ((images,), (images,), (words_at,), (at,), (), (), (), ()),
                (images, run.rows),
                partial(nodes, length, lengths, scale),
            )


def nodes(
    length, region_lengths, scale, image, image_global, words, caption_global, local_weight, local_bias,
    global_weight, global_bias,
) -> Tensor:  # fmt: skip
    """A block of images and of captions of one length: [b, c * (length + 1), S], global vectors first."""
    work = work_dtype(image)
    like = "t2i", "clipped_l2norm", scale, length, region_lengths
    local = similarity(*like, image, words, local_weight, local_bias)
    difference = image_global.to(work)[:, None] - caption_global.to(work)
    square = difference.square() if torch.is_grad_enabled() else difference.square_()
    b, c, D = square.shape
    overall = linear(square.view(b * c, D), global_weight.to(work), global_bias.to(work))
    overall = _attention.l2norm(overall).view(b, c, 1, -1)
    return torch.cat([overall, local.view(b, c, length, -1)], 2).view(b, c * (length + 1), -1)
