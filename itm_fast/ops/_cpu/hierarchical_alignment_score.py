"""`hierarchical_alignment_score` in C++: csrc/cpu/hierarchical_alignment_score.cpp; backward is the torch backend's."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _native
from .._torch.hierarchical_alignment_score import backward
from . import DTYPES, lengths

__all__ = ["backward", "forward"]

OP = "hierarchical_alignment_score"


def forward(*args) -> Tensor:
    tensors, (cu_seqlens, region_lengths, direction, scale, pool, local_mix, global_mix) = args[:8], args[8:]
    image, image_key, image_gate, words = tensors[:4]
    (I, R, D), P, K = image.shape, image_key.shape[2], image_gate.shape[3]
    edge, counts = lengths(OP, image, words, cu_seqlens, region_lengths)
    score = image.new_empty(I, len(edge) - 1)
    _native.call(
        OP,
        *(x.contiguous() for x in tensors),
        DTYPES[image.dtype],
        *(I, R, D, P, K, len(edge) - 1),
        edge,
        counts,
        direction != "t2i",
        direction != "i2t",
        scale,
        pool == "mean",
        local_mix,
        global_mix,
        score,
        torch.get_num_threads(),
    )
    return score
