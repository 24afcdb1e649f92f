"""`similarity_graph_score` in Triton: equations in `ops/similarity_graph_score.py`.

For each block of images and captions, `_nodes` computes the nodes, `_graph` all steps and the scores. Scratch: three
copies of a block's nodes, and its attention.
"""

from __future__ import annotations

from torch import Tensor

from itm_fast.packing import node_bounds

from . import _graph, _launch
from ._nodes import Maker, image_bytes, word_bytes

OP = "similarity_graph_score"


def forward(
    image: Tensor, image_global: Tensor, words: Tensor, caption_global: Tensor,
    local_weight: Tensor, local_bias: Tensor, global_weight: Tensor, global_bias: Tensor,
    query_weight: Tensor, query_bias: Tensor, key_weight: Tensor, key_bias: Tensor, value_weight: Tensor,
    value_bias: Tensor, score_weight: Tensor, score_bias: Tensor,
    cu_seqlens: Tensor, region_lengths: Tensor | None, scale: float,
) -> Tensor:  # fmt: skip
    """Scores [I, T]; key_bias has no effect on them."""
    (I, R, _), T, S = image.shape, len(caption_global), len(local_weight)
    score = image.new_empty(I, T)
    with _launch.on(image.device):
        make = Maker(
            OP, image, image_global, words, caption_global, local_weight, local_bias, global_weight, global_bias,
            cu_seqlens, region_lengths, scale,
        )  # fmt: skip
        weights = _graph.fold(query_weight, query_bias, key_weight, value_weight, value_bias)
        room = _graph.node_bytes(S, image.dtype, 1 + min(2, len(query_weight) - 1)) + word_bytes(R)
        edge, ends = node_bounds(cu_seqlens), (_launch.aligned(score_weight), _launch.aligned(score_bias))
        for first, block in _graph.blocks(I, edge, len(words) + T, OP, _graph.sizes(weights), room, image_bytes(R)):
            x = make.block(first, block)
            _graph.reason(weights, x, _graph.Rows(score, first, T, 0), block, ends)
    return score
