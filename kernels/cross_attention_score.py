"""`cross_attention_score`: equations (1) to (3) of `ops/cross_attention_score.py`, and its backward (8) to (11).

A piece of all pairs at a time: their affinities by `_affinity`, the attention's r by `_attention`, and their scores.
The queries are the words and the contexts the regions (t2i), or the other way round.
"""

from __future__ import annotations

from torch import Tensor

from itm_fast._workspace import scratch_bytes

from . import _attention, _launch, _tiles
from ._affinity import lengths

OP = "cross_attention_score"


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
        query, context = _launch.sets(OP, image, words, cu_seqlens, region_lengths, direction)
        length, norm = lengths(query.rows), _attention.norm_of(affinity_norm)
        out = score if direction == "t2i" else score.t()
        pieces = _launch.pieces(query, context, _attention.COPIES, scratch_bytes(image.device), _tiles.PIECE)
        for piece, gram in _attention.with_grams(context, pieces):
            r = _attention.attend("score", query, context, piece, gram, length, norm, scale).out
            _attention.pool(r, query, piece, out, pool, pool_scale)
    return score
