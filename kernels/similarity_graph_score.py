"""`similarity_graph_score` in Triton: equations in `ops/similarity_graph_score.py`.

Forward: blocks of images x windows of captions; their nodes by `_nodes`, all steps and the scores by `_graph`. Three
copies of a block's nodes and its attention are all it holds.
"""

from __future__ import annotations

from torch import Tensor

from itm_fast.packing import node_bounds

from . import _graph, _launch
from ._nodes import Maker, image_bytes, word_bytes

OP = "similarity_graph_score"


def forward(*args) -> Tensor:
    image, _, words, caption_global, weight = args[:5]
    query_weight, query_bias, key_weight, _, value_weight, value_bias, *end = args[8:16]
    (I, R, _), T, S = image.shape, len(caption_global), len(weight)
    score = image.new_empty(I, T)
    with _launch.on(image.device):
        make = Maker(OP, *args[:8], *args[16:])
        weights = _graph.fold(query_weight, query_bias, key_weight, value_weight, value_bias)
        room = _graph.node_bytes(S, image.dtype, 1 + min(2, len(query_weight) - 1)) + word_bytes(R)
        edge, ends = node_bounds(args[16]), (_launch.aligned(end[0]), _launch.aligned(end[1]))
        for first, block in _graph.blocks(I, edge, len(words) + T, OP, _graph.sizes(weights), room, image_bytes(R)):
            x = make.block(first, block)
            _graph.reason(weights, x, _graph.Rows(score, first, T, 0), block, ends)
    return score
