"""Count each query's wrong items that score as high as its best right item, or higher: one pass, no sort, no copy.

The rank of a query under any rule for ties follows from three counts of wrong items: those with a higher score than the
best right item, those with the same score, and those of the latter that precede it in the published order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

_COUNTED = 64 << 20  # scores compared at once on a device
_ROWS = 64  # rows of a block; below 256, so that the counts of a column within a block fit uint8


class Standings(NamedTuple):
    """Counts of one direction, int64 [queries] each.

    Attributes:
        above: wrong items with a higher score than the best right one.
        tied: wrong items with exactly the score of the best right one.
        ahead: those of `tied` with a higher index than every right item of that score.
        right_tied: right items with the score of the best right one, at least 1.
        right_total: all right items.
    """

    above: NDArray[np.int64]
    tied: NDArray[np.int64]
    ahead: NDArray[np.int64]
    right_tied: NDArray[np.int64]
    right_total: NDArray[np.int64]


class Counts(NamedTuple):
    """Both directions of one score matrix.

    Attributes:
        i2t: one query per image that has a caption.
        t2i: one query per caption.
        query_images: int64 [queries of i2t], the images that have a caption.
        images, captions: size of the matrix.
    """

    i2t: Standings
    t2i: Standings
    query_images: NDArray[np.int64]
    images: int
    captions: int


def count(score: NDArray[np.floating] | torch.Tensor, caption_to_image: Any, caller: str) -> Counts:
    """Count both directions; arguments and errors as for `ranks`.

    A memory-mapped matrix is read once. A tensor is counted on its device, and only the counts are copied to the host.

    Args:
        score: [I, T].
        caption_to_image: [T].
        caller: name of the public function, for error messages.
    """
    score, owner = checked(score, caption_to_image, caller)
    counted = _on_device(score, owner) if isinstance(score, torch.Tensor) else _on_host(score, owner)
    return pool(*counted, owner, slice(0, len(score)))


def pool(
    of_images: NDArray[np.int64],
    of_captions: NDArray[np.int64],
    is_best: NDArray[np.bool_],
    owner: NDArray[np.int64],
    images: slice,
) -> Counts:
    """The counts of these images and of their captions; the arguments are a `_Found`, whose `tied` has right items."""
    captions = np.flatnonzero((owner >= images.start) & (owner < images.stop))
    right_total = np.bincount(owner, minlength=images.stop)[images]
    right_tied = np.bincount(owner[is_best], minlength=images.stop)[images]
    queries = np.flatnonzero(right_total)
    above, tied, ahead = of_images[:, images]
    i2t = Standings(*(values[queries] for values in (above, tied - right_tied, ahead, right_tied, right_total)))
    above, tied, ahead = of_captions[:, captions]
    ones = np.ones(len(captions), np.int64)
    t2i = Standings(above, tied - ones, ahead, ones, ones)
    return Counts(i2t, t2i, queries, images.stop - images.start, len(captions))


def best_right(
    right: NDArray[np.floating], owner: NDArray[np.int64], images: int
) -> tuple[NDArray[np.floating], NDArray[np.bool_], NDArray[np.int64]]:
    """The best score of each image's own captions, which captions have it, and the highest index of those.

    Args:
        right: [T] the score of each caption with its image.
        owner: [T].
        images: I.

    Returns:
        [I], -inf without a caption; bool [T]; int64 [I], -1 without a caption.
    """
    best = np.full(images, -np.inf, right.dtype)
    with np.errstate(invalid="ignore"):  # NaN is refused with its image and caption, where all scores are checked
        np.maximum.at(best, owner, right)
    is_best = right == best[owner]
    last = np.full(images, -1)
    np.maximum.at(last, owner[is_best], np.flatnonzero(is_best))
    return best, is_best, last


_Found = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]


def _on_host(score: NDArray[np.floating], owner: NDArray[np.int64]) -> _Found:
    """`above`, `tied` (right items included) and `ahead` of the images [3, I] and of the captions [3, T], and bool [T]:
    which captions have the best score of their image."""
    images, captions = score.shape
    right = np.asarray(score[owner, np.arange(captions)])
    best, is_best, last = best_right(right, owner, images)
    own = np.split(np.argsort(owner, kind="stable"), np.cumsum(np.bincount(owner, minlength=images))[:-1])

    i2t = np.empty((3, images), np.int64)
    above, tied, up_to_own = t2i = np.zeros((3, captions), np.int64)
    mask = np.empty(captions, np.bool_)
    for start, block in _row_blocks(score):
        block_above, block_tied = np.zeros((2, captions), np.uint8)
        for image, row in enumerate(block, start):
            if not np.isfinite(row, out=mask).all():
                require_finite(block, start)
            i2t[0, image] = np.count_nonzero(np.greater(row, best[image], out=mask))
            i2t[1, image] = np.count_nonzero(np.equal(row, best[image], out=mask))
            i2t[2, image] = np.count_nonzero(mask[last[image] + 1 :])
            block_above += np.greater(row, right, out=mask).view(np.uint8)
            block_tied += np.equal(row, right, out=mask).view(np.uint8)
            up_to_own[own[image]] = tied[own[image]] + block_tied[own[image]]
        above += block_above
        tied += block_tied
    np.subtract(tied, up_to_own, out=t2i[2])
    return i2t, t2i, is_best


def _on_device(score: torch.Tensor, owner: NDArray[np.int64]) -> _Found:
    """As `_on_host`, for a tensor on a device; the host waits for the device once."""
    images, captions = score.shape
    places = torch.from_numpy(owner).to(score.device)
    columns = torch.arange(captions, device=score.device)
    rows = torch.arange(images, device=score.device)[:, None]
    right = score[places, columns]
    best = torch.full((images,), -math.inf, dtype=score.dtype, device=score.device)
    best.scatter_reduce_(0, places, right, "amax")
    level = right == best[places]
    last = torch.full((images,), -1, device=score.device).scatter_reduce_(0, places, columns.where(level, -1), "amax")
    i2t = torch.empty(3, images, dtype=torch.int64, device=score.device)
    t2i = torch.zeros(3, captions, dtype=torch.int64, device=score.device)
    finite = torch.ones((), dtype=torch.bool, device=score.device)
    step = max(1, _COUNTED // captions)
    for start in range(0, images, step):
        part = slice(start, start + step)
        block, mark = score[part], best[part, None]
        finite &= block.isfinite().all()
        equal = block == mark
        i2t[:, part] = torch.stack([(block > mark).sum(1), equal.sum(1), (equal & (columns > last[part, None])).sum(1)])
        equal = block == right
        t2i += torch.stack([(block > right).sum(0), equal.sum(0), (equal & (rows[part] > places)).sum(0)])
    if not finite:
        require_finite(score.float().cpu().numpy())
    return i2t.cpu().numpy(), t2i.cpu().numpy(), level.cpu().numpy()


def require_finite(block: NDArray[np.floating], first_image: int = 0, captions: NDArray | None = None) -> None:
    """Refuse a block of scores that has a NaN or an infinity; the message names the first such pair.

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
        f"({np.count_nonzero(~finite)} such scores among the {block.size} checked), and cannot be ranked. "
        "Check that image's features and the checkpoint's weights for NaN, and half precision for overflow"
    )


def checked(score: Any, caption_to_image: Any, caller: str) -> tuple[Any, NDArray[np.int64]]:
    """Check both arguments; return the scores as an array, or as a tensor if they are on a device, and int64 [T]."""
    if isinstance(score, torch.Tensor):
        score = score.detach()
        if score.device.type == "cpu":
            score = (score.float() if score.dtype == torch.bfloat16 else score).numpy()
    if not isinstance(score, torch.Tensor):
        score = np.asanyarray(score)
    if score.ndim != 2 or 0 in score.shape:
        raise ValueError(f"{caller}: score must be [I, T] with at least one pair, got {list(score.shape)}")
    tensor = isinstance(score, torch.Tensor)
    if not (score.is_floating_point() if tensor else np.issubdtype(score.dtype, np.floating)):
        raise TypeError(f"{caller}: score must be floating point, got {score.dtype}")
    return score, checked_owner(caption_to_image, (score.shape[0], score.shape[1]), caller)


def checked_owner(caption_to_image: Any, shape: tuple[int, int], caller: str) -> NDArray[np.int64]:
    """Check which image each caption describes, for scores of shape [I, T]; return int64 [T]."""
    owner = np.asarray(caption_to_image)
    images, captions = shape
    if owner.shape != (captions,):
        raise ValueError(
            f"{caller}: caption_to_image must be [T] with T = {captions} as in score {list(shape)}, "
            f"got {list(owner.shape)}; a transposed score matrix looks like this"
        )
    if not np.issubdtype(owner.dtype, np.integer):
        raise TypeError(f"{caller}: caption_to_image must hold integers, got {owner.dtype}")
    if owner.min() < 0 or owner.max() >= images:
        raise ValueError(
            f"{caller}: caption_to_image must lie in 0 ... {images - 1}, got {owner.min()} ... {owner.max()}"
        )
    return owner.astype(np.int64, copy=False)


def _row_blocks(score: NDArray[np.floating]) -> Iterator[tuple[int, NDArray[np.floating]]]:
    for start in range(0, len(score), _ROWS):
        yield start, np.ascontiguousarray(score[start : start + _ROWS])
