"""Items whose scores are close to that of a query's right item, kept until that score is known exactly."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

_UNSORTED = 1 << 20  # entries added before equal ones are counted together
FIELDS = ("query", "place", "score", "count")


class Near:
    """A multiset of (query, place, score), where a place is the number of the query's right items of a lower index.

    A list grows with the number of different scores near the right one, and not with the number of equal scores.

    >>> near = Near(np.float32)
    >>> near.add(np.array([1, 1, 1]), np.array([0, 2, 2]), np.array([0.5, 0.7, 0.7], np.float32))
    >>> near.settle(np.array([0, 0.5], np.float32), np.array([0, 0]))
    array([[0, 2],
           [0, 1],
           [0, 0]])
    """

    def __init__(self, dtype: np.dtype | type) -> None:
        empty = np.zeros(0, np.int64)
        self._counted = (empty, empty, np.zeros(0, dtype), empty)
        self._added: list[tuple[NDArray, ...]] = []
        self._waiting = 0

    def add(
        self,
        query: NDArray[np.int64],
        place: NDArray[np.int64],
        score: NDArray[np.floating],
        count: NDArray[np.int64] | None = None,
    ) -> None:
        """Add entries, each `count` times, or once."""
        self._added.append((query, place, score, np.ones(len(query), np.int64) if count is None else count))
        self._waiting += len(query)
        if self._waiting > _UNSORTED:
            self._count()

    def settle(self, mark: NDArray[np.floating], last: NDArray[np.int64]) -> NDArray[np.int64]:
        """Count, for each query, its entries above its `mark`, equal to it, and those of them after its `last`.

        Args:
            mark: [queries] the score of each query's best right item.
            last: [queries] how many right items have a lower index than the last right item of that score.

        Returns:
            int64 [3, queries].
        """
        query, place, score, count = self._count()
        above = score > mark[query]
        equal = score == mark[query]
        found = np.zeros((3, len(mark)), np.int64)
        for row, chosen in zip(found, (above, equal, equal & (place > last[query])), strict=True):
            np.add.at(row, query[chosen], count[chosen])
        return found

    def arrays(self) -> dict[str, NDArray]:
        """All entries as arrays, named as in `FIELDS`."""
        return dict(zip(FIELDS, self._count(), strict=True))

    def merge(self, arrays: Mapping[str, NDArray]) -> None:
        """Add the entries that `arrays` of another list gave."""
        self.add(arrays["query"], arrays["place"], arrays["score"], arrays["count"])

    def _count(self) -> tuple[NDArray, ...]:
        if self._added:
            query, place, score, count = (
                np.concatenate(parts) for parts in zip(self._counted, *self._added, strict=True)
            )
            order = np.lexsort((score, place, query))
            query, place, score, count = (array[order] for array in (query, place, score, count))
            new = np.ones(len(query), bool)
            new[1:] = (query[1:] != query[:-1]) | (place[1:] != place[:-1]) | (score[1:] != score[:-1])
            first = np.flatnonzero(new)
            total = np.add.reduceat(count, first) if len(first) else count
            self._counted = (query[first], place[first], score[first], total)
            self._added, self._waiting = [], 0
        return self._counted
