"""The queries whose right item ranks lowest, and what ranks first in its place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from .best import best_items
from .counting import Counts
from .encoding import Encoded
from .many_right import right_items
from .scoring import score_all
from .tie_rules import ranks_by

FIRST = 3  # items that are told of each query

Rows = Callable[[str, NDArray[np.int64]], NDArray[np.floating]]  # (side, queries) -> their scores [queries, items]


class WorstQuery(NamedTuple):
    """A query whose right item ranks low.

    Attributes:
        side: "i2t" if the query is an image, "t2i" if it is a caption.
        query: its index.
        rank: rank of its best right item, from 1.
        right, right_score: that item and its score.
        first: the items that rank first, with their scores.
    """

    side: str
    query: int
    rank: int
    right: int
    right_score: float
    first: tuple[tuple[int, float], ...]


def worst_queries(
    counts: Counts, pairs: NDArray[np.int64], ties: str, number: int, rows: Rows
) -> tuple[WorstQuery, ...]:
    """The queries of each direction with the highest rank, highest first; those at rank 1 are left out.

    Args:
        counts: of the score matrix.
        pairs: [2, P], its right pairs.
        ties: rule for ties; "pessimistic" is used for "expected".
        number: queries of each direction, at most.
        rows: gives the scores of a few queries.

    >>> score = np.array([[0.9, 0.1], [0.8, 0.2]], np.float32)
    >>> from itm_fast.evaluation.counting import count
    >>> from itm_fast.evaluation.many_right import pairs_of
    >>> worst_queries(count(score, [0, 1], "example"), pairs_of([0, 1]), "pessimistic", 5, rows_of_matrix(score))[0][:4]
    ('i2t', 1, 2, 1)
    """
    found = []
    for side, queries in (("i2t", counts.query_images), ("t2i", np.arange(counts.captions))):
        rank = ranks_by(getattr(counts, side), "pessimistic" if ties == "expected" else ties)
        chosen = np.argsort(-rank, kind="stable")[:number]
        chosen = chosen[rank[chosen] > 0]
        if not len(chosen):
            continue
        for place, row in zip(chosen, rows(side, queries[chosen])):
            query = int(queries[place])
            own = right_items(pairs, side, query)
            right = int(own[np.argmax(row[own])])
            first = tuple((int(item), float(row[item])) for item in best_items(row, FIRST))
            found.append(WorstQuery(side, query, int(rank[place]) + 1, right, float(row[right]), first))
    return tuple(found)


def rows_of_matrix(score: NDArray[np.floating]) -> Rows:
    """Scores of queries from a matrix [I, T]."""
    return lambda side, queries: np.asarray(score[queries] if side == "i2t" else score[:, queries].T)


def rows_of_scorer(scorer: Any, encoded: Encoded, memory_gb: float | None = None) -> Rows:
    """Scores of queries, computed again: for a ranking without a matrix."""

    def rows(side: str, queries: NDArray[np.int64]) -> NDArray[np.floating]:
        part = _images(encoded, queries) if side == "i2t" else _captions(encoded, queries)
        score = score_all(scorer, part, memory_gb=memory_gb, progress=False)
        return score if side == "i2t" else score.T

    return rows


def rows_of_mean(members: Sequence[Rows]) -> Rows:
    """Scores of queries by several scorers, averaged in float32 as in the report."""

    def rows(side: str, queries: NDArray[np.int64]) -> NDArray[np.floating]:
        total, *others = (member(side, queries) for member in members)
        for one in others:
            total = total + one
        return total / np.float32(len(members)) if others else total

    return rows


def _images(encoded: Encoded, images: NDArray[np.int64]) -> Encoded:
    lengths, boxes = (None if x is None else x[images] for x in (encoded.region_lengths, encoded.boxes))
    owner = np.zeros_like(encoded.caption_to_image)  # not read for scores
    return replace(
        encoded, image=encoded.image[images], region_lengths=lengths, boxes=boxes, caption_to_image=owner,
        fingerprint={}, place=encoded.place.alone(),
    )  # fmt: skip


def _captions(encoded: Encoded, captions: NDArray[np.int64]) -> Encoded:
    edges = encoded.cu_seqlens.tolist()
    words = torch.cat([encoded.words[edges[t] : edges[t + 1]] for t in captions.tolist()])
    bounds = torch.tensor([0, *np.cumsum(encoded.lengths[captions])], dtype=torch.int32)
    return replace(
        encoded, words=words, cu_seqlens=bounds, caption_to_image=encoded.caption_to_image[captions], fingerprint={},
        first_of_equals=None, place=encoded.place.alone(),
    )  # fmt: skip
