"""Pairs of an image and a caption that are right for each other, any number on both sides.

A caption that several images fit (as under CxC's labels, or where an image is in the set twice) has several right
images. As for images, its rank is that of its best right item, and its other right items do not lower it.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .._files import require_regular
from ..data.stored import open_npy
from .counting import Counts, Standings, checked, count, require_finite

_COMPARED = 1 << 20  # scores compared at once


def pairs_of(caption_to_image: NDArray[np.integer]) -> NDArray[np.int64]:
    """The right pairs of captions that describe one image each.

    Args:
        caption_to_image: [T].

    Returns:
        int64 [2, T]: images, captions.

    >>> pairs_of(np.array([0, 0, 1])).tolist()
    [[0, 0, 1], [0, 1, 2]]
    """
    return np.stack([np.asarray(caption_to_image, np.int64), np.arange(len(caption_to_image))])


def right_items(pairs: NDArray[np.int64], side: str, query: int) -> NDArray[np.int64]:
    """The right items of one query: captions of an image ("i2t"), images of a caption ("t2i").

    >>> right_items(np.array([[0, 0, 1], [0, 1, 2]]), "i2t", 0)
    array([0, 1])
    """
    asked, found = pairs if side == "i2t" else pairs[::-1]
    return found[asked == query]


def count_pairs(score: NDArray[np.floating] | torch.Tensor, pairs: NDArray[np.integer], caller: str) -> Counts:
    """Count both directions of a score matrix, as `counting.count`, with any number of right images per caption.

    Args:
        score: [I, T].
        pairs: [2, P] images and captions, each pair once; every caption is in at least one.
        caller: name of the public function, for error messages.

    Raises:
        ValueError: an index is out of range, a caption has no right image, a pair stands twice, or a score is NaN or
            infinite.
    """
    images, captions = (np.asarray(one, np.int64) for one in pairs)
    shape = tuple(score.shape)
    if len(shape) == 2 and np.array_equal(captions, np.arange(shape[1])):
        return count(score, images, caller)
    found, _ = checked(score, np.zeros(shape[1] if len(shape) == 2 else 0, np.int64), caller)
    matrix = found.cpu().numpy() if isinstance(found, torch.Tensor) else found
    for what, one, size in (("image", images, len(matrix)), ("caption", captions, matrix.shape[1])):
        if len(one) and not (one.min() >= 0 and one.max() < size):
            raise ValueError(f"{caller}: {what}s must lie in 0 ... {size - 1}, got {one.min()} ... {one.max()}")
    if len(without := np.flatnonzero(np.bincount(captions, minlength=matrix.shape[1]) == 0)):
        raise ValueError(
            f"{caller}: caption {without[0]} has no right image, as {len(without):,} in all; leave such captions out "
            "of the scores"
        )
    if len(np.unique(images * matrix.shape[1] + captions)) < len(images):
        raise ValueError(f"{caller}: a caption names an image twice")
    sides = _count(matrix, images, captions)
    query_images = np.flatnonzero(sides[0].right_total)
    return Counts(Standings(*(one[query_images] for one in sides[0])), sides[1], query_images, *matrix.shape)


def _count(
    score: NDArray[np.floating], images: NDArray[np.int64], captions: NDArray[np.int64]
) -> tuple[Standings, Standings]:
    """The standings of all images, also of those without a caption, and of all captions."""
    right = score[images, captions]
    best, last, right_tied, totals = [], [], [], []
    for query, item, size in ((images, captions, len(score)), (captions, images, score.shape[1])):
        mark = np.full(size, -np.inf, score.dtype)
        with np.errstate(invalid="ignore"):  # NaN is refused below, with its image and caption
            np.maximum.at(mark, query, right)
        level = right == mark[query]
        highest = np.full(size, -1)
        np.maximum.at(highest, query[level], item[level])
        best.append(mark)
        last.append(highest)
        right_tied.append(np.bincount(query[level], minlength=size))
        totals.append(np.bincount(query, minlength=size))
    of_images, of_captions = (np.zeros((3, size), np.int64) for size in score.shape)
    step = max(1, _COMPARED // score.shape[1])
    for start in range(0, len(score), step):
        rows = slice(start, min(start + step, len(score)))
        block = np.ascontiguousarray(score[rows])
        require_finite(block, start)
        mark, equal = best[0][rows, None], block == best[0][rows, None]
        ahead = equal & (np.arange(score.shape[1]) > last[0][rows, None])
        of_images[:, rows] = (block > mark).sum(1), equal.sum(1), ahead.sum(1)
        equal = block == best[1]
        ahead = equal & (np.arange(rows.start, rows.stop)[:, None] > last[1])
        of_captions += (block > best[1]).sum(0), equal.sum(0), ahead.sum(0)
    sides = [
        Standings(above, tied - own, ahead, own, total)
        for (above, tied, ahead), own, total in zip((of_images, of_captions), right_tied, totals, strict=True)
    ]
    return sides[0], sides[1]


def read_right_pairs(path: str | os.PathLike[str], images: int, captions: int) -> NDArray[np.int64]:
    """Read which images each caption describes.

    Args:
        path: `.npy`: integers [T], or booleans [I, T] that are true for right pairs; `.json`: a list with a number or
            a list of numbers for each caption; any other file is a text with a line for each caption, whose numbers
            are separated by spaces or commas. Images count from 0.
        images, captions: size of the score matrix.

    Returns:
        int64 [2, P]: images, captions, ordered by caption.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is not as stated, or does not fit the matrix; the message names the line or entry.
    """
    path = Path(path)
    require_regular(path)
    kind = path.suffix.lower()
    if kind == ".npy":
        found = open_npy(path)
        if found.dtype == np.bool_ and found.ndim == 2:
            if found.shape != (images, captions):
                raise ValueError(f"{path} holds {list(found.shape)}, and the scores are {[images, captions]}")
            return np.stack(np.nonzero(found.T)[::-1]).astype(np.int64)
        if found.ndim != 1 or found.dtype.kind not in "iu":
            raise ValueError(f"{path} must hold integers [T] or booleans [I, T], got {found.dtype} {list(found.shape)}")
        rows: list[Any] = found.tolist()
    elif kind == ".json":
        try:
            rows = json.loads(path.read_text(encoding="utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not JSON: {error}") from None
        if not isinstance(rows, list):
            raise ValueError(f"{path} must be a list with an entry for each caption")
    else:
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not text; give a .npy, .json or text file ({error})") from None
        while lines and not lines[-1].strip():
            lines.pop()
        rows = [line.replace(",", " ").split() for line in lines]
    return _pairs(rows, path, images, captions)


def _pairs(rows: list[Any], path: Path, images: int, captions: int) -> NDArray[np.int64]:
    if len(rows) != captions:
        raise ValueError(
            f"{path} has {len(rows):,} captions, and the score matrix has {captions:,} columns ({images:,} rows); a "
            "transposed score matrix looks like this"
        )
    pairs: list[tuple[int, int]] = []
    for caption, row in enumerate(rows):
        for word in row if isinstance(row, list) else [row]:
            try:
                image = int(word) if isinstance(word, (int, str)) and not isinstance(word, bool) else -1
            except ValueError:
                image = -1
            if not 0 <= image < images:
                raise ValueError(
                    f"{path}, caption {caption}: {word!r} is no image number from 0 to {images - 1}; captions and "
                    "images count from 0"
                )
            pairs.append((image, caption))
    return np.array(pairs, np.int64).reshape(-1, 2).T
