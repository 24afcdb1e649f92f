"""Ranks and metrics without the score matrix: each block of scores is counted and forgotten.

The right pairs are scored first: a block of 16 images with their own captions at a time, 16 / I of all the work. Then
every block of `score_all` is scored once and compared with them; see `counters` for what is counted. A backend may give
a pair other last bits in another block; the scores within a band around those of right pairs are then kept until the
end, so that the ranks are those of the matrix that `score_all` makes of these blocks. If a right pair's score leaves
its band, counting begins again with a wider one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .._backends import requested, why_not
from .._workspace import GIB, workspace
from .block_scores import BlockScorer, score_blocks
from .counters import BandExceeded
from .counting import checked_owner
from .encoding import Encoded, evaluation_mode
from .rankings import Ranking, rankings_of
from .scoring import columns_of, plan_encoded, with_equal_captions
from .tally import Asked, Tally

_GROUP = 16  # images that are scored together with their own captions, in the first pass
WIDER = 16  # how much wider than the largest difference seen a band is made; it costs little


def rank_all(
    scorers: Any,
    encoded: Encoded | Sequence[Encoded],
    *,
    folds: int | None = None,
    best: int | None = None,
    memory_gb: float | None = None,
    progress: bool = True,
) -> tuple[Ranking, ...]:
    """Rank every image against every caption and back, without holding their score matrix.

    The ranks are those of the matrix that `score_all` returns within the same scratch, bit for bit: with another
    memory budget a backend such as `torch`, whose scores depend on the block, may give other last bits.

    Several scorers are ranked one by one and by the mean of their scores, in float32 as in `evaluate`; their encoded
    splits and states are then in memory together.

    Args:
        scorers: a pair scorer as for `score_all`, or a sequence of them.
        encoded: as `encode` returns it: one per scorer, all of the same split.
        folds: also rank within this many equal, consecutive parts of the images, as `fold_metrics` does.
        best: also keep this many best items of each query, for `write_trec`; equal scores are in the order of the data.
        memory_gb: as for `score_all`; no score matrix is counted.
        progress: show a bar with pairs/s and the time left on standard error.

    Returns:
        One `Ranking` per scorer and, with several, one of the mean of their scores, last.

    Raises:
        TypeError: `caption_to_image` does not hold integers.
        ValueError: as `score_all`; `caption_to_image` does not fit; the images do not divide into the folds, or a fold
            has no caption; `best` is less than 1; scorers and splits differ in number, or the splits in their images,
            captions or which captions are the same.

    >>> from itm_fast.nn import CrossAttentionScore
    >>> image, words = torch.randn(2, 3, 8), torch.randn(5, 8)
    >>> encoded = Encoded(image, None, words, torch.tensor([0, 2, 5], dtype=torch.int32), np.array([0, 1]))
    >>> (found,) = rank_all(CrossAttentionScore(), encoded, progress=False)
    >>> found.ranks().t2i.shape, found.metrics().t2i.queries
    ((2,), 2)
    """
    asked = Asked(folds, best)
    scorers = list(scorers) if isinstance(scorers, (list, tuple)) else [scorers]
    splits = [encoded] if isinstance(encoded, Encoded) else list(encoded)
    with blocks_of(scorers, splits, memory_gb) as blocks:
        return rankings_of(blocks.all(blocks.begin(asked), progress=progress))


@contextlib.contextmanager
def blocks_of(scorers: Sequence[Any], splits: Sequence[Encoded], memory_gb: float | None = None) -> Iterator[Blocks]:
    """The blocks of an evaluation, while the scorers are in evaluation mode; arguments and errors as for `rank_all`."""
    splits = [with_equal_captions(one) for one in splits]
    _require_same_split(len(scorers), splits)
    owner = checked_owner(splits[0].caption_to_image, (len(splits[0].image), len(splits[0].lengths)), "rank_all")
    order, column = columns_of(splits[0])
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
        yield Blocks(members, owner, column)


class Blocks:
    """The blocks of one evaluation: they are scored in any order, by anyone, and add up to a `Tally`.

    Args:
        members: the scorers, which share the plan of the first one's blocks.
        owner: int64 [T], the image that each caption describes.
        column: int64 [T], the column of each caption's scores.

    Attributes:
        plan: the memory plan of the first scorer; `plan.blocks` is the number of blocks.
    """

    def __init__(self, members: list[BlockScorer], owner: NDArray[np.int64], column: NDArray[np.int64]) -> None:
        self.members, self.plan = members, members[0].plan
        self._owner, self._column = owner, column
        self._captions_of = _ByKey(column, self.plan.distinct)

    def begin(
        self,
        asked: Asked | None = None,
        identity: Mapping[str, str] | None = None,
        about: Mapping[str, Any] | None = None,
    ) -> Tally:
        """Score the right pairs; return a tally of no block. Arguments as for `Tally`."""
        images, asked = self.plan.images, asked or Asked()
        Tally([], self._owner, images, 0, asked)  # refuses folds that do not fit before anything is scored
        right = _with_mean(_right_scores(self.members, self._owner, self._column, _ByKey(self._owner, images)))
        tally = Tally(right, self._owner, images, self.plan.blocks, asked, identity, about=about)
        return tally if _same_bits(self.plan.device) else tally.widened(0.0)

    def add(self, tally: Tally, numbers: Iterable[int]) -> Iterator[int]:
        """Score these blocks and add them to the tally; yield the number of each.

        Raises:
            BandExceeded: the scores of a right pair differ by more than the tally's band; begin again with `widened`.
        """
        stay = _on_device(self.plan.device) and tally.band > 0 and not tally.wanted  # best items are kept on the host
        for number, rows, columns, found in score_blocks(self.members, numbers, stay=stay):
            tally.add(number, rows.start, self._pieces(columns, _with_mean(found)))
            yield number

    def all(
        self,
        tally: Tally,
        numbers: Sequence[int] | None = None,
        *,
        progress: bool = True,
        after: Callable[[Tally], None] = lambda _: None,
    ) -> Tally:
        """Add all blocks, or those of `numbers`, that the tally lacks.

        Args:
            tally: is added to, unless it has to begin again with a wider band.
            numbers: which blocks; None: all.
            progress: show a bar with pairs/s and the time left on standard error.
            after: called after each block.

        Returns:
            The tally, or the new one.
        """
        from tqdm import tqdm

        numbers = range(self.plan.blocks) if numbers is None else numbers
        total = sum(self.plan.pairs_of(number) for number in numbers) * len(self.members)
        with tqdm(total=total, desc="scores", unit="pair", unit_scale=True, disable=not progress) as bar:
            while True:
                to_do = [number for number in numbers if not tally.done[number]]
                bar.reset(total)
                bar.update(total - sum(self.plan.pairs_of(number) for number in to_do) * len(self.members))
                try:
                    for number in self.add(tally, to_do):
                        bar.update(self.plan.pairs_of(number) * len(self.members))
                        after(tally)
                    return tally
                except BandExceeded as exceeded:
                    tally = tally.widened(WIDER * exceeded.difference)

    def _pieces(self, columns: slice, scores: list[Any]) -> Iterator[tuple[NDArray[np.int64], list[Any]]]:
        """The captions whose scores are in these columns, at most a block of them at a time, and their scores."""
        captions = self._captions_of[columns]
        if len(captions) == columns.stop - columns.start:
            yield captions, scores
            return
        for first in range(0, len(captions), self.plan.caption_block):
            chosen = captions[first : first + self.plan.caption_block]
            yield chosen, [one[:, self._column[chosen] - columns.start] for one in scores]


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


def _same_bits(device: torch.device) -> bool:
    """Whether a pair is expected to have the same bits in every block; if it has not, the blocks are begun again."""
    on_cpu = requested() in ("auto", "cpu") and why_not("cpu", device) is None
    return on_cpu and not torch.is_autocast_enabled("cpu")


def _on_device(device: torch.device) -> bool:
    """Whether blocks are counted on the device that scores them: a core of the host takes longer than a GPU scores."""
    return device.type != "cpu"


def _with_mean(scores: list[Any]) -> list[Any]:
    """Scores of several scorers, arrays or tensors, and their mean; of one alone, only these."""
    if len(scores) == 1:
        return scores
    mean, count = scores[0] + scores[1], len(scores)
    for one in scores[2:]:
        mean += one
    # CUDA multiplies by the reciprocal of a number that is not on the device.
    mean /= torch.tensor(float(count), device=mean.device) if isinstance(mean, torch.Tensor) else count
    return [*scores, mean]


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
