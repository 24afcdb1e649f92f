"""CxC and ECCV Caption metrics of the COCO 5K test set, computed by the eccv-caption package.

Under these labels a query has more right items than its own captions or image. R is their number in mAP@R and
R-Precision. The package takes ranked ids; only as many as the largest R are made for a query.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .best import contenders

_COLUMNS = 256  # captions transposed at once
_TIES = ("pessimistic", "optimistic", "published")


def why_no_relevance(image_ids: NDArray[np.integer] | None, caption_ids: NDArray[np.integer] | None) -> str | None:
    """Why CxC and ECCV metrics cannot be computed for a split, as one sentence; None when they can.

    Args:
        image_ids: [I] COCO image ids, or None.
        caption_ids: [T] COCO caption ids, or None.

    >>> why_no_relevance(None, None)
    'CxC and ECCV metrics need COCO image and caption ids, and this data has neither'
    """
    missing = [name for name, ids in (("image", image_ids), ("caption", caption_ids)) if ids is None]
    if missing:
        have = "neither" if len(missing) == 2 else f"no {missing[0]} ids"
        return f"CxC and ECCV metrics need COCO image and caption ids, and this data has {have}"
    if importlib.util.find_spec("eccv_caption") is None:
        return (
            "CxC and ECCV metrics need the package eccv-caption: pip install '.[eccv]' in the source folder of itm-fast"
        )
    labels = _labels()
    for what, ids, side in (("image", image_ids, "i2t"), ("caption", caption_ids, "t2i")):
        known = set(np.asarray(ids).tolist())
        for name in ("cxc_gts", "eccv_gts"):
            absent = [query for query in getattr(labels, name)[side] if query not in known]
            if absent:
                return (
                    f"CxC and ECCV metrics are of COCO's 5K test set, and {len(absent):,} of its {what} ids, such as "
                    f"{absent[0]}, are not in this data"
                )
    return None


def ties_of_relevance(ties: str) -> str:
    """The rule for ties of CxC and ECCV metrics when the rule of recall is `ties`.

    It is the same, but "pessimistic" for "expected": mAP@R has no short formula for its mean over all orders.
    """
    return "pessimistic" if ties == "expected" else ties


def relevance_metrics(
    score: NDArray[np.floating],
    image_ids: NDArray[np.integer],
    caption_ids: NDArray[np.integer],
    *,
    ties: str = "pessimistic",
) -> dict[str, dict[str, float]]:
    """CxC R@1/5/10 and ECCV Caption mAP@R, R-Precision and R@1 in both directions, in percent.

    Args:
        score: [I, T], finite.
        image_ids: [I] COCO image ids of the 5K test set.
        caption_ids: [T] COCO caption ids of the 5K test set.
        ties: the order of items with equal scores; "pessimistic": wrong items first; "optimistic": right items first;
            "published": by descending index. CxC and ECCV each have their own right items.

    Returns:
        `{"cxc_r1": {"i2t": ..., "t2i": ...}, "cxc_r5", "cxc_r10", "eccv_map_at_r", "eccv_rprecision", "eccv_r1"}`.

    Raises:
        ValueError: `why_no_relevance` gives a reason (which is the message), or `ties` is not one of these.
    """
    if ties not in _TIES:
        raise ValueError(f"relevance_metrics: ties must be one of {', '.join(_TIES)}, got {ties!r}")
    return relevance_by_ties(score, image_ids, caption_ids, (ties,))[ties]


def relevance_by_ties(
    score: NDArray[np.floating],
    image_ids: NDArray[np.integer],
    caption_ids: NDArray[np.integer],
    rules: Sequence[str] = _TIES,
) -> dict[str, dict[str, dict[str, float]]]:
    """`relevance_metrics` under each of the rules for ties, all in one pass over the scores."""
    reason = why_no_relevance(image_ids, caption_ids)
    if reason:
        raise ValueError(reason)
    labels = _labels()
    cxc = _ranked(score, image_ids, caption_ids, labels.cxc_gts, 10, rules)
    most = max(len(set(right)) for side in labels.eccv_gts.values() for right in side.values())
    eccv = _ranked(score, image_ids, caption_ids, labels.eccv_gts, most, rules)
    by_ties = {}
    for rule in rules:
        found = {f"cxc_r{k}": labels.cxc_recalls(cxc[rule], "all", K=k) for k in (1, 5, 10)}
        with contextlib.redirect_stderr(io.StringIO()):  # a progress bar that cannot be turned off
            found |= labels.eccv_metrics(eccv[rule], "all")
        by_ties[rule] = {
            name: {side: 100.0 * float(value) for side, value in sides.items()} for name, sides in found.items()
        }
    return by_ties


def _labels() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on import: that a faster JSON reader is not installed
        from eccv_caption import Metrics
    return Metrics()


def _ranked(
    score: NDArray[np.floating],
    image_ids: NDArray[np.integer],
    caption_ids: NDArray[np.integer],
    right: Mapping[str, Mapping[int, Iterable[int]]],
    k: int,
    rules: Sequence[str],
) -> dict[str, dict[str, dict[int, list[int]]]]:
    """For each rule, the ids of the k best items of every labelled query, best first."""
    ranked: dict[str, dict[str, dict[int, list[int]]]] = {rule: {"i2t": {}, "t2i": {}} for rule in rules}
    for side, query_ids, item_ids in (("i2t", image_ids, caption_ids), ("t2i", caption_ids, image_ids)):
        items = np.asarray(item_ids)
        position = {int(item): index for index, item in enumerate(item_ids)}
        for index, row in query_rows(score, side):
            query = int(query_ids[index])
            if query in right[side]:
                own = [position[item] for item in right[side][query] if item in position]
                for rule, best in _best(row, k, own, rules):
                    ranked[rule][side][query] = items[best].tolist()
    return ranked


def _best(
    row: NDArray[np.floating], k: int, right: list[int], rules: Sequence[str]
) -> Iterator[tuple[str, NDArray[np.int64]]]:
    found = contenders(row, k)
    is_right = np.isin(found, right)
    among_equals = {"pessimistic": (found, is_right), "optimistic": (found, ~is_right), "published": (-found,)}
    for rule in rules:
        yield rule, found[np.lexsort((*among_equals[rule], -row[found]))][:k]


def query_rows(score: NDArray[np.floating], side: str) -> Iterator[tuple[int, NDArray[np.floating]]]:
    """Yield each query's index and scores: rows for "i2t", columns for "t2i"; the matrix is not copied."""
    if side == "i2t":
        yield from enumerate(score)
        return
    for start in range(0, score.shape[1], _COLUMNS):
        block = np.ascontiguousarray(score[:, start : start + _COLUMNS].T)
        yield from enumerate(block, start)
