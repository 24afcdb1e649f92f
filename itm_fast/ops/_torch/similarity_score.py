"""The pair scorers around a head in batched PyTorch: blocks of pairs from their features to their scores.

A block is some images and some captions of one length. Its nodes go through the head while they are still in cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from ..._checks import work_dtype
from ...packing import bounds, region_counts, runs, spans
from .. import _recompute
from .._declare import empty
from . import similarity_filter, similarity_graph
from .similarity_nodes import nodes

TILES = 2  # forward: of some forty operations a block; twice the size halves their overhead and still fits the cache
Head = Callable[..., Tensor]  # (rows a pair, nodes [b, c * rows, S], the head's parameters) -> z [b, c, S]


def similarity_graph_score(*args) -> Tensor:
    tensors = *args[:8], *similarity_graph.Folded(args[8:14]).values, *args[14:16]
    blocks = _graph_blocks(False, tensors, args)
    return _recompute.forward(blocks, tensors, empty("similarity_graph_score", *args))


def similarity_graph_score_recorded(needs: list[bool], *args) -> tuple[Tensor, Any]:
    score, folded = empty("similarity_graph_score", *args), similarity_graph.Folded(args[8:14], needs[8:14])
    tensors, wanted = _folded(folded, needs, args)
    kept = _recompute.forward_recorded(_graph_blocks(True, tensors, args), tensors, wanted, score)
    return score, None if kept is None else (folded, kept)


def similarity_graph_score_backward(grad: Tensor, needs: list[bool], *args, record: Any = None) -> list[Tensor]:
    folded, kept = record or (similarity_graph.Folded(args[8:14], needs[8:14]), None)
    tensors, wanted = _folded(folded, needs, args)
    blocks = kept or _recompute.recorded(_graph_blocks(True, tensors, args), tensors, wanted)
    found = _recompute.differentiate(blocks, tensors, wanted, grad)
    start, stop = sum(needs[:8]), sum(needs[:8]) + sum(folded.needs)
    return [*found[:start], *folded.gradients(found[start:stop]), *found[stop:]]


def _folded(folded: similarity_graph.Folded, needs: list[bool], args) -> tuple[tuple[Tensor, ...], list[bool]]:
    """The tensors of the blocks, and which of them need a gradient."""
    return (*args[:8], *folded.values, *args[14:16]), [*needs[:8], *folded.needs, *needs[14:]]


def _graph_blocks(backward, tensors, args):
    head, copies = similarity_graph.reason, similarity_graph.COPIES
    return _cut("similarity_graph_score", backward, head, copies, tensors, *args[16:])


def similarity_filter_score(*args) -> Tensor:
    return _recompute.forward(_filter_blocks(False, *args), args[:14], empty("similarity_filter_score", *args))


def similarity_filter_score_recorded(needs: list[bool], *args) -> tuple[Tensor, Any]:
    score = empty("similarity_filter_score", *args)
    return score, _recompute.forward_recorded(_filter_blocks(True, *args), args[:14], needs, score)


def similarity_filter_score_backward(grad: Tensor, needs: list[bool], *args, record: Any = None) -> list[Tensor]:
    blocks = record or _recompute.recorded(_filter_blocks(True, *args), args[:14], needs)
    return _recompute.differentiate(blocks, args[:14], needs, grad)


def _filter_blocks(backward, *args):
    running_mean, running_var, cu_seqlens, region_lengths, scale, eps, output = args[14:]

    def head(*block) -> Tensor:
        return similarity_filter.filtered(running_mean, running_var, False, eps, *block)[0]

    copies, rest = similarity_filter.COPIES, (cu_seqlens, region_lengths, scale, output)
    return _cut("similarity_filter_score", backward, head, copies, args[:14], *rest)


def _cut(
    op: str,
    backward: bool,
    head: Head,
    copies: int,
    tensors: Sequence[Tensor],
    cu_seqlens: Tensor,
    region_lengths: Tensor | None,
    scale: float,
    output: str,
) -> Iterator[_recompute.Block]:
    """Blocks over `tensors`: the first eight arguments of the op, the head's parameters, and those of the score.

    `copies` is how many [L + 1, S] temporaries of a pair the head holds at once, forward.
    """
    image, _, words, _, weight, *parameters = tensors
    (I, _, D), S, work = image.shape, len(weight), work_dtype(image)
    edge = bounds(cu_seqlens, len(words), op)
    region_counts(region_lengths, image, op)
    limit = _recompute.tile_bytes(image.device, backward, 1 if backward else TILES) // work.itemsize
    for run in runs(edge, image.device, _recompute.MIN_QUERIES):
        pair = max(2 * run.length * D, (copies + 1) * (run.length + 1) * S) + 2 * D
        for images in spans(I, max(1, limit // (run.size * pair))):
            lengths = None if region_lengths is None else region_lengths[images]
            yield _recompute.Block(
                ((images,), (images,), (run.rows,), (run.captions,), (), *[()] * len(parameters)),
                (images, run.captions),
                partial(_score, head, run.length, lengths, scale, output),
            )


def _score(head, length, region_lengths, scale, output, *parameters) -> Tensor:
    *head_parameters, score_weight, score_bias = parameters[8:]
    z = head(length + 1, nodes(length, region_lengths, scale, *parameters[:8]), *head_parameters)
    logit = z @ score_weight.to(z.dtype) + score_bias.to(z.dtype)
    return logit if output == "logit" else logit.sigmoid()
