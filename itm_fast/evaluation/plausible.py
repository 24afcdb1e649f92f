"""Plausible Match R-Precision (PMRP) of the COCO 5K test set (Chun et al., CVPR 2021).

Two images match plausibly if their COCO object labels differ in few classes, and then so do their captions. With R
right items under these labels, a query's R-precision is the share of right items among its first R; PMRP is the mean
over all queries. The labels are files of 140 MB that the eccv-caption project offers for download:
`pm_image_to_caption.json` and `pm_caption_to_image.json`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .relevance import query_rows, relevance_by_ties

FILES = {"i2t": "pm_image_to_caption.json", "t2i": "pm_caption_to_image.json"}
_TIES = ("pessimistic", "optimistic", "published")
Plausible = dict[str, dict[int, list[int]]]


def load_plausible(folder: str | os.PathLike[str]) -> Plausible:
    """Read the plausible matches: the ids of the right items of each query's id, by direction.

    Raises:
        OSError: a file cannot be read; if it is not there, the message says where it comes from.
        ValueError: a file is not as stated.
    """
    found = {}
    for side, name in FILES.items():
        path = Path(folder) / name
        try:
            content = json.loads(path.read_bytes())
            found[side] = {int(query): [int(item) for item in items] for query, items in content.items()}
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{path}: {error.strerror}; --pmrp DIR must hold {' and '.join(FILES.values())}, which the "
                "eccv-caption project (github.com/naver-ai/eccv-caption) offers for download"
            ) from error
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path} must hold an object: query id -> list of item ids ({error})") from error
    return found


def plausible_of(
    folder: str | os.PathLike[str], image_ids: NDArray[np.integer] | None, caption_ids: NDArray[np.integer] | None
) -> Plausible:
    """Read the plausible matches for data with these ids; before anything is scored, as it may not fit them.

    Raises:
        OSError: a file cannot be read.
        ValueError: a file is not as stated, the data have no COCO ids, or an id of the labels is not in the data.
    """
    if image_ids is None or caption_ids is None:
        both = image_ids is None and caption_ids is None
        lacks = "neither" if both else f"no {'image' if image_ids is None else 'caption'} ids"
        raise ValueError(
            f"PMRP needs COCO image and caption ids, and this data has {lacks}: they are in SPLIT_ids.txt and "
            "SPLIT_capids.txt beside a split's features, and for a score matrix in --image-ids and --caption-ids"
        )
    labels = load_plausible(folder)
    ids = {"image": set(np.asarray(image_ids).tolist()), "caption": set(np.asarray(caption_ids).tolist())}
    labelled = {kind: _ids_of(labels, kind) for kind in ids}
    part = all(ids[kind] <= labelled[kind] for kind in ids)
    for kind, known in ids.items():
        if absent := sorted(labelled[kind] - known):
            one = len(absent) == 1
            which = f"{absent[0]}, is" if one else f"such as {absent[0]}, are"
            hint = "; it is a part of that set, all of which is the split testall (--split testall)" if part else ""
            raise ValueError(
                f"PMRP is of COCO's 5K test set, and {len(absent):,} of its {kind} ids, {which} not in this data{hint}"
            )
    return labels


def _ids_of(labels: Plausible, kind: str) -> set[int]:
    """All image, or all caption, ids of the labels."""
    own, other = ("i2t", "t2i") if kind == "image" else ("t2i", "i2t")
    return {*labels[own], *(item for items in labels[other].values() for item in items)}


def relevance_with_plausible(
    score: NDArray[np.floating],
    image_ids: NDArray[np.integer] | None,
    caption_ids: NDArray[np.integer] | None,
    missing: str | None,
    plausible: Plausible | None,
) -> dict[str, dict[str, dict[str, float]]]:
    """All metrics of COCO's other labels, under each rule for ties: CxC and ECCV Caption ones, and PMRP.

    Args:
        score: [I, T], finite.
        image_ids: [I] COCO image ids.
        caption_ids: [T] COCO caption ids.
        missing: why there are no CxC and ECCV Caption metrics (`why_no_relevance`), which are then left out.
        plausible: from `plausible_of`; PMRP is left out if None.

    Returns:
        `{rule: {metric: {"i2t": ..., "t2i": ...}}}` in percent; empty if both are left out.
    """
    found = {} if missing else relevance_by_ties(score, image_ids, caption_ids)  # type: ignore[arg-type]
    if plausible is not None:
        assert image_ids is not None
        assert caption_ids is not None
        for rule, sides in plausible_r_precision(score, image_ids, caption_ids, plausible).items():
            found.setdefault(rule, {})["pmrp"] = sides
    return found


def plausible_r_precision(
    score: NDArray[np.floating],
    image_ids: NDArray[np.integer],
    caption_ids: NDArray[np.integer],
    plausible: Plausible,
) -> dict[str, dict[str, float]]:
    """PMRP in percent under each rule for ties.

    Args:
        score: [I, T], finite.
        image_ids: [I] COCO image ids.
        caption_ids: [T] COCO caption ids.
        plausible: as `plausible_of` returns it, so that all its ids are in the data.

    Returns:
        `{rule: {"i2t": ..., "t2i": ...}}` for "pessimistic" (wrong items first among equal scores), "optimistic" and
        "published" (descending index).

    >>> score, ids = np.array([[0.9, 0.8], [0.7, 0.1]]), np.array([7, 8])
    >>> plausible = {"i2t": {7: [7], 8: [7]}, "t2i": {7: [7, 8], 8: [8]}}
    >>> plausible_r_precision(score, ids, ids, plausible)["pessimistic"]
    {'i2t': 100.0, 't2i': 50.0}
    """
    found: dict[str, dict[str, float]] = {rule: {} for rule in _TIES}
    for side, query_ids, item_ids in (("i2t", image_ids, caption_ids), ("t2i", caption_ids, image_ids)):
        labels, place = plausible[side], {int(item): index for index, item in enumerate(item_ids)}
        precisions: dict[str, list[float]] = {rule: [] for rule in _TIES}
        for index, row in query_rows(score, side):
            items = labels.get(int(query_ids[index]))
            if not items:
                continue
            is_right = np.zeros(len(row), bool)
            is_right[[place[item] for item in items]] = True
            for rule, right in _right_among_first(row, is_right).items():
                precisions[rule].append(right / int(is_right.sum()))
        for rule in _TIES:
            found[rule][side] = 100.0 * float(np.mean(precisions[rule]))
    return found


def _right_among_first(row: NDArray[np.floating], is_right: NDArray[np.bool_]) -> dict[str, int]:
    """How many of the first R items are right, R = the number of right items, under each rule for ties."""
    r = int(is_right.sum())
    mark = np.partition(row, len(row) - r)[len(row) - r]  # the score at place R
    above, level = row > mark, row == mark
    sure, left = int((above & is_right).sum()), r - int(above.sum())
    tied, tied_right = int(level.sum()), int((level & is_right).sum())
    last = np.flatnonzero(level)[::-1][:left]
    return {
        "pessimistic": sure + max(0, left - (tied - tied_right)),
        "optimistic": sure + min(left, tied_right),
        "published": sure + int(is_right[last].sum()),
    }
