"""`similarity_filter_score` in Triton: equations in `ops/similarity_filter_score.py`.

For each block of images and captions, `_nodes` computes the nodes and `_filter` the scores. Scratch: one copy of a
block's nodes, and its attention.
"""

from __future__ import annotations

from torch import Tensor

from itm_fast.packing import node_bounds

from . import _filter, _graph, _launch
from ._nodes import Maker, image_bytes, word_bytes

OP = "similarity_filter_score"


def forward(
    image: Tensor, image_global: Tensor, words: Tensor, caption_global: Tensor,
    local_weight: Tensor, local_bias: Tensor, global_weight: Tensor, global_bias: Tensor,
    weight: Tensor, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor, score_weight: Tensor, score_bias: Tensor,
    running_mean: Tensor, running_var: Tensor,
    cu_seqlens: Tensor, region_lengths: Tensor | None, scale: float, eps: float,
) -> Tensor:  # fmt: skip
    """Scores [I, T]."""
    (I, R, _), T, S = image.shape, len(caption_global), len(local_weight)
    score = image.new_empty(I, T)
    with _launch.on(image.device):
        make = Maker(
            OP, image, image_global, words, caption_global, local_weight, local_bias, global_weight, global_bias,
            cu_seqlens, region_lengths, scale,
        )  # fmt: skip
        given = _filter.parameters(weight, bias, norm_weight, norm_bias, running_mean, running_var)
        room = S * image.dtype.itemsize + word_bytes(R)
        edge, ends = node_bounds(cu_seqlens), (_launch.aligned(score_weight), _launch.aligned(score_bias))
        for first, block in _graph.blocks(I, edge, len(words) + T, OP, (), room, image_bytes(R)):
            x, to = make.block(first, block), _graph.Rows(score, first, T, 0)
            start, captions = block.plan.start, block.window.captions
            _filter.filtered(given, x, to, start, block.images, captions, False, eps, ends)
    return score
