"""`cross_attention_similarity`: equations (1) to (7) of `ops/cross_attention_similarity.py`.

A piece of all pairs at a time: alpha by `_attention`, then everything over D in the one pass of `_projection`.
The queries are the words and the contexts the regions (t2i), or the other way round.
"""

from __future__ import annotations

import torch
from torch import Tensor

from itm_fast._workspace import scratch_bytes

from . import _attention, _launch, _tiles
from ._projection import project

OP = "cross_attention_similarity"


def forward(
    image: Tensor,
    words: Tensor,
    weight: Tensor,
    bias: Tensor,
    cu_seqlens: Tensor,
    region_lengths: Tensor | None,
    direction: str,
    affinity_norm: str,
    scale: float,
) -> Tensor:
    """Similarity vectors [I, N, S], or i2t [I, T, R, S]."""
    (I, R, _), S, N, T = image.shape, len(weight), len(words), len(cu_seqlens) - 1
    result = image.new_empty((I, N, S) if direction == "t2i" else (I, T, R, S))
    with _launch.on(image.device):
        query, context = _launch.sets(OP, image, words, cu_seqlens, region_lengths, direction)
        weight, bias, norm = _launch.aligned(weight), _launch.aligned(bias), _attention.norm_of(affinity_norm)
        place, out = places(result, direction)
        pieces = _launch.pieces(query, context, _attention.COPIES, scratch_bytes(image.device), _tiles.PIECE)
        for piece, gram in _attention.with_grams(context, pieces):
            attended = _attention.attend("weights", query, context, piece, gram, None, norm, scale)
            project(query, context, piece, attended, weight, bias, place, out, out_first=piece.contexts.start)
    return result


def places(result: Tensor, direction: str) -> tuple[Tensor, Tensor]:
    """The row of each query in a set of contexts' rows of the result, and the result as [sets, their rows, S]."""
    if direction == "t2i":
        return torch.arange(result.shape[1], device=result.device), result
    I, T, R, S = result.shape
    image = torch.arange(I, device=result.device)[:, None] * (T * R)
    return (image + torch.arange(R, device=result.device)).flatten(), result.view(I * T, R, S)
