"""Ranks and recall metrics of a score matrix, counted block by block: no sort, no copy of the matrix.

The rank of a query is the number of wrong items scored above its best right one; no permutation is needed for
that. Recalls, medr and meanr are those of the published VSE++ / SCAN / SGRAF evaluators:

    R@k = 100 mean(rank < k),   medr = floor(median(rank)) + 1,   meanr = mean(rank) + 1,   rsum = the six recalls.

Two things differ on purpose. `argsort(...)[::-1]` puts NaN first, which raises recall: NaN and infinities are
refused here. It breaks ties by position: here a tie with a wrong item counts against the query.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

TIES = ("pessimistic", "optimistic")
_COUNTED = 64 << 20  # scores of one pass on a device
_ROWS = 64  # rows of one pass; below 256, so that a column's count fits uint8


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
    """

    i2t: Direction
    t2i: Direction
    images: int
    captions: int

    @property
    def rsum(self) -> float:
        """Sum of the six recalls, at most 600."""
        return sum(self.i2t.recalls) + sum(self.t2i.recalls)


def ranks(
    score: NDArray[np.floating] | torch.Tensor,
    caption_to_image: NDArray[np.integer] | Sequence[int],
    ties: str = "pessimistic",
) -> Ranks:
    """Rank every caption's image and every image's best caption.

    Images without a caption stay in the pool as wrong answers but ask no query. Right captions of one image never
    push each other down. Takes a memory-mapped matrix as well, and reads it once. A tensor on a device is counted
    there, and only ranks come to the host.

    Args:
        score: [I, T] of any floating dtype, higher is better.
        caption_to_image: [T] integers: the image that each caption describes; any number of captions per image.
        ties: "pessimistic": a wrong item with exactly the score of the right one counts as above it;
            "optimistic": as below it.

    Returns:
        `Ranks`, 0-based.

    Raises:
        TypeError: a dtype is not as stated.
        ValueError: shapes disagree, an index is out of range, or a score is NaN or infinite.

    >>> import numpy as np
    >>> score = np.array([[0.9, 0.1, 0.5], [0.2, 0.8, 0.5]], np.float32)   # captions 1 and 2 describe image 1
    >>> ranks(score, [0, 1, 1]).t2i
    array([0, 0, 1])
    >>> ranks(score, [0, 1, 1]).i2t
    array([0, 0])
    """
    score, owner = _checked(score, caption_to_image, "ranks")
    if ties not in TIES:
        raise ValueError(f"ranks: ties must be one of {', '.join(TIES)}, got {ties!r}")
    above = np.greater_equal if ties == "pessimistic" else np.greater
    if isinstance(score, torch.Tensor):
        return _counted(score, owner, ties)
    images, captions = score.shape
    right = np.asarray(score[owner, np.arange(captions)])  # [T]
    best = np.full(images, -np.inf, right.dtype)
    np.maximum.at(best, owner, right)
    i2t = np.empty(images, np.int64)
    t2i = np.zeros(captions, np.int64)
    for start, block in _row_blocks(score):
        require_finite(block, start)
        for row, image in enumerate(range(start, start + len(block))):
            i2t[image] = np.count_nonzero(above(block[row], best[image]))
        t2i += above(block, right[None]).view(np.uint8).sum(axis=0, dtype=np.uint8)
    if ties == "pessimistic":  # the right items themselves were counted
        np.subtract.at(i2t, owner, (right >= best[owner]).astype(np.int64))
        t2i -= 1
    asking = np.unique(owner)
    return Ranks(i2t[asking], t2i, asking)


def _counted(score: torch.Tensor, owner: NDArray[np.int64], ties: str) -> Ranks:
    """`ranks` of a tensor, counted where it lies; waits for the device once."""
    images, captions = score.shape
    above = torch.ge if ties == "pessimistic" else torch.gt
    places = torch.from_numpy(owner).to(score.device)
    right = score[places, torch.arange(captions, device=score.device)]
    best = torch.full((images,), -math.inf, dtype=score.dtype, device=score.device)
    best.scatter_reduce_(0, places, right, "amax")
    i2t = torch.empty(images, dtype=torch.int64, device=score.device)
    t2i = torch.zeros(captions, dtype=torch.int64, device=score.device)
    finite = torch.ones((), dtype=torch.bool, device=score.device)
    step = max(1, _COUNTED // captions)
    for start in range(0, images, step):
        block = score[start : start + step]
        finite &= block.isfinite().all()
        i2t[start : start + step] = above(block, best[start : start + step, None]).sum(1)
        t2i += above(block, right).sum(0)
    if ties == "pessimistic":  # the right items themselves were counted
        i2t.index_add_(0, places, (right >= best[places]).long(), alpha=-1)
        t2i -= 1
    if not finite:
        require_finite(score.float().cpu().numpy())
    asking = np.unique(owner)
    return Ranks(i2t.cpu().numpy()[asking], t2i.cpu().numpy(), asking)


def metrics(
    score: NDArray[np.floating] | torch.Tensor,
    caption_to_image: NDArray[np.integer] | Sequence[int],
    *,
    ties: str = "pessimistic",
) -> Metrics:
    """Recalls, median and mean rank of both directions over the whole pool.

    Args:
        score: [I, T], as for `ranks`.
        caption_to_image: [T], as for `ranks`.
        ties: as for `ranks`.

    Returns:
        `Metrics`.

    Raises:
        TypeError, ValueError: as `ranks`.

    >>> import numpy as np
    >>> found = metrics(np.eye(20, dtype=np.float32), np.arange(20))
    >>> found.i2t.r1, found.t2i.medr, found.rsum, found.t2i.chance
    (100.0, 1.0, 600.0, (5.0, 25.0, 50.0))
    """
    score, owner = _checked(score, caption_to_image, "metrics")
    found = ranks(score, owner, ties)
    images, captions = score.shape
    rights = np.bincount(owner, minlength=images)[found.images]
    return Metrics(
        _direction(found.i2t, rights, captions),
        _direction(found.t2i, np.ones(captions, np.int64), images),
        images,
        captions,
    )


def fold_metrics(
    score: NDArray[np.floating] | torch.Tensor,
    caption_to_image: NDArray[np.integer] | Sequence[int],
    folds: int = 5,
    *,
    ties: str = "pessimistic",
) -> list[Metrics]:
    """Metrics of equal, consecutive parts of the images, each against the captions of that part alone.

    `folds=5` on the 5,000 images of COCO's test set is the "COCO 1K" protocol; `average` gives its numbers.

    Args:
        score: [I, T], as for `ranks`; I must be a multiple of `folds`.
        caption_to_image: [T], as for `ranks`.
        folds: how many parts.
        ties: as for `ranks`.

    Returns:
        One `Metrics` per part, in order.

    Raises:
        ValueError: as `ranks`; the images do not divide into `folds` equal parts, or a part has no caption.

    >>> import numpy as np
    >>> [part.images for part in fold_metrics(np.eye(6, dtype=np.float32), np.arange(6), 3)]
    [2, 2, 2]
    """
    score, owner = _checked(score, caption_to_image, "fold_metrics")
    images = len(score)
    if folds < 1 or images % folds:
        raise ValueError(
            f"fold_metrics: {images} images do not divide into {folds} equal folds; recalls of unequal pools "
            "cannot be averaged. Choose a divisor, or evaluate the whole pool"
        )
    size = images // folds
    parts = []
    for fold in range(folds):
        first = fold * size
        mine = np.flatnonzero((owner >= first) & (owner < first + size))
        if not len(mine):
            raise ValueError(f"fold_metrics: no caption describes an image of fold {fold} ({first}:{first + size})")
        rows = score[first : first + size]
        together = mine[-1] - mine[0] + 1 == len(mine)
        part = rows[:, mine[0] : mine[-1] + 1] if together else rows[:, mine.tolist()]
        parts.append(metrics(part, owner[mine] - first, ties=ties))
    return parts


def average(parts: Sequence[Metrics]) -> Metrics:
    """Mean of every metric over folds.

    Args:
        parts: as `fold_metrics` returns them, at least one.

    Returns:
        `Metrics` with the mean recalls, medr, meanr and chance; `images`, `captions` and `queries` are one fold's
        (rounded mean when folds have different numbers of captions).

    >>> import numpy as np
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
    )


def best_items(row: NDArray[np.floating], k: int, last: Sequence[int] = ()) -> NDArray[np.int64]:
    """Indices of the k highest scores of one query, highest first.

    Args:
        row: [n] scores.
        k: how many, cut to n.
        last: indices that lose every tie (the right items, to rank ties pessimistically); other ties go to the
            lower index.

    Returns:
        int64 [min(k, n)].

    >>> import numpy as np
    >>> best_items(np.array([0.5, 0.9, 0.5, 0.1]), 2), best_items(np.array([0.5, 0.9, 0.5, 0.1]), 2, last=[0])
    (array([1, 0]), array([1, 2]))
    """
    k = min(k, len(row))
    least = np.partition(row, len(row) - k)[len(row) - k]
    found = np.flatnonzero(row >= least)
    return found[np.lexsort((found, np.isin(found, last), -row[found]))][:k]


def require_finite(block: NDArray[np.floating], first_image: int = 0, captions: NDArray | None = None) -> None:
    """Refuse a block of scores that holds NaN or an infinity, naming the first such pair.

    Args:
        block: [n, m] scores of images first_image, first_image + 1, ...
        first_image: index of row 0.
        captions: [m] index of each column; 0, 1, ... when None.

    Raises:
        ValueError: names the image and the caption.
    """
    finite = np.isfinite(block)
    if finite.all():
        return
    row, column = np.argwhere(~finite)[0]
    caption = int(column) if captions is None else int(captions[column])
    value = "NaN" if np.isnan(block[row, column]) else "infinite"
    raise ValueError(
        f"the score of image {first_image + int(row)} and caption {caption} is {value} "
        f"({np.count_nonzero(~finite)} such scores among the {block.size} looked at); a rank would mean nothing. "
        "Check that image's features and the checkpoint's weights for NaN, and half precision for overflow"
    )


def _direction(rank: NDArray[np.int64], rights: NDArray[np.int64], pool: int) -> Direction:
    recall = [100.0 * int(np.count_nonzero(rank < k)) / len(rank) for k in (1, 5, 10)]
    chance = [_chance(rights, pool, k) for k in (1, 5, 10)]
    return Direction(
        recall[0],
        recall[1],
        recall[2],
        float(np.floor(np.median(rank)) + 1),
        float(rank.mean() + 1),
        len(rank),
        (chance[0], chance[1], chance[2]),
    )


def _chance(rights: NDArray[np.int64], pool: int, k: int) -> float:
    """Percent of queries with a right item among k drawn from the pool: 1 - C(pool - rights, k) / C(pool, k)."""
    drawn = np.arange(min(k, pool))
    missed = np.prod(np.clip(pool - rights[:, None] - drawn, 0, None) / (pool - drawn), axis=1)
    return round(float(100.0 * np.mean(1.0 - missed)), 10)


def _checked(score, caption_to_image, caller: str) -> tuple[Any, NDArray[np.int64]]:
    """The score as an array, or as a tensor where it lies on a device, and the images of its captions."""
    if isinstance(score, torch.Tensor):
        score = score.detach()
        if score.device.type == "cpu":
            score = (score.float() if score.dtype == torch.bfloat16 else score).numpy()
    if not isinstance(score, torch.Tensor):
        score = np.asanyarray(score)
    owner = np.asarray(caption_to_image)
    if score.ndim != 2 or 0 in score.shape:
        raise ValueError(f"{caller}: score must be [I, T] with at least one pair, got {list(score.shape)}")
    tensor = isinstance(score, torch.Tensor)
    if not (score.is_floating_point() if tensor else np.issubdtype(score.dtype, np.floating)):
        raise TypeError(f"{caller}: score must be floating point, got {score.dtype}")
    if owner.shape != score.shape[1:]:
        raise ValueError(
            f"{caller}: caption_to_image must be [T] with T = {score.shape[1]} as in score {list(score.shape)}, "
            f"got {list(owner.shape)}; a transposed score matrix looks like this"
        )
    if not np.issubdtype(owner.dtype, np.integer):
        raise TypeError(f"{caller}: caption_to_image must hold integers, got {owner.dtype}")
    if owner.min() < 0 or owner.max() >= len(score):
        raise ValueError(
            f"{caller}: caption_to_image must lie in 0 ... {len(score) - 1}, got {owner.min()} ... {owner.max()}"
        )
    return score, owner.astype(np.int64, copy=False)


def _row_blocks(score: NDArray[np.floating]) -> Iterator[tuple[int, NDArray[np.floating]]]:
    for start in range(0, len(score), _ROWS):
        yield start, np.asarray(score[start : start + _ROWS])
