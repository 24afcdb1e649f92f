"""`cross_attention_score`: equations (1) to (3) of `ops/cross_attention_score.py`, and its backward (8) to (11).

A piece of all pairs at a time: their affinities by `_affinity`, the attention's r by `_attention`, and their scores.
The queries are the words and the contexts the regions (t2i), or the other way round.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._workspace import scratch_bytes
from ..packing import bounds
from . import _attention, _launch, _tiles
from ._affinity import lengths

COPIES = 3  # floats for a query row with a context row: the affinity, its norm and r, which is as many where sets are single rows


def _sets(image: Tensor, words: Tensor, cu_seqlens: Tensor, region_lengths: Tensor | None, direction: str):
    """The sets of queries and of contexts."""
    edge = bounds(cu_seqlens, len(words), "cross_attention_score")
    images, captions = _launch.regions(image, region_lengths), _launch.captions(words, cu_seqlens, edge)
    return (captions, images) if direction == "t2i" else (images, captions)


def forward(
    image: Tensor,
    words: Tensor,
    cu_seqlens: Tensor,
    region_lengths: Tensor | None,
    direction: str,
    affinity_norm: str,
    scale: float,
    pool: str,
    pool_scale: float,
) -> Tensor:
    """Scores [I, T]."""
    score = image.new_empty(image.shape[0], len(cu_seqlens) - 1)
    with _launch.on(image.device):
        query, context = _sets(image, words, cu_seqlens, region_lengths, direction)
        length = lengths(query.rows)
        out = score if direction == "t2i" else score.t()
        norm, done = _attention.norm_of(affinity_norm), None
        for piece in _launch.pieces(query, context, COPIES, scratch_bytes(image.device), _tiles.PIECE):
            if done != piece.contexts:
                gram, done = _attention.grams(context, piece), piece.contexts
            r = _attention.attend("score", query, context, piece, gram, length, norm, scale).out
            _attention.pool(r, query, piece, out, pool, pool_scale)
    return score
