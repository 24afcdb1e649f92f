"""`similarity_filter_score` in Triton: equations in `ops/similarity_filter_score.py`.

Forward: blocks of images x windows of captions; their nodes by `_nodes`, the scores by `_filter`. One copy of a block's
nodes and its attention are all it holds.
"""

from __future__ import annotations

from torch import Tensor

from itm_fast.packing import node_bounds

from . import _filter, _graph, _launch
from ._nodes import Maker, image_bytes, word_bytes

OP = "similarity_filter_score"


def forward(*args) -> Tensor:
    image, _, words, caption_global, weight = args[:5]
    cu_seqlens, eps = args[16], args[19]
    (I, R, _), T, S = image.shape, len(caption_global), len(weight)
    score = image.new_empty(I, T)
    with _launch.on(image.device):
        make = Maker(OP, *args[:8], *args[16:19])
        given = _filter.parameters(*args[8:12], *args[14:16])
        room = S * image.dtype.itemsize + word_bytes(R)
        edge, ends = node_bounds(cu_seqlens), (_launch.aligned(args[12]), _launch.aligned(args[13]))
        for first, block in _graph.blocks(I, edge, len(words) + T, OP, (), room, image_bytes(R)):
            x, to = make.block(first, block), _graph.Rows(score, first, T, 0)
            start, captions = block.plan.start, block.window.captions
            _filter.filtered(given, x, to, start, block.images, captions, False, eps, ends)
    return score
