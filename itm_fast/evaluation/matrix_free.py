"""Ranks and metrics without the score matrix: each block of scores is counted and forgotten.

The right pairs are scored first: a block of 16 images with their own captions at a time, 16 / I of all the work. Then
every block of `score_all` is scored once and compared with them; see `counting` for what is counted. A backend may
give a pair other last bits in another block, so a right pair has everywhere the score of the first pass: a query's own
right item is never above it or tied with it by rounding.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .._workspace import GIB, workspace
from .block_scores import BlockScorer, score_blocks
from .counters import Counters
from .counting import Counts, checked_owner
from .encoding import Encoded, evaluation_mode
from .ranking import fold_images
from .scoring import columns_of, plan_encoded, with_equal_captions
from .tie_rules import Metrics, Ranks, metrics_of, ranks_of

_GROUP = 16  # images that are scored together with their own captions, in the first pass


@dataclass(frozen=True, eq=False)
class Ranking:
    """What the ranks of one scorer follow from, without its scores.

    Attributes:
        counts: of all images and captions.
        folds: of each fold; empty without folds.
    """

    counts: Counts
    folds: tuple[Counts, ...] = ()

    def ranks(self, ties: str = "pessimistic") -> Ranks:
        """As `itm_fast.evaluation.ranks` of the score matrix."""
        return ranks_of(self.counts, ties)

    def metrics(self, *, ties: str = "pessimistic") -> Metrics:
        """As `itm_fast.evaluation.metrics` of the score matrix."""
        return metrics_of(self.counts, ties)

    def fold_metrics(self, *, ties: str = "pessimistic") -> list[Metrics]:
        """As `itm_fast.evaluation.fold_metrics` of the score matrix; empty without folds."""
        return [metrics_of(found, ties) for found in self.folds]


def rank_all(
    scorers: Any,
    encoded: Encoded | Sequence[Encoded],
    *,
    folds: int | None = None,
    memory_gb: float | None = None,
    progress: bool = True,
) -> tuple[Ranking, ...]:
    """Rank every image against every caption and back, without holding their score matrix.

    The ranks are those of the matrix that `score_all` returns if the backend gives a pair the same bits in every block,
    as `cpu` does. With another backend, such as `torch`, a right pair may differ from the matrix in its last bits,
    which matters to wrong items that are as close, such as an image that is in the split twice.

    Several scorers are ranked one by one and by the mean of their scores, in float32 as in `evaluate`; their encoded
    splits and states are then in memory together.

    Args:
        scorers: a pair scorer as for `score_all`, or a sequence of them.
        encoded: as `encode` returns it: one per scorer, all of the same split.
        folds: also rank within this many equal, consecutive parts of the images, as `fold_metrics` does.
        memory_gb: as for `score_all`; no score matrix is counted.
        progress: show a bar with pairs/s and the time left on standard error.

    Returns:
        One `Ranking` per scorer and, with several, one of the mean of their scores, last.

    Raises:
        TypeError: `caption_to_image` does not hold integers.
        ValueError: as `score_all`; `caption_to_image` does not fit; the images do not divide into the folds, or a fold
            has no caption; scorers and splits differ in number, or the splits in their images, captions or which
            captions are the same.

    >>> from itm_fast.nn import CrossAttentionScore
    >>> image, words = torch.randn(2, 3, 8), torch.randn(5, 8)
    >>> encoded = Encoded(image, None, words, torch.tensor([0, 2, 5], dtype=torch.int32), np.array([0, 1]))
    >>> (found,) = rank_all(CrossAttentionScore(), encoded, progress=False)
    >>> found.ranks().t2i.shape, found.metrics().t2i.queries
    ((2,), 2)
    """
    from tqdm import tqdm

    scorers = list(scorers) if isinstance(scorers, (list, tuple)) else [scorers]
    splits = [with_equal_captions(one) for one in ([encoded] if isinstance(encoded, Encoded) else encoded)]
    _require_same_split(len(scorers), splits)
    images = len(splits[0].image)
    owner = checked_owner(splits[0].caption_to_image, (images, len(splits[0].lengths)), "rank_all")
    parts = [] if folds is None else fold_images(owner, images, folds, "rank_all")
    order, column = columns_of(splits[0])
    own = _ByKey(owner, images)
    captions_of = _ByKey(column, len(order))
    with contextlib.ExitStack() as stack:
        stack.enter_context(evaluation_mode(*scorers))
        stack.enter_context(torch.no_grad())
        members: list[BlockScorer] = []
        block = None
        for scorer, split in zip(scorers, splits, strict=True):
            plan = plan_encoded(scorer, split, memory_gb, 0, block)  # the states of those before count as in use
            block = (plan.image_block, plan.caption_block)
            stack.enter_context(workspace(plan.workspace / GIB))
            members.append(BlockScorer(scorer, split, plan, order))
        right = _with_mean(_right_scores(members, owner, column, own))
        systems = [Counters(score, owner, images) for score in right]
        within = [Counters(score, owner, images) for score in right if parts]
        bar = stack.enter_context(
            tqdm(total=plan.pairs * len(members), desc="scores", unit="pair", unit_scale=True, disable=not progress)
        )
        for _, rows, columns, found in score_blocks(members, range(plan.blocks)):
            width = columns.stop - columns.start
            mine = own[rows]
            mine = mine[(column[mine] >= columns.start) & (column[mine] < columns.stop)]
            cells = owner[mine] - rows.start, column[mine] - columns.start
            scores = [np.array(one) for one in found]  # a scorer may keep what it returned
            for one, known in zip(scores, right, strict=False):
                one[cells] = known[mine]
            scores = _with_mean(scores)
            captions = captions_of[columns]
            for first in range(0, len(captions), plan.caption_block):
                chosen = captions[first : first + plan.caption_block]
                for number, one in enumerate(scores):
                    part = one if len(captions) == width else one[:, column[chosen] - columns.start]
                    systems[number].add(part, rows.start, chosen)
                    if within:
                        _add_within_folds(within[number], parts, part, rows.start, chosen)
            bar.update(len(members) * width * (rows.stop - rows.start))
    pools = [tuple(inner.pool(part) for part in parts) for inner in within] or [()] * len(systems)
    return tuple(Ranking(system.pool(), pool) for system, pool in zip(systems, pools, strict=True))


class _ByKey:
    """Indices grouped by key: `[start:stop]` are those whose key is in this range, ascending for each key."""

    def __init__(self, keys: NDArray[np.int64], count: int) -> None:
        self._indices = np.argsort(keys, kind="stable")
        self._edges = np.concatenate([[0], np.cumsum(np.bincount(keys, minlength=count))])

    def __getitem__(self, keys: slice) -> NDArray[np.int64]:
        return self._indices[self._edges[keys.start] : self._edges[keys.stop]]


def _right_scores(
    members: list[BlockScorer], owner: NDArray[np.int64], column: NDArray[np.int64], own: _ByKey
) -> list[NDArray[np.float32]]:
    """By each scorer, the score of each caption with its image, [T]."""
    plan = members[0].plan
    right = [np.empty(len(owner), np.float32) for _ in members]
    group = min(_GROUP, plan.image_block)
    for start in range(0, plan.images, group):
        images = slice(start, min(start + group, plan.images))
        mine = own[images]
        columns = np.unique(column[mine])
        for first in range(0, len(columns), plan.caption_block):
            part = columns[first : first + plan.caption_block]
            chosen = mine[(column[mine] >= part[0]) & (column[mine] <= part[-1])]
            place = np.searchsorted(part, column[chosen])
            for member, known in zip(members, right, strict=True):
                known[chosen] = member.score(images, part).on_host()[owner[chosen] - start, place]
    return right


def _with_mean(scores: list[NDArray[np.float32]]) -> list[NDArray[np.float32]]:
    """Scores of several scorers and their mean; of one alone, only these."""
    if len(scores) == 1:
        return scores
    mean = scores[0].copy()
    for one in scores[1:]:
        mean += one
    mean /= len(scores)
    return [*scores, mean]


def _add_within_folds(
    counters: Counters, parts: list[slice], block: NDArray[np.float32], start: int, captions: NDArray[np.int64]
) -> None:
    """Count the pairs of a block whose image and whose caption's image are in the same fold."""
    size = parts[0].stop
    fold = counters.owner[captions] // size
    for number in range(start // size, (start + len(block) - 1) // size + 1):
        first, stop = max(parts[number].start, start), min(parts[number].stop, start + len(block))
        mine = np.flatnonzero(fold == number)
        if len(mine):
            counters.add(block[first - start : stop - start, mine], first, captions[mine])


def _require_same_split(scorers: int, splits: list[Encoded]) -> None:
    if not splits or len(splits) != scorers:
        raise ValueError(f"rank_all: one encoded split per scorer is needed, got {len(splits)} for {scorers} scorers")
    first = splits[0]
    for number, other in enumerate(splits[1:], 2):
        for what, a, b in (
            ("number of images", len(first.image), len(other.image)),
            ("words per caption", first.cu_seqlens, other.cu_seqlens),
            ("caption_to_image", first.caption_to_image, other.caption_to_image),
            ("first_of_equals", first.first_of_equals, other.first_of_equals),
        ):
            if not np.array_equal(a, b):  # type: ignore[arg-type]
                raise ValueError(f"rank_all: encoded splits 1 and {number} differ in {what}; encode the same split")
