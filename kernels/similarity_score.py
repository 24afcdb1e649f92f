"""The pair scorers around a head in Triton: equations in `ops/similarity_score.py`.

For each block of images and captions, `_nodes` computes the nodes, and the head, `_graph` or `_filter`, the scores.
Scratch: a block's nodes, three copies of them for the graph and one for the filter, and its attention.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from itm_fast.packing import node_bounds

from . import _filter, _graph, _launch
from ._nodes import Maker, image_bytes, word_bytes


def similarity_graph_score(
    image: Tensor, image_global: Tensor, words: Tensor, caption_global: Tensor,
    local_weight: Tensor, local_bias: Tensor, global_weight: Tensor, global_bias: Tensor,
    query_weight: Tensor, query_bias: Tensor, key_weight: Tensor, key_bias: Tensor, value_weight: Tensor,
    value_bias: Tensor, score_weight: Tensor, score_bias: Tensor,
    cu_seqlens: Tensor, region_lengths: Tensor | None, scale: float, output: str,
) -> Tensor:  # fmt: skip
    """Scores or logits [I, T]; key_bias has no effect on them."""
    nodes = (
        image, image_global, words, caption_global, local_weight, local_bias, global_weight, global_bias, cu_seqlens,
        region_lengths, scale,
    )  # fmt: skip
    with _launch.on(image.device):
        weights = _graph.fold(query_weight, query_bias, key_weight, value_weight, value_bias)
        end = _graph.End(_launch.aligned(score_weight), _launch.aligned(score_bias), output == "logit")

        def head(x: _graph.Rows, to: _graph.Rows, block: _graph.Block) -> None:
            _graph.reason(weights, x, to, block, end)

        node_bytes = _graph.node_bytes(len(local_weight), image.dtype, 1 + min(2, len(query_weight) - 1))
        return _scores("similarity_graph_score", nodes, head, node_bytes, _graph.sizes(weights))


def similarity_filter_score(
    image: Tensor, image_global: Tensor, words: Tensor, caption_global: Tensor,
    local_weight: Tensor, local_bias: Tensor, global_weight: Tensor, global_bias: Tensor,
    weight: Tensor, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor, score_weight: Tensor, score_bias: Tensor,
    running_mean: Tensor, running_var: Tensor,
    cu_seqlens: Tensor, region_lengths: Tensor | None, scale: float, eps: float, output: str,
) -> Tensor:  # fmt: skip
    """Scores or logits [I, T]."""
    nodes = (
        image, image_global, words, caption_global, local_weight, local_bias, global_weight, global_bias, cu_seqlens,
        region_lengths, scale,
    )  # fmt: skip
    with _launch.on(image.device):
        given = _filter.parameters(weight, bias, norm_weight, norm_bias, running_mean, running_var)
        end = _graph.End(_launch.aligned(score_weight), _launch.aligned(score_bias), output == "logit")

        def head(x: _graph.Rows, to: _graph.Rows, block: _graph.Block) -> None:
            captions = block.window.captions
            _filter.filtered(given, x, to, block.plan.start, block.images, captions, False, eps, end)

        node_bytes = len(local_weight) * image.dtype.itemsize
        return _scores("similarity_filter_score", nodes, head, node_bytes)


def _scores(
    op: str,
    nodes: Sequence[Any],
    head: Callable[[_graph.Rows, _graph.Rows, _graph.Block], None],
    node_bytes: int,
    sizes: tuple[int, ...] = (),
) -> Tensor:
    """Scores [I, T], block by block.

    Args:
        op: what errors name.
        nodes: the arguments of `similarity_nodes`.
        head: (x, to, block) turns the nodes x of a block into its scores, which are written into `to`.
        node_bytes: scratch of the nodes and of the head, for each node of an image.
        sizes: tile sizes of the head, for `_graph.blocks`.
    """
    image, _, words, caption_global, *_, cu_seqlens, _, _ = nodes
    (I, R, _), T = image.shape, len(caption_global)
    score = image.new_empty(I, T)
    make, edge, room = Maker(op, *nodes), node_bounds(cu_seqlens), node_bytes + word_bytes(R)
    for first, block in _graph.blocks(I, edge, len(words) + T, op, sizes, room, image_bytes(R)):
        x = make.block(first, block)
        head(x, _graph.Rows(score, first, T, 0), block)
    return score
