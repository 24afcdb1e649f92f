"""Rankings in the format of TREC, for trec_eval, pytrec_eval, ranx and ir_measures."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .._files import atomic_write
from .best import best_items
from .relevance import query_rows

BestItems = Mapping[str, tuple[NDArray[np.int64], NDArray[np.float32]]]  # direction -> items, scores


def write_trec(
    folder: str | os.PathLike[str],
    score: NDArray[np.floating] | BestItems,
    caption_to_image: NDArray[np.integer],
    *,
    top: int = 100,
    tag: str = "itm-fast",
    image_ids: NDArray[np.integer] | None = None,
    caption_ids: NDArray[np.integer] | None = None,
) -> list[Path]:
    """Write run and relevance files of both directions: `i2t.run`, `i2t.qrels`, `t2i.run`, `t2i.qrels`.

    A run line is `query Q0 item rank score tag`, a relevance line `query 0 item 1`. Tied items stand in the order of
    the data; the programs above sort by score and break ties by their own rules.

    Args:
        folder: created if it does not exist.
        score: [I, T], finite; or the best items of each query, as `Ranking.best` and `Report.best`.
        caption_to_image: [T].
        top: how many items of each query to keep.
        tag: last column, without white space.
        image_ids: [I] written instead of 0 ... I - 1.
        caption_ids: [T] written instead of 0 ... T - 1.

    Returns:
        The files written, each completely or not at all.

    Raises:
        ValueError: top is less than 1, or more than the best items that `score` has; or the tag has white space.
    """
    if top < 1 or not tag or len(tag.split()) != 1:
        raise ValueError(f"write_trec: top must be at least 1 and tag one word, got {top} and {tag!r}")
    if isinstance(score, Mapping):
        sizes = len(score["i2t"][0]), len(score["t2i"][0])
        for side, most in (("i2t", sizes[1]), ("t2i", sizes[0])):
            if (k := score[side][0].shape[1]) < min(top, most):
                raise ValueError(f"write_trec: top is {top}, but only the {k} best items of each query were kept")
    else:
        sizes = score.shape[0], score.shape[1]
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    images = np.arange(sizes[0]) if image_ids is None else np.asarray(image_ids)
    captions = np.arange(sizes[1]) if caption_ids is None else np.asarray(caption_ids)
    for side, queries, items in (("i2t", images, captions), ("t2i", captions, images)):
        with atomic_write(folder / f"{side}.run") as file:
            for query, best, values in _best(score, side, top):
                for rank, (item, value) in enumerate(zip(best, values, strict=True), 1):
                    file.write(f"{queries[query]} Q0 {items[item]} {rank} {value:.9g} {tag}\n")
        with atomic_write(folder / f"{side}.qrels") as file:
            pairs = zip(np.asarray(caption_to_image), range(len(captions)), strict=True)
            for image, caption in sorted((int(a), b) for a, b in pairs) if side == "i2t" else pairs:
                pair = (images[image], captions[caption])
                query_id, item_id = pair if side == "i2t" else pair[::-1]
                file.write(f"{query_id} 0 {item_id} 1\n")
    return [folder / f"{side}.{kind}" for side in ("i2t", "t2i") for kind in ("run", "qrels")]


def _best(
    score: NDArray[np.floating] | BestItems, side: str, top: int
) -> Iterator[tuple[int, NDArray[np.int64], NDArray[np.floating]]]:
    """Each query with its best items and their scores."""
    if isinstance(score, Mapping):
        for query, (best, values) in enumerate(zip(*score[side], strict=True)):
            yield query, best[:top], values[:top]
        return
    for query, row in query_rows(score, side):
        best = best_items(row, top)
        yield query, best, row[best] + 0  # 0.0 for -0.0
