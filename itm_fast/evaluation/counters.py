"""Count both directions of a score matrix from blocks of it, in any order: the matrix itself is not needed."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .counting import Counts, best_right, pool

_IN_CACHE = 1 << 16  # scores that are compared at once, so that the comparisons find them in the cache


class Counters:
    """Both directions' counts of a score matrix that is given block by block, in any order.

    Args:
        right: [T] the score of each caption with its image.
        owner: int64 [T], the image that each caption describes.
        images: I.

    >>> score = np.array([[0.9, 0.1, 0.5], [0.2, 0.8, 0.5]], np.float32)
    >>> counters = Counters(score[[0, 1, 1], [0, 1, 2]], np.array([0, 1, 1]), 2)
    >>> for captions in (np.array([2, 0]), np.array([1])):
    ...     counters.add(score[:, captions], 0, captions)
    >>> counters.pool().t2i.tied
    array([0, 0, 1])
    """

    def __init__(self, right: NDArray[np.floating], owner: NDArray[np.int64], images: int) -> None:
        self.right, self.owner = right, owner
        self.best, self.is_best, self.last = best_right(right, owner, images)
        self.of_images = np.zeros((3, images), np.int64)
        self.of_captions = np.zeros((3, len(right)), np.int64)

    def add(self, block: NDArray[np.floating], first_image: int, captions: NDArray[np.int64]) -> None:
        """Count the pairs of a block; every pair of the matrix must be in exactly one block.

        Args:
            block: [n, m] scores of images first_image, first_image + 1, ...; those of right pairs equal `right`.
            captions: int64 [m], which captions the columns are, each once.
        """
        of_captions = np.zeros((3, len(captions)), np.int64)
        step = max(1, _IN_CACHE // len(captions))
        for start in range(0, len(block), step):
            part = block[start : start + step]
            images = np.arange(first_image + start, first_image + start + len(part))
            self.of_images[:, images] += _compared(part, 1, self.best[images, None], captions, self.last[images])
            of_captions += _compared(part, 0, self.right[captions], images, self.owner[captions])
        self.of_captions[:, captions] += of_captions

    def pool(self, images: slice | None = None) -> Counts:
        """The counts of these images and of their captions, or of all."""
        return pool(self.of_images, self.of_captions, self.is_best, self.owner, images or slice(0, len(self.best)))


def _compared(
    block: NDArray[np.floating],
    axis: int,
    mark: NDArray[np.floating],
    items: NDArray[np.int64],
    last: NDArray[np.int64],
) -> NDArray[np.int64]:
    """For each query of a block: its items above `mark`, those equal to it, those of them with an index above `last`.

    Args:
        block: [n, m] scores; items lie along `axis`, queries along the other axis.
        mark: score of each query's best right item; it broadcasts against `block`.
        items: index of each item.
        last: for each query, the highest index of a right item whose score is `mark`.

    Returns:
        [3, queries].
    """
    found = block > mark
    above = found.view(np.uint8).sum(axis, dtype=np.min_scalar_type(block.shape[axis]))
    places = np.divmod(np.flatnonzero(np.equal(block, mark, out=found)), block.shape[1])  # rows and columns
    query, item = places[1 - axis], places[axis]
    ahead = query[items[item] > last[query]]
    return np.stack([above, np.bincount(query, minlength=len(above)), np.bincount(ahead, minlength=len(above))])
