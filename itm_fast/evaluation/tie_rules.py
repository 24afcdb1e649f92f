"""Ranks and recall metrics from counts of wrong items, under every rule for ties.

The rank of a query is the number of wrong items above its best right one; no permutation is needed for that. Recalls,
medr and meanr are those of the published VSE++ / SCAN / SGRAF evaluators:

    R@k = 100 mean(rank < k),   medr = floor(median(rank)) + 1,   meanr = mean(rank) + 1,   rsum = the six recalls.

Two things differ from them on purpose. NaN and infinite scores are refused: `argsort(...)[::-1]` puts NaN first, which
raises recall. And the caller chooses the rule for ties, which `argsort` breaks by position; every result has the
metrics under all four rules.

Ties. Let g be the number of wrong items with a higher score than the best right one, b the number of wrong items with
exactly its score, and a the number of right items with that score (a = 1 for a caption: only its image is right). Then

    pessimistic   rank = g + b: every tied wrong item is ranked above the right ones.
    optimistic    rank = g: every tied wrong item is ranked below the right ones.
    published     rank = g + the number of tied wrong items with a higher index than all a right ones, since a stable
                  sort, reversed, puts equal scores in descending order of index. numpy's default sort, which the
                  published evaluators use, is not stable; its order of equal scores depends on the processor.
    expected      the mean over all orders of the a + b tied items, each as likely:

        P(rank >= g + j) = C(b, j) / C(a + b, j) = prod_{i = 1..a} (b - j + i) / (b + i)                           (1)

    as the first j of the a + b items must be wrong ones. R@k is 100 mean P(rank < k), which does not follow from the
    mean rank; meanr is the mean of g + b / (a + 1) + 1; medr is floor(median) + 1, the median taken over the ranks of
    all queries in all orders.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import TIES
from .counting import Counts, Standings


class Ranks(NamedTuple):
    """0-based ranks of both directions.

    Attributes:
        i2t: int64 [queries], per image that has a caption: the best rank among its captions.
        t2i: int64 [T], per caption: the rank of its image.
        images: int64 [queries], which image each entry of `i2t` belongs to.
    """

    i2t: NDArray[np.int64]
    t2i: NDArray[np.int64]
    images: NDArray[np.int64]


# The constructor of a NamedTuple belongs to no module in which a tool could look its annotations up.
Ranks.__new__.__annotations__ = dict.fromkeys(Ranks._fields, NDArray[np.int64])


@dataclass(frozen=True)
class Direction:
    """Metrics of one direction; recalls in percent.

    Attributes:
        r1, r5, r10: recall at 1, 5 and 10.
        medr, meanr: median rank (rounded down) and mean rank, both counted from 1.
        queries: how many queries were averaged.
        chance: recall at 1, 5 and 10 of a random order of the same pool.
    """

    r1: float
    r5: float
    r10: float
    medr: float
    meanr: float
    queries: int
    chance: tuple[float, float, float]

    @property
    def recalls(self) -> tuple[float, float, float]:
        """Recall at 1, 5 and 10."""
        return self.r1, self.r5, self.r10


@dataclass(frozen=True)
class Metrics:
    """Metrics of one pool of images and captions in both directions.

    Attributes:
        i2t: image to text: the query is an image.
        t2i: text to image: the query is a caption.
        images, captions: size of the pool.
        ties: the rule for ties, one of `TIES`.
        others: the same pool under the other rules; empty inside these.
    """

    i2t: Direction
    t2i: Direction
    images: int
    captions: int
    ties: str = TIES[0]
    others: tuple[Metrics, ...] = ()

    @property
    def rsum(self) -> float:
        """Sum of the six recalls, at most 600."""
        return sum(self.i2t.recalls) + sum(self.t2i.recalls)

    @property
    def by_ties(self) -> dict[str, Metrics]:
        """These metrics and `others` by their rule, in the order of `TIES`."""
        known = {found.ties: found for found in (self, *self.others)}
        return {rule: known[rule] for rule in TIES if rule in known}


def ranks_of(found: Counts, ties: str) -> Ranks:
    """`ranks` of counts."""
    require_one_rank(ties)
    return Ranks(ranks_by(found.i2t, ties), ranks_by(found.t2i, ties), found.query_images)


def require_one_rank(ties: str) -> None:
    known_rule(ties, "ranks")
    if ties == "expected":
        raise ValueError(
            "ranks: over all orders of its ties a query has no single rank, and recalls of mean ranks would be wrong; "
            'use metrics(..., ties="expected"), or another rule'
        )


def average(parts: Sequence[Metrics]) -> Metrics:
    """Mean of every metric over folds.

    Args:
        parts: as `fold_metrics` returns them, at least one.

    Returns:
        `Metrics` with the mean recalls, medr, meanr and chance, under every rule for ties; `images`, `captions` and
        `queries` are one fold's (rounded mean when folds have different numbers of captions).

    >>> import numpy as np
    >>> from itm_fast.evaluation import fold_metrics
    >>> average(fold_metrics(np.eye(6, dtype=np.float32), np.arange(6), 3)).rsum
    600.0
    """

    def mean(values: Sequence[float]) -> float:
        return float(np.mean(values))

    def direction(ones: Sequence[Direction]) -> Direction:
        chance = tuple(mean([one.chance[k] for one in ones]) for k in range(3))
        return Direction(
            mean([one.r1 for one in ones]),
            mean([one.r5 for one in ones]),
            mean([one.r10 for one in ones]),
            mean([one.medr for one in ones]),
            mean([one.meanr for one in ones]),
            round(mean([one.queries for one in ones])),
            (chance[0], chance[1], chance[2]),
        )

    return Metrics(
        direction([part.i2t for part in parts]),
        direction([part.t2i for part in parts]),
        round(mean([part.images for part in parts])),
        round(mean([part.captions for part in parts])),
        parts[0].ties,
        tuple(average([part.by_ties[other.ties] for part in parts]) for other in parts[0].others),
    )


def known_rule(ties: str, caller: str) -> None:
    if ties not in TIES:
        raise ValueError(f"{caller}: ties must be one of {', '.join(TIES)}, got {ties!r}")


def metrics_of(found: Counts, ties: str) -> Metrics:
    """Metrics of counts under one rule, with those under the other rules in `others`."""
    known_rule(ties, "metrics")
    chances = [
        tuple(chance_at(side.right_total, pool, k) for k in (1, 5, 10))
        for side, pool in ((found.i2t, found.captions), (found.t2i, found.images))
    ]
    by_ties = {}
    for rule in TIES:
        i2t, t2i = (
            _direction(side, rule, chance) for side, chance in zip((found.i2t, found.t2i), chances, strict=True)
        )
        by_ties[rule] = Metrics(i2t, t2i, found.images, found.captions, rule)
    return replace(by_ties.pop(ties), others=tuple(by_ties.values()))


def _direction(side: Standings, ties: str, chance: tuple[float, ...]) -> Direction:
    if ties == "expected":
        recall = [100.0 * float(hit_probability(side, k).mean()) for k in (1, 5, 10)]
        mean = float((side.above + side.tied / (side.right_tied + 1)).mean())
        found = recall[0], recall[1], recall[2], _median(side) + 1, mean + 1
    else:
        found = summary(ranks_by(side, ties))
    return Direction(*found, len(side.above), (chance[0], chance[1], chance[2]))


def summary(rank: NDArray[np.int64]) -> tuple[float, float, float, float, float]:
    """R@1, R@5, R@10 in percent, and median (rounded down) and mean rank counted from 1, of 0-based ranks.

    >>> summary(np.array([0, 2, 7, 30]))
    (25.0, 50.0, 75.0, 5.0, 10.75)
    """
    r1, r5, r10 = (100.0 * int(np.count_nonzero(rank < k)) / len(rank) for k in (1, 5, 10))
    return r1, r5, r10, float(np.floor(np.median(rank))) + 1, float(rank.mean()) + 1


def ranks_by(side: Standings, ties: str) -> NDArray[np.int64]:
    """Ranks [queries] under any rule but "expected"."""
    before = {"pessimistic": side.tied, "published": side.ahead}
    return side.above + before.get(ties, 0)


def hit_probability(side: Standings, k: int) -> NDArray[np.float64]:
    """P(rank < k) of each query over all orders of its ties, by (1) with j = k - g."""
    j = k - side.above
    missed = np.ones(len(j))
    for i in range(1, int(side.right_tied.max()) + 1):
        factor = np.maximum(side.tied - j + i, 0) / (side.tied + i)
        missed *= np.where(i <= side.right_tied, factor, 1.0)
    return np.where(j > 0, 1.0 - missed, 0.0)


def _median(side: Standings) -> float:
    """Median, rounded down, of the ranks of all queries in all orders: halfway between the least rank that half of them
    do not exceed and the least that more than half do not."""
    ranks = range(int((side.above + side.tied).max()))
    lower, upper = (  # 1e-9 is far above the rounding error of the mean, so a mean of exactly one half is recognised
        bisect.bisect_left(ranks, half, key=lambda rank: float(hit_probability(side, rank + 1).mean()))
        for half in (0.5 - 1e-9, 0.5 + 1e-9)
    )
    return float((lower + upper) // 2)


def chance_at(right_total: NDArray[np.int64], pool: int, k: int) -> float:
    """Percent of queries with a right item among k drawn from the pool: 1 - C(pool - right_total, k) / C(pool, k)."""
    drawn = np.arange(min(k, pool))
    missed = np.prod(np.clip(pool - right_total[:, None] - drawn, 0, None) / (pool - drawn), axis=1)
    return round(float(100.0 * np.mean(1.0 - missed)), 10)
