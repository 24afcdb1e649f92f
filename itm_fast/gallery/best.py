"""The k best items of each query, from scores that come block by block in any order."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_LOW = np.int64(0xFFFFFFFF)


class Best:
    """The k best items of each query.

    An item and its score are one int64 key: the ordered bits of the float32 score, then the index, so that equal scores
    stand in the order of the index, lowest first. As keys are unique, the result does not depend on the blocks.

    Args:
        queries: T.
        k: how many items to keep.

    >>> best = Best(queries=2, k=2)
    >>> best.add(np.array([[0.5, 0.5, -1.0], [0.1, 0.2, 0.3]], np.float32), np.array([4, 2, 9]))
    >>> best.add(np.array([[0.7]], np.float32), np.array([3]), slice(0, 1))
    >>> best.items(), best.scores()
    (array([[3, 2],
           [9, 2]]), array([[0.7, 0.5],
           [0.3, 0.2]], dtype=float32))
    """

    def __init__(self, queries: int, k: int) -> None:
        self._keys = np.full((queries, k), np.iinfo(np.int64).min)

    def add(self, scores: NDArray[np.float32], items: NDArray[np.int64], queries: slice = slice(None)) -> None:
        """Add a block of finite scores; every query must get at least k items in all, each once.

        Args:
            scores: [t, n], a row per query.
            items: int64 [n], index of each column's item, below 2^32.
            queries: which queries the rows are.
        """
        keys = np.concatenate([self._keys[queries], _keys(scores, items)], axis=1)
        k = self._keys.shape[1]
        self._keys[queries] = np.partition(keys, keys.shape[1] - k, axis=1)[:, -k:]

    def items(self) -> NDArray[np.int64]:
        """[T, k], best first."""
        return _LOW - (self._sorted() & _LOW)

    def scores(self) -> NDArray[np.float32]:
        """float32 [T, k] of `items`."""
        return _ordered((self._sorted() >> 32).astype(np.int32)).view(np.float32)

    def _sorted(self) -> NDArray[np.int64]:
        return np.sort(self._keys, axis=1)[:, ::-1]


def _keys(scores: NDArray[np.float32], items: NDArray[np.int64]) -> NDArray[np.int64]:
    bits = _ordered((np.asarray(scores, np.float32) + np.float32(0.0)).view(np.int32))  # + 0: -0.0 becomes 0.0
    return (bits.astype(np.int64) << 32) | (_LOW - items)


def _ordered(bits: NDArray[np.int32]) -> NDArray[np.int32]:
    """Bits of float32 numbers as int32 that are ordered as the numbers are, and back."""
    return np.where(bits < 0, bits ^ np.int32(0x7FFFFFFF), bits).astype(np.int32)
