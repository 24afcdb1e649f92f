"""`similarity_nodes` in batched PyTorch, some images and some captions of one length at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from ..._checks import work_dtype
from ...packing import Index, bounds, region_counts, runs, spans, valid
from .. import _attention, _recompute
from .._declare import empty
from ._attention import scaled
from ._linear import linear
from .cross_attention_similarity import squares

TILES = 2  # a block of twice the size costs half the calls: measured, a seventh less time in a training step of SAF


def forward(*args) -> tuple[Tensor, Tensor]:
    result, inverse = empty("similarity_nodes", *args)
    for block in _cut(False, *args):
        found, kept = block.function(*(a[at] for a, at in zip(args, block.inputs)))
        result[block.result], inverse[block.result] = found.to(result.dtype), kept.to(inverse.dtype)
    return result, inverse


def backward(grad: Tensor, needs: list[bool], *args, results: Sequence[Tensor]) -> list[Tensor]:
    def known(block: _recompute.Block) -> _recompute.Block:
        kept = tuple(x[block.result] for x in results)
        return block._replace(function=lambda *inputs: block.function(*inputs, known=kept)[0])

    return _recompute.backward(map(known, _cut(True, *args)), args[:8], needs, grad)


def _cut(backward: bool, *args) -> Iterator[_recompute.Block]:
    image, _, words, _, weight, *_, cu_seqlens, region_lengths, scale = args
    (I, _, D), S, work = image.shape, len(weight), work_dtype(image)
    edge = bounds(cu_seqlens, len(words), "similarity_nodes")
    region_counts(region_lengths, image, "similarity_nodes")
    limit = _recompute.tile_bytes(image.device, backward, TILES) // work.itemsize
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
                partial(_nodes, length, lengths, scale),
            )


def nodes(length: int, region_lengths: Tensor | None, scale: float, *tensors: Tensor) -> Tensor:
    """A block of images and of captions of one length: [b, c * (length + 1), S], global vectors first."""
    return _nodes(length, region_lengths, scale, *tensors)[0]


def _nodes(
    length, region_lengths, scale, image, image_global, words, caption_global, local_weight, local_bias,
    global_weight, global_bias, known=None,
):  # fmt: skip
    """The nodes of a block, and 1 / (|y| + eps) of each; where both are `known`, y is not computed."""
    work = work_dtype(image)
    local = squares("t2i", "clipped_l2norm", scale, length, region_lengths, image, words)
    difference = image_global.to(work)[:, None, None] - caption_global.to(work)[:, None]
    overall = difference.square() if torch.is_grad_enabled() else difference.square_()
    given = (overall, global_weight, global_bias), (local, local_weight, local_bias)
    layers = [(x, weight.to(work), bias.to(work)) for x, weight, bias in given]
    b, c = overall.shape[:2]
    if known is None:
        y = torch.cat([linear(*layer) for layer in layers], 2).flatten(1, 2)
        length_y = torch.linalg.vector_norm(y, dim=-1, keepdim=True) + _attention.EPS
        return y / length_y, length_y.reciprocal().squeeze(-1)
    result, inverse = (x.to(work).unflatten(1, (c, length + 1)) for x in known)
    at = slice(0, 1), slice(1, None)
    parts = [_Known.apply(*layer, result[:, :, rows], inverse[:, :, rows]) for layer, rows in zip(layers, at)]
    return torch.cat(parts, 2).flatten(1, 2), inverse


def numbers_of_pair(R: int, D: int, S: int, L: int) -> int:
    """What `nodes_of_pairs` and its gradients hold at once of a pair, counted in runs at sizes where one term prevails:
    copies of the regions, of a caption padded to L words, of affinities, and of nodes."""
    return 3 * R * D + 9 * L * D + 5 * R * L + 8 * (L + 1) * S


def nodes_of_pairs(
    image, image_global, words, caption_global, local_weight, local_bias, global_weight, global_bias,
    cu_seqlens, region_lengths, scale, pair_image, pair_caption, pair_bounds,
):  # fmt: skip
    """The nodes of single pairs, as `OF_PAIRS` has them; captions are padded, so that a GPU is called once for all.

    Features, which several pairs share, are taken by indexing, whose derivative sums in one order on a GPU; that of
    index_select sums in any, so it takes only what is named once. Inputs are float32 or float64, as sums are made in
    their dtype.
    """
    start, length = cu_seqlens[:-1].long()[pair_caption], cu_seqlens.diff().long()[pair_caption]
    column = torch.arange(int(length.max()), device=image.device)
    real = column < length[:, None]
    at = real.flatten().nonzero().flatten()  # the words among those of the padded captions
    query = words[(start[:, None] + column).flatten()[at]]
    context = image[pair_image]
    mask = None if region_lengths is None else valid(region_lengths[pair_image], image.shape[1])[:, :, None]
    if mask is not None:
        context = context.masked_fill(~mask, 0.0)
    padded = query.new_zeros(real.numel(), query.shape[1]).index_copy(0, at, query).unflatten(0, real.shape)
    logits = scaled(torch.bmm(context, padded.mT), "clipped_l2norm", scale, None)
    if mask is not None:  # or P would be shorter, and its eps count for more
        logits = logits.masked_fill(~mask, float("-inf"))
    attended = torch.bmm(logits.softmax(1).mT, context).flatten(0, 1).index_select(0, at)
    local = (_attention.l2norm(attended) - query).square()
    overall = (image_global[pair_image] - caption_global[pair_caption]).square()
    layers = (overall, global_weight, global_bias), (local, local_weight, local_bias)
    y = torch.cat([linear(*layer) for layer in layers])
    first = torch.zeros(len(y), dtype=torch.bool, device=y.device).index_fill_(0, pair_bounds[:-1], True)
    order = torch.where(first, first.cumsum(0) - 1, len(overall) + (~first).cumsum(0) - 1)
    return _attention.l2norm(y.index_select(0, order))


class _Known(torch.autograd.Function):
    """s = y / (|y| + eps) with y = W x + b, where s and 1 / (|y| + eps) are known: y is not computed.

    d y = (d s - s (s . d s) (|y| + eps) / |y|) / (|y| + eps)
    """

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor, result: Tensor, inverse: Tensor) -> Tensor:
        return result.clone()

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, weight, _, result, inverse = inputs
        ctx.save_for_backward(x, weight, result, inverse)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight, result, inverse = ctx.saved_tensors
        inverse = inverse.unsqueeze(-1)
        # Where y = 0, s is 0 and so is this term.
        share = (grad * result).sum(-1, keepdim=True) / (1 - _attention.EPS * inverse).clamp_min(_attention.EPS)
        dy = torch.addcmul(grad, result, share, value=-1).mul_(inverse).flatten(0, -2)
        needs = ctx.needs_input_grad
        return (
            linear(dy, weight.t(), None).view_as(x) if needs[0] else None,
            dy.t() @ x.flatten(0, -2) if needs[1] else None,
            dy.sum(0) if needs[2] else None,
            None,
            None,
        )
