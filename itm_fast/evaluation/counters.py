"""Count both directions of a score matrix from blocks of it, in any order: the matrix itself is not needed.

A block is counted against the scores of the right pairs, which are computed before, in other blocks. Where a backend
may give a pair other last bits in another block, scores within a band around a right pair's are kept one by one, and
counted at the end against the score that the right pair had in its own block. So the counts are exactly those of the
matrix that these blocks form. Without a band every right pair is required to have the same bits in both blocks.

Counters that were merged may have had bands of different widths, as jobs that do not know of each other choose theirs.
A right pair that has left the narrowest of them has the score from before, which lies in the middle of every band: the
counts are then exactly those of the matrix with this score in place of the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .counting import Counts, best_right, pool
from .near import FIELDS, Near

_SIDES = ("near images", "near captions")  # in the names of arrays
_IN_CACHE = 1 << 16  # scores that are compared at once, so that the comparisons find them in the cache


class BandExceeded(ValueError):
    """A right pair of a block has a score outside its band; `difference` is how far scores of right pairs differ."""

    def __init__(self, difference: float, band: float) -> None:
        super().__init__(
            f"the score of a right pair differs by {difference:.3g} between two blocks, by more than the {band:.3g} "
            "that was allowed for"
        )
        self.difference = difference


class Counters:
    """Both directions' counts of a score matrix that is given block by block, in any order.

    Counters of different blocks of the same matrix add up (`merge`) to those of all these blocks.

    Args:
        right: [T] the score of each caption with its image, from other blocks.
        owner: int64 [T], the image that each caption describes.
        images: I.
        band: how far a right pair's score in its block may be from `right`.

    >>> score = np.array([[0.9, 0.1, 0.5], [0.2, 0.8, 0.5]], np.float32)
    >>> counters = Counters(score[[0, 1, 1], [0, 1, 2]], np.array([0, 1, 1]), 2)
    >>> for captions in (np.array([2, 0]), np.array([1])):
    ...     counters.add(score[:, captions], 0, captions)
    >>> counters.pool().t2i.tied
    array([0, 0, 1])
    """

    def __init__(self, right: NDArray[np.floating], owner: NDArray[np.int64], images: int, band: float = 0.0) -> None:
        self.right, self.owner, self.band = right, owner, band
        self.best, self.is_best, self.last = best_right(right, owner, images)
        self.of_images = np.zeros((3, images), np.int64)
        self.of_captions = np.zeros((3, len(right)), np.int64)
        self.found = np.full(len(right), np.nan, right.dtype)  # the right pairs' scores in their own blocks
        self._near = Near(right.dtype), Near(right.dtype)  # of images, of captions
        self._own = np.sort(owner * len(right) + np.arange(len(right)))
        self._first_own = np.searchsorted(self._own, np.arange(images) * len(right))

    def add(self, block: NDArray[np.floating] | Tensor, first_image: int, captions: NDArray[np.int64]) -> None:
        """Count the pairs of a block; every pair of the matrix must be in exactly one block.

        Args:
            block: [n, m] scores of images first_image, first_image + 1, ... With a band, a tensor is compared on its
                device, and only counts and the scores near the marks are copied to the host.
            captions: int64 [m], which captions the columns are, each once.

        Raises:
            BandExceeded: the score of a right pair is further than `band` from `right`; nothing was counted.
        """
        owner = self.owner[captions]
        mine = np.flatnonzero((owner >= first_image) & (owner < first_image + len(block)))
        own_rows = owner[mine] - first_image
        if isinstance(block, torch.Tensor):
            found = block[_index(own_rows, block), _index(mine, block)].cpu().numpy()
        else:
            found = block[own_rows, mine]
        right = self.right[captions[mine]]
        if _outside(found, right, self.band).any():
            raise BandExceeded(float(np.abs(found.astype(np.float64) - right).max()), self.band)
        self.found[captions[mine]] = found
        of_captions = np.zeros((3, len(captions)), np.int64)
        # A device compares all of a block at once.
        step = len(block) if isinstance(block, torch.Tensor) else max(1, _IN_CACHE // len(captions))
        for start in range(0, len(block), step):
            part: Any = block[start : start + step]
            images = np.arange(first_image + start, first_image + start + len(part))
            if self.band:
                self.of_images[0, images] += self._near_images(part, images, captions)
                of_captions[0] += self._near_captions(part, images, captions)
                continue
            if isinstance(part, torch.Tensor):
                part = part.cpu().numpy()
            self.of_images[:, images] += _compared(part, 1, self.best[images, None], captions, self.last[images])
            of_captions += _compared(part, 0, self.right[captions], images, owner)
        self.of_captions[:, captions] += of_captions

    def merge(self, other: Counters) -> None:
        """Add the counts of other blocks of the same matrix.

        Raises:
            ValueError: `right`, the owners or the number of images are not the same.
        """
        same = np.array_equal(self.right, other.right) and np.array_equal(self.owner, other.owner)
        if not same or self.of_images.shape != other.of_images.shape:
            raise ValueError(
                "the right pairs do not have the same scores in both: one is of another matrix, or was computed on "
                "another kind of processor"
            )
        self.load(other.arrays())

    def arrays(self) -> dict[str, NDArray]:
        """The counts as arrays for a file; `load` adds them to counters with the same arguments."""
        near = {f"{side} {k}": v for side, one in zip(_SIDES, self._near, strict=True) for k, v in one.arrays().items()}
        counts = {"images": self.of_images, "captions": self.of_captions, "found": self.found}
        return {"band": np.array(self.band), **counts, **near}

    def load(self, arrays: Mapping[str, NDArray]) -> None:
        """Add the counts that `arrays` of other counters gave."""
        self.of_images += arrays["images"]
        self.of_captions += arrays["captions"]
        self.found = np.where(np.isnan(self.found), arrays["found"], self.found)
        for side, near in zip(_SIDES, self._near, strict=True):
            near.merge({name: arrays[f"{side} {name}"] for name in FIELDS})
        self.band = min(self.band, float(arrays["band"]))

    def outside(self) -> NDArray[np.bool_]:
        """[T], which right pairs have a score in their own block that is outside the narrowest band merged here."""
        return _outside(self.found, self.right, self.band)

    def pool(self, images: slice | None = None) -> Counts:
        """The counts of these images and of their captions, or of all; every block must have been added."""
        outside = self.outside()
        right = np.where(outside | np.isnan(self.found), self.right, self.found)
        best, is_best, last = best_right(right, self.owner, len(self.best))
        of_images, of_captions = (
            near.settle(mark, place)
            for near, mark, place in zip(
                self._near,
                (best, right),
                (self._place(np.arange(len(last)), last), np.zeros_like(self.owner)),
                strict=True,
            )
        )
        of_images += self.of_images
        of_captions += self.of_captions
        # Pairs outside were counted by their scores in their own blocks, and `pool` takes those equal to the mark away.
        own = np.flatnonzero(outside)
        mine, found, mark = self.owner[own], self.found[own], best[self.owner[own]]
        np.subtract.at(of_images[0], mine, found > mark)
        np.add.at(of_images[1], mine, is_best[own].astype(np.int64) - (found == mark))
        np.subtract.at(of_images[2], mine, (found == mark) & (own > last[mine]))
        of_captions[0] -= outside & (self.found > right)
        of_captions[1] += outside
        return pool(of_images, of_captions, is_best, self.owner, images or slice(0, len(best)))

    def _near_images(self, block: Any, images: NDArray[np.int64], captions: NDArray[np.int64]) -> NDArray[np.int64]:
        """How many captions of a block are above each image's band; those within it are kept."""
        row, column, score, above = _around(block, self.best[images, None], self.band, 1)
        self._near[0].add(images[row], self._place(images[row], captions[column]), score)
        return above

    def _near_captions(self, block: Any, images: NDArray[np.int64], captions: NDArray[np.int64]) -> NDArray[np.int64]:
        """How many images of a block are above each caption's band; those within it are kept."""
        row, column, score, above = _around(block, self.right[captions], self.band, 0)
        after = (images[row] > self.owner[captions[column]]).astype(np.int64)
        self._near[1].add(captions[column], after, score)
        return above

    def _place(self, image: NDArray[np.int64], caption: NDArray[np.int64]) -> NDArray[np.int64]:
        """How many captions of an image have a lower index than some caption."""
        return np.searchsorted(self._own, image * len(self.right) + caption) - self._first_own[image]


def _outside(found: NDArray[np.floating], right: NDArray[np.floating], band: float) -> NDArray[np.bool_]:
    width = right.dtype.type(band)
    return (found < right - width) | (found > right + width)  # NaN, not found yet, is neither


def _around(block: Any, mark: NDArray[np.floating], band: float, axis: int) -> tuple[NDArray, ...]:
    """Rows, columns and scores of a block within `band` of `mark`, and the number above it along `axis`."""
    width = mark.dtype.type(band)
    lowest, highest = mark - width, mark + width
    if isinstance(block, torch.Tensor):
        above = block > torch.from_numpy(highest).to(block.device)
        near = (block >= torch.from_numpy(lowest).to(block.device)) & ~above
        places = near.nonzero()
        scores = block[places[:, 0], places[:, 1]].cpu().numpy()
        row, column = places.T.cpu().numpy()
        return row, column, scores, above.sum(axis).cpu().numpy()
    above = block > highest
    count = above.view(np.uint8).sum(axis, dtype=np.min_scalar_type(block.shape[axis]))
    near = np.not_equal(block >= lowest, above, out=above)
    row, column = np.divmod(np.flatnonzero(near), block.shape[1])
    return row, column, block[row, column], count


def _index(places: NDArray[np.int64], block: Tensor) -> Tensor:
    return torch.from_numpy(places).to(block.device)


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
