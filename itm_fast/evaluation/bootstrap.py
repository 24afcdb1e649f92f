"""Is one model better than another, or is it the choice of test images and seeds? A paired bootstrap of each recall.

A bootstrap sample draws I of the I images with replacement, each with all its captions, as the captions of an image are
not independent. Both models are rated on the same sample, so what is hard for both cancels in their difference

    d* = recall of B on the sample - recall of A on the sample.

The interval holds the middle 95 % of d*. The p-value is two-sided: twice the smaller of the shares of samples with
d* <= 0 and with d* >= 0, each counted with one sample more, so that it is never 0. Where a model was trained with
several seeds, each sample also draws as many of its runs with replacement, and the recall is their mean.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .._names import Ties
from . import TIES
from .kept_ranks import KeptRanks, hits

_BLOCK = 128  # bootstrap samples drawn at once
_SIDES = {"i2t": "image to text", "t2i": "text to image"}


class Difference(NamedTuple):
    """One metric of both models.

    Attributes:
        metric: such as "image to text R@1", or "sum".
        a, b: in percent, the mean over the seeds.
        difference: b - a.
        low, high: ends of the confidence interval of the difference.
        p: two-sided p-value.
    """

    metric: str
    a: float
    b: float
    difference: float
    low: float
    high: float
    p: float


@dataclass(frozen=True)
class Comparison:
    """What `compare` found; `print` it.

    Attributes:
        names: of A and of B.
        runs: how many runs (seeds) each has.
        rows: one `Difference` for each recall and for their sum.
        settings: images, captions, samples, seed, confidence and rule for ties.
    """

    names: tuple[str, str]
    runs: tuple[int, int]
    rows: tuple[Difference, ...]
    settings: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        level = f"{100 * self.settings['confidence']:g} % interval"
        table = [["", "A", "B", "B - A", level, "p"]]
        for row in self.rows:
            interval = f"{row.low:+.2f} to {row.high:+.2f}"
            numbers = [f"{row.a:.2f}", f"{row.b:.2f}", f"{row.difference:+.2f}", interval, f"{row.p:.4f}"]
            table.append([row.metric, *numbers])
        widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
        lines = [
            "  ".join([line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:]))])
            for line in table
        ]
        kind = [f"{name}, {runs} runs" if runs > 1 else name for name, runs in zip(self.names, self.runs)]
        end = "{images:,} images, {captions:,} captions; {samples:,} bootstrap samples, ties {ties}"
        return "\n".join([f"A: {kind[0]}", f"B: {kind[1]}", "", *lines, "", end.format(**self.settings)])

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for `json.dump`."""
        a, b = ({"name": name, "runs": runs} for name, runs in zip(self.names, self.runs))
        return {"a": a, "b": b, "settings": self.settings, "metrics": [row._asdict() for row in self.rows]}


def compare(
    a: KeptRanks | Sequence[KeptRanks],
    b: KeptRanks | Sequence[KeptRanks],
    *,
    cutoffs: Sequence[int] = (1, 5, 10),
    ties: Ties = "pessimistic",
    samples: int = 10_000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Comparison:
    """Compare two models on the same test set by a paired bootstrap of each recall.

    Of a run with several models, the last is compared: the ensemble.

    Args:
        a, b: as `load_ranks` reads them: one run of a model, or its runs with several seeds.
        cutoffs: the k of R@k.
        ties: rule for ties, as for `metrics`.
        samples: bootstrap samples.
        seed: of the samples.
        confidence: of the intervals, between 0 and 1.

    Returns:
        `Comparison`. With few seeds the spread between them is understated: of n runs, by a factor sqrt((n - 1) / n).

    Raises:
        ValueError: the runs are not of the same images and captions, or an option is out of its range.

    >>> from itm_fast.evaluation.counting import count
    >>> from itm_fast.evaluation.many_right import pairs_of
    >>> owner, scores = np.arange(40), np.random.default_rng(0).normal(size=(2, 40, 40)) + 3 * np.eye(40)
    >>> a, b = (KeptRanks(("model",), (count(s, owner, "example"),), pairs_of(owner)) for s in scores)
    >>> row = compare(a, b, samples=200).rows[0]
    >>> row.metric, row.low <= row.difference <= row.high, 0 < row.p <= 1
    ('image to text R@1', True, True)
    """
    sides = [[one] if isinstance(one, KeptRanks) else list(one) for one in (a, b)]
    _check(sides, cutoffs, ties, samples, confidence)
    first = sides[0][0]
    group = _image_of_captions(first.pairs, first.counts[0].captions)
    queries = _per_image(first, group)
    per_run = [np.stack([_hits(run, group, cutoffs, ties) for run in runs]) for runs in sides]  # [runs, I, M]
    images, count = len(queries), len(cutoffs)
    rng = np.random.default_rng(seed)
    draws = np.empty((samples, 2, 2 * count + 1))
    for start in range(0, samples, _BLOCK):
        size = min(_BLOCK, samples - start)
        drawn = rng.integers(images, size=(size, images)) + images * np.arange(size)[:, None]
        weights = np.bincount(drawn.ravel(), minlength=size * images).reshape(size, images).astype(np.float64)
        for model, found in enumerate(per_run):
            runs = len(found)
            chosen = rng.multinomial(runs, np.full(runs, 1 / runs), size=size) / runs  # [samples, runs]
            draws[start : start + size, model] = _recalls(weights, found, queries, chosen)
    ones, whole = np.ones((1, images)), np.empty((2, 2 * count + 1))
    for model, found in enumerate(per_run):
        whole[model] = _recalls(ones, found, queries, np.full((1, len(found)), 1 / len(found)))[0]
    names = [f"{title} R@{k}" for title in _SIDES.values() for k in cutoffs] + ["sum"]
    change = draws[:, 1] - draws[:, 0]
    change[np.abs(change) < 1e-9] = 0.0  # the rounding of equal recalls that were added in another order
    tail = (1 - confidence) / 2
    low, high = np.quantile(change, [tail, 1 - tail], axis=0)
    p = 2 * (1 + np.minimum((change <= 0).sum(0), (change >= 0).sum(0))) / (samples + 1)
    rows = [
        Difference(name, *(float(one[m]) for one in (*whole, whole[1] - whole[0], low, high, np.minimum(p, 1))))
        for m, name in enumerate(names)
    ]
    counts = first.counts[0]
    settings = {
        "images": counts.images, "captions": counts.captions, "samples": samples, "seed": seed,
        "confidence": confidence, "ties": ties,
    }  # fmt: skip
    return Comparison((_label(sides[0]), _label(sides[1])), (len(sides[0]), len(sides[1])), tuple(rows), settings)


def _label(runs: list[KeptRanks]) -> str:
    """The compared model, and the folder that its runs were read from."""
    folders = [os.path.dirname(run.path) for run in runs if run.path]
    return runs[0].names[-1] + (f" ({os.path.commonpath(folders)})" if folders else "")


def _check(sides: list[list[KeptRanks]], cutoffs: Sequence[int], ties: str, samples: int, confidence: float) -> None:
    if not all(sides):
        raise ValueError("compare: A and B need at least one run each")
    if ties not in TIES:
        raise ValueError(f"compare: ties must be one of {', '.join(TIES)}, got {ties!r}")
    if not cutoffs or min(cutoffs) < 1:
        raise ValueError(f"compare: cut-offs must be at least 1, got {list(cutoffs)}")
    if samples < 1 or not 0 < confidence < 1:
        raise ValueError(f"compare: samples must be at least 1 and confidence in (0, 1), got {samples}, {confidence}")
    first = sides[0][0]
    for run in (run for runs in sides for run in runs):
        where = [f" ({one.path})" if one.path else "" for one in (first, run)]
        sizes = [(one.counts[0].images, one.counts[0].captions) for one in (first, run)]
        if sizes[0] != sizes[1]:
            told = [f"{images:,} images and {captions:,} captions" for images, captions in sizes]
            raise ValueError(f"compare: one run has {told[0]}{where[0]}, another {told[1]}{where[1]}")
        if not np.array_equal(first.pairs, run.pairs) or (first.data and run.data and first.data != run.data):
            raise ValueError(
                f"compare: the runs{where[0]} and{where[1]} are of other captions or of other right pairs, so their "
                "queries cannot be paired; evaluate both on the same split"
            )


def _image_of_captions(pairs: NDArray[np.int64], captions: int) -> NDArray[np.int64]:
    """The image with which each caption is drawn: its first right one."""
    group = np.full(captions, np.iinfo(np.int64).max)
    np.minimum.at(group, pairs[1], pairs[0])
    return group


def _per_image(run: KeptRanks, group: NDArray[np.int64]) -> NDArray[np.float64]:
    """How many queries of both directions each image brings, [I, 2]."""
    images = run.counts[0].images
    asked = [np.bincount(one, minlength=images) for one in (run.counts[0].query_images, group)]
    return np.stack(asked, 1).astype(np.float64)


def _hits(run: KeptRanks, group: NDArray[np.int64], cutoffs: Sequence[int], ties: str) -> NDArray[np.float64]:
    """How many of the queries that each image brings find a right item, [I, metrics], image to text first."""
    found = run.counts[-1]
    return np.stack(
        [
            np.bincount(image, hits(side, k, ties), minlength=found.images)
            for side, image in ((found.i2t, found.query_images), (found.t2i, group))
            for k in cutoffs
        ],
        1,
    )


def _recalls(
    weights: NDArray[np.float64],
    found: NDArray[np.float64],
    queries: NDArray[np.float64],
    chosen: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Recalls in percent and their sum, [samples, metrics + 1].

    Args:
        weights: [samples, I] how often an image was drawn.
        found: [runs, I, metrics], as `_hits`.
        queries: [I, 2], as `_per_image`.
        chosen: [samples, runs] weight of each run.
    """
    runs, images, metrics = found.shape
    right = (weights @ found.transpose(1, 0, 2).reshape(images, -1)).reshape(-1, runs, metrics)
    asked = np.repeat(weights @ queries, metrics // 2, axis=1)
    recalls = 100 * np.einsum("sr,srm->sm", chosen, right) / np.maximum(asked, 1)
    return np.concatenate([recalls, recalls.sum(1, keepdims=True)], axis=1)
