"""The k best items of each query: of one row of scores, or from blocks of scores in any order.

From blocks, an item of a query is one int64 key: the float32 score in the upper 32 bits, mapped so that integers are
in the order of the scores, and a place in the lower 32 bits that decides between equal scores and differs for every
item. So keys are unique, and the k largest of a union are those of the union of the k largest: merging is associative
and commutative, and the result has the same bits for any blocks, in any order, by any number of processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_NONE = np.iinfo(np.int64).min  # below the key of every score
_MOST = 1 << 31  # items that a place can tell apart; its highest bit says which of two groups an item is in


@dataclass(frozen=True, eq=False)
class TieOrder:
    """Which of two items with the same score is better.

    Attributes:
        higher_index: the one with the higher index, and not the one with the lower.
        right: sorted int64, `query * items + item` of each right pair; None if it does not matter what is right.
        right_first: with `right`, whether right items are better than wrong ones, or the other way round. The index
            decides among the right ones, and among the wrong ones.
    """

    higher_index: bool = False
    right: NDArray[np.int64] | None = None
    right_first: bool = False

    def places(self, query: NDArray[np.int64], item: NDArray[np.int64], items: int) -> NDArray[np.int64]:
        """The lower half of the keys of some pairs."""
        place = item if self.higher_index else _MOST - 1 - item
        if self.right is None or not len(self.right):
            return place
        pair = query * items + item
        found = np.minimum(np.searchsorted(self.right, pair), len(self.right) - 1)
        return place + _MOST * ((self.right[found] == pair) == self.right_first)

    def item_of(self, key: NDArray[np.int64]) -> NDArray[np.int64]:
        """The items of some keys."""
        place = key & (_MOST - 1)
        return place if self.higher_index else _MOST - 1 - place


@dataclass(frozen=True, eq=False)
class Wanted:
    """The best items that are wanted of one direction.

    Attributes:
        side: "i2t" for the best captions of images, "t2i" for the best images of captions.
        k: how many of each query.
        order: which of equal scores is better; its queries are numbered as in `queries`.
        queries: int64, the images or captions that are queries, each once; None: all.
    """

    side: str
    k: int
    order: TieOrder
    queries: NDArray[np.int64] | None = None


class Best:
    """The k items with the highest scores of each query, from blocks of scores that are given in any order.

    By default the lower index wins among equal scores. -0.0 and 0.0 are equal.

    Args:
        queries: how many.
        items: how many can be found; at most 2^31.
        k: how many to keep of each query, cut to `items`.
        order: which of equal scores is kept, and ranked first.

    Attributes:
        keys: int64 [queries, k], in no order; the smallest int64 where fewer than k items were added.

    Raises:
        ValueError: k or items is out of range.

    >>> best = Best(2, 3, 2)
    >>> best.add(np.array([[0.5], [0.1]], np.float32), np.array([0, 1]), np.array([2]))
    >>> best.add(np.array([[0.5, 0.9], [0.1, 0.0]], np.float32), np.array([0, 1]), np.array([0, 1]))
    >>> best.ranked()[0]
    array([[1, 0],
           [0, 2]])
    """

    def __init__(self, queries: int, items: int, k: int, order: TieOrder | None = None) -> None:
        if k < 1 or not 0 < items <= _MOST:
            raise ValueError(f"Best: k must be at least 1 and items 1 ... {_MOST}, got k = {k} and {items} items")
        self.items, self.order = items, order or TieOrder()
        self.keys = np.full((queries, min(k, items)), _NONE, np.int64)
        self._least = np.full(queries, -np.inf, np.float32)  # a lower score cannot be among the k best any more

    def add(self, block: NDArray[np.float32], queries: NDArray[np.int64], items: NDArray[np.int64]) -> None:
        """Keep the best of a block; every pair must be in at most one block.

        Args:
            block: float32 [n, m], finite; transpose the scores of a block of images to ask for the best images.
            queries: int64 [n], which queries the rows are, each once.
            items: int64 [m], which items the columns are, each once.

        Raises:
            TypeError: the block is not float32; wider scores do not fit the keys.
        """
        if block.dtype != np.float32:
            raise TypeError(f"Best.add: a block must be float32, got {block.dtype}")
        least = self._least[queries]
        if block.flags.f_contiguous and not block.flags.c_contiguous:  # numpy searches in the order of memory
            column, row = np.divmod(np.flatnonzero(least <= block.T), len(queries))
            by_row = np.argsort(row.astype(np.min_scalar_type(len(queries))), kind="stable")
            row, column = row[by_row], column[by_row]
        else:
            row, column = np.divmod(np.flatnonzero(block >= least[:, None]), len(items))
        if len(row):
            query, item = queries[row], items[column]
            key = _ordered(block[row, column]) << 32 | self.order.places(query, item, self.items)
            first = np.flatnonzero(np.diff(row, prepend=-1))
            count = np.diff(first, append=len(row))
            found = np.full((len(first), int(count.max())), _NONE)
            found[np.repeat(np.arange(len(first)), count), np.arange(len(row)) - np.repeat(first, count)] = key
            self._keep(query[first], found)

    def merge(self, other: Best) -> None:
        """Add what another `Best` of the same queries, items, k and order has found in other blocks.

        Raises:
            ValueError: its sizes are not the same.
        """
        if (self.keys.shape, self.items) != (other.keys.shape, other.items):
            raise ValueError(
                f"Best.merge: [queries, k] {list(self.keys.shape)} of {self.items} items cannot be merged with "
                f"{list(other.keys.shape)} of {other.items}"
            )
        self.load(other.keys)

    def load(self, keys: NDArray[np.int64]) -> None:
        """Add the `keys` of another `Best`, as from a file."""
        if keys.dtype != np.int64 or keys.shape != self.keys.shape:
            raise ValueError(
                f"Best.load: keys must be int64 {list(self.keys.shape)}, got {keys.dtype} {list(keys.shape)}"
            )
        self._keep(np.arange(len(self.keys)), keys)

    def ranked(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The items, best first, and their scores.

        Returns:
            int64 [queries, k], -1 where fewer items were added; float32 [queries, k], -inf there.
        """
        keys = np.sort(self.keys, axis=1)[:, ::-1]
        missing = keys == _NONE
        return np.where(missing, -1, self.order.item_of(keys)), np.where(missing, np.float32(-np.inf), _scores(keys))

    def _keep(self, queries: NDArray[np.int64], found: NDArray[np.int64]) -> None:
        """Keep the k largest of each query's keys and of `found`, [len(queries), any]."""
        k = self.keys.shape[1]
        both = np.concatenate([self.keys[queries], found], axis=1)
        kept = np.partition(both, both.shape[1] - k, axis=1)[:, -k:]
        self.keys[queries] = kept
        lowest = kept.min(axis=1)
        self._least[queries] = np.where(lowest == _NONE, np.float32(-np.inf), _scores(lowest))


def _ordered(score: NDArray[np.float32]) -> NDArray[np.int64]:
    """Integers in the order of the scores: those of negative numbers have their lower 31 bits inverted."""
    bits = (score + np.float32(0)).view(np.int32)  # the sum makes 0.0 of -0.0
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).astype(np.int64)


def _scores(key: NDArray[np.int64]) -> NDArray[np.float32]:
    """The scores of keys; the inverse of `_ordered`."""
    bits = (key >> 32).astype(np.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).view(np.float32)


def right_pairs(right: Sequence[Sequence[int] | NDArray[np.int64]], items: int) -> NDArray[np.int64]:
    """`TieOrder.right` of the right items of each query.

    >>> right_pairs([[2, 0], [], [1]], 3)
    array([0, 2, 7])
    """
    query = np.repeat(np.arange(len(right)), [len(own) for own in right])
    item = np.concatenate([np.asarray(own, np.int64) for own in right]) if len(right) else query
    return np.sort(query * items + item)


def best_items(row: NDArray[np.floating], k: int) -> NDArray[np.int64]:
    """Indices of the k highest scores of one query, highest first; ties go to the lower index.

    Args:
        row: [n] scores.
        k: how many, cut to n.

    Returns:
        int64 [min(k, n)].

    >>> import numpy as np
    >>> best_items(np.array([0.5, 0.9, 0.5, 0.1]), 2)
    array([1, 0])
    """
    found = contenders(row, k)
    return found[np.lexsort((found, -row[found]))][:k]


def contenders(row: NDArray[np.floating], k: int) -> NDArray[np.int64]:
    """Indices, ascending, of the items that can be among the k best under some order of equal scores.

    >>> import numpy as np
    >>> contenders(np.array([0.5, 0.9, 0.5, 0.1]), 2)
    array([0, 1, 2])
    """
    k = min(k, len(row))
    return np.flatnonzero(row >= np.partition(row, len(row) - k)[len(row) - k])
