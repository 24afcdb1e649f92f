"""Ranks and recall metrics of a score matrix: no sort, no copy of the matrix; `tie_rules` has the definitions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from .._names import Ties
from .counting import checked, count
from .tie_rules import Metrics, Ranks, known_rule, metrics_of, ranks_of, require_one_rank


def ranks(
    score: NDArray[np.floating] | torch.Tensor,
    caption_to_image: NDArray[np.integer] | Sequence[int],
    ties: Ties = "pessimistic",
) -> Ranks:
    """Rank every caption's image and every image's best caption.

    Images without a caption are no queries, but stay in the pool as wrong answers. The captions of one image do not
    lower each other's rank. A memory-mapped matrix is read once. A tensor is ranked on its device, and only the ranks
    are copied to the host.

    Args:
        score: [I, T] of any floating dtype, higher is better.
        caption_to_image: [T] integers: the image that each caption describes; any number of captions per image.
        ties: where a wrong item with exactly the score of the right one is ranked; "pessimistic": above it;
            "optimistic": below it; "published": above it if its index is higher, as in a stable sort, reversed.

    Returns:
        `Ranks`, 0-based.

    Raises:
        TypeError: a dtype is not as stated.
        ValueError: shapes disagree, an index is out of range, a score is NaN or infinite, or `ties` is not one of
            these three (under "expected" a query has no single rank; `metrics` takes it).

    >>> import numpy as np
    >>> score = np.array([[0.9, 0.1, 0.5], [0.2, 0.8, 0.5]], np.float32)   # captions 1 and 2 describe image 1
    >>> ranks(score, [0, 1, 1]).t2i
    array([0, 0, 1])
    >>> ranks(score, [0, 1, 1]).i2t
    array([0, 0])
    """
    require_one_rank(ties)
    return ranks_of(count(score, caption_to_image, "ranks"), ties)


def metrics(
    score: NDArray[np.floating] | torch.Tensor,
    caption_to_image: NDArray[np.integer] | Sequence[int],
    *,
    ties: Ties = "pessimistic",
) -> Metrics:
    """Recalls, median and mean rank of both directions over the whole pool.

    Args:
        score: [I, T] array or tensor of any floating dtype, higher is better.
        caption_to_image: [T] integers: the image that each caption describes; any number of captions per image.
        ties: where a wrong item with exactly the score of the right one is ranked: "pessimistic" (above it),
            "optimistic" (below it), "published" (above it if its index is higher), or "expected" (the mean over all
            orders of tied items).

    Returns:
        `Metrics` under this rule; its `others` are those under the other rules, computed from the same counts.

    Raises:
        TypeError: a dtype is not as stated.
        ValueError: shapes disagree, an index is out of range, a score is NaN or infinite, or `ties` is unknown.

    >>> import numpy as np
    >>> found = metrics(np.eye(20, dtype=np.float32), np.arange(20))
    >>> found.i2t.r1, found.t2i.medr, found.rsum, found.t2i.chance
    (100.0, 1.0, 600.0, (5.0, 25.0, 50.0))
    """
    known_rule(ties, "metrics")
    return metrics_of(count(score, caption_to_image, "metrics"), ties)


def fold_metrics(
    score: NDArray[np.floating] | torch.Tensor,
    caption_to_image: NDArray[np.integer] | Sequence[int],
    folds: int = 5,
    *,
    ties: Ties = "pessimistic",
) -> list[Metrics]:
    """Metrics of equal, consecutive parts of the images, each against the captions of that part alone.

    `folds=5` on the 5,000 images of COCO's test set is the "COCO 1K" protocol; `average` gives its numbers.

    Args:
        score: [I, T], as for `ranks`; I must be a multiple of `folds`.
        caption_to_image: [T], as for `ranks`.
        folds: how many parts.
        ties: as for `metrics`.

    Returns:
        One `Metrics` per part, in order.

    Raises:
        ValueError: as `ranks`; the images do not divide into `folds` equal parts, or a part has no caption.

    >>> import numpy as np
    >>> [part.images for part in fold_metrics(np.eye(6, dtype=np.float32), np.arange(6), 3)]
    [2, 2, 2]
    """
    known_rule(ties, "fold_metrics")
    score, owner = checked(score, caption_to_image, "fold_metrics")
    parts = []
    for images in fold_images(owner, len(score), folds, "fold_metrics"):
        mine = np.flatnonzero((owner >= images.start) & (owner < images.stop))
        rows = score[images]
        together = mine[-1] - mine[0] + 1 == len(mine)
        part = rows[:, mine[0] : mine[-1] + 1] if together else rows[:, mine.tolist()]
        parts.append(metrics(part, owner[mine] - images.start, ties=ties))
    return parts


def fold_images(owner: NDArray[np.int64], images: int, folds: int, caller: str) -> list[slice]:
    """The images of each fold; the errors are those of `fold_metrics`.

    >>> fold_images(np.array([0, 3]), 4, 2, "example")
    [slice(0, 2, None), slice(2, 4, None)]
    """
    if folds < 1 or images % folds:
        raise ValueError(
            f"{caller}: {images} images do not divide into {folds} equal folds; recalls of unequal pools "
            "cannot be averaged. Choose a divisor, or evaluate the whole pool"
        )
    size = images // folds
    empty = np.flatnonzero(np.bincount(owner // size, minlength=folds) == 0)
    if len(empty):
        fold = int(empty[0])
        raise ValueError(f"{caller}: no caption describes an image of fold {fold} ({fold * size}:{(fold + 1) * size})")
    return [slice(first, first + size) for first in range(0, images, size)]
