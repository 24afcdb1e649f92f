"""What follows from a finished tally: ranks, metrics and the best items of each scorer."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from .counting import Counts
from .relevance import relevance_of_best
from .tally import Tally, named_blocks
from .tie_rules import Metrics, Ranks, metrics_of, ranks_of


@dataclass(frozen=True, eq=False)
class Ranking:
    """What the ranks of one scorer follow from, without its scores.

    Attributes:
        counts: of all images and captions.
        folds: of each fold; empty without folds.
        best: "i2t" and "t2i" -> items int64 [queries, k] and scores float32 [queries, k], best first; empty if they
            were not asked for.
        relevance_by_ties: CxC and ECCV Caption metrics under each of their rules for ties; empty without COCO ids.
    """

    counts: Counts
    folds: tuple[Counts, ...] = ()
    best: dict[str, tuple[NDArray[np.int64], NDArray[np.float32]]] = field(default_factory=dict)
    relevance_by_ties: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)

    def ranks(self, ties: str = "pessimistic") -> Ranks:
        """As `itm_fast.evaluation.ranks` of the score matrix."""
        return ranks_of(self.counts, ties)

    def metrics(self, *, ties: str = "pessimistic") -> Metrics:
        """As `itm_fast.evaluation.metrics` of the score matrix."""
        return metrics_of(self.counts, ties)

    def fold_metrics(self, *, ties: str = "pessimistic") -> list[Metrics]:
        """As `itm_fast.evaluation.fold_metrics` of the score matrix; empty without folds."""
        return [metrics_of(found, ties) for found in self.folds]


def rankings_of(tally: Tally) -> tuple[Ranking, ...]:
    """One `Ranking` per system of a tally that has every block.

    Raises:
        ValueError: a block is missing.
    """
    if not tally.done.all():
        raise ValueError(f"not scored yet: {named_blocks(~tally.done)} of {len(tally.done)}")
    found = []
    for system, counters in enumerate(tally.counters):
        folds = tuple(tally.within[system].pool(part) for part in tally.parts)
        lists = {name: best.ranked() for name, best in tally.best[system].items()}
        best = {str(side): lists.pop(side) for side in ("i2t", "t2i") if side in lists}
        relevance = {}
        if tally.asked.relevance:
            items = {name: ranked for name, (ranked, _) in lists.items()}
            ids = (tally.asked.image_ids, tally.asked.caption_ids)
            relevance = relevance_of_best(tally.wanted, items, *ids)  # type: ignore[arg-type]
        found.append(Ranking(counters.pool(), folds, best, relevance))
    return tuple(found)
