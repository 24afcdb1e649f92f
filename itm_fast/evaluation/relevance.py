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

from .._names import Ties
from .best import TieOrder, Wanted, contenders, right_pairs

_COLUMNS = 256  # captions transposed at once
_CXC = 10  # CxC recall is reported at 10 at most
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
    ties: Ties = "pessimistic",
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
    cxc = _ranked(score, image_ids, caption_ids, labels.cxc_gts, _CXC, rules)
    eccv = _ranked(score, image_ids, caption_ids, labels.eccv_gts, _most(labels.eccv_gts), rules)
    return {rule: _metrics(labels, cxc[rule], eccv[rule]) for rule in rules}


def wanted_for_relevance(image_ids: NDArray[np.integer], caption_ids: NDArray[np.integer]) -> dict[str, Wanted]:
    """The best items from which `relevance_of_best` computes what `relevance_by_ties` computes from all scores.

    Raises:
        ValueError: `why_no_relevance` gives a reason, which is the message.
    """
    reason = why_no_relevance(image_ids, caption_ids)
    if reason:
        raise ValueError(reason)
    labels = _labels()
    wanted = {}
    for name, right, k in (("cxc", labels.cxc_gts, _CXC), ("eccv", labels.eccv_gts, _most(labels.eccv_gts))):
        for side, query_ids, item_ids in _sides(image_ids, caption_ids):
            labelled = list(_labelled(right[side], query_ids, item_ids))
            queries = np.array([index for index, _ in labelled], np.int64)
            pairs = right_pairs([own for _, own in labelled], len(item_ids))
            for rule in _TIES:
                order = TieOrder(True) if rule == "published" else TieOrder(False, pairs, rule == "optimistic")
                wanted[f"{name} {side} {rule}"] = Wanted(side, k, order, queries)
    return wanted


def relevance_of_best(
    wanted: Mapping[str, Wanted],
    found: Mapping[str, NDArray[np.int64]],
    image_ids: NDArray[np.integer],
    caption_ids: NDArray[np.integer],
) -> dict[str, dict[str, dict[str, float]]]:
    """As `relevance_by_ties`, from the best items of the queries of each list that is wanted, best first."""
    labels = _labels()

    def ranked(name: str, rule: str) -> dict[str, dict[int, list[int]]]:
        lists = {}
        for side, query_ids, item_ids in _sides(image_ids, caption_ids):
            key = f"{name} {side} {rule}"
            queries = np.asarray(query_ids)[wanted[key].queries].tolist()
            lists[side] = dict(zip(queries, np.asarray(item_ids)[found[key]].tolist(), strict=True))
        return lists

    return {rule: _metrics(labels, ranked("cxc", rule), ranked("eccv", rule)) for rule in _TIES}


def _most(right: Mapping[str, Mapping[int, Iterable[int]]]) -> int:
    """The number of right items of the query that has most."""
    return max(len(set(own)) for side in right.values() for own in side.values())


def _metrics(labels: Any, cxc: Any, eccv: Any) -> dict[str, dict[str, float]]:
    """All metrics of ranked ids, in percent."""
    found = {f"cxc_r{k}": labels.cxc_recalls(cxc, "all", K=k) for k in (1, 5, 10)}
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar that cannot be turned off
        found |= labels.eccv_metrics(eccv, "all")
    return {name: {side: 100.0 * float(value) for side, value in sides.items()} for name, sides in found.items()}


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
    for side, query_ids, item_ids in _sides(image_ids, caption_ids):
        items = np.asarray(item_ids)
        labelled = dict(_labelled(right[side], query_ids, item_ids))
        for index, row in query_rows(score, side):
            if index in labelled:
                for rule, best in _best(row, k, labelled[index], rules):
                    ranked[rule][side][int(query_ids[index])] = items[best].tolist()
    return ranked


def _sides(
    image_ids: NDArray[np.integer], caption_ids: NDArray[np.integer]
) -> Iterator[tuple[str, NDArray[np.integer], NDArray[np.integer]]]:
    """Each direction with the ids of its queries and of its items."""
    yield "i2t", image_ids, caption_ids
    yield "t2i", caption_ids, image_ids


def _labelled(
    right: Mapping[int, Iterable[int]], query_ids: NDArray[np.integer], item_ids: NDArray[np.integer]
) -> Iterator[tuple[int, list[int]]]:
    """The index of every query that has labels, and the indices of its right items."""
    position = {int(item): index for index, item in enumerate(item_ids)}
    for index, query in enumerate(query_ids):
        if int(query) in right:
            yield index, [position[item] for item in right[int(query)] if item in position]


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
