"""Count the blocks of one evaluation by several processes, which take the blocks from a shared queue.

A block is counted by whichever process is free, and tallies of blocks add up to the same bits in any order. So the
result is that of one process, for any number of processes, also if some are slower than others.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._ranks import Ranks
from .counters import BandExceeded
from .matrix_free import WIDER, Blocks
from .snapshots import PROCESS, Snapshots
from .tally import Tally, named_blocks

_evaluations = itertools.count()  # all processes count alike, so each evaluation has a queue of its own


def count_together(
    blocks: Blocks,
    tally: Tally | None,
    ranks: Ranks,
    numbers: Sequence[int] | None = None,
    *,
    snapshots: Snapshots | None = None,
    progress: bool = True,
) -> Tally | None:
    """Add all blocks that a tally lacks, each by one of the processes; all must call this.

    Args:
        blocks: the blocks of the same evaluation in every process.
        tally: in the process of rank 0, what is added to; None in the others.
        ranks: the processes.
        numbers: which blocks; None: all.
        snapshots: where this process keeps what it has counted; see `process_folder`.
        progress: show one bar, of all processes together, on standard error of the process of rank 0.

    Returns:
        In the process of rank 0 the tally of all blocks, which is another one if it had to begin again with a wider
        band; None in the others.

    Raises:
        RuntimeError: another process has ended.
    """
    numbers = range(blocks.plan.blocks) if numbers is None else numbers
    keeping = contextlib.nullcontext() if snapshots is None else snapshots.kept()
    if ranks.world == 1:
        assert tally is not None
        with keeping:
            return blocks.all(tally, numbers, progress=progress, after=snapshots.after if snapshots else _nothing)
    mine, done = _shared_out(tally, ranks)
    lacking = [number for number in numbers if not done[number]]
    if snapshots is not None:
        snapshots.after(mine)
    with keeping:
        while True:
            exceeded = _count(blocks, mine, lacking, numbers, ranks, progress, snapshots)
            if not exceeded:
                break
            mine, lacking = mine.widened(WIDER * exceeded), list(numbers)
            if snapshots is not None:  # what was counted without the band is of no use any more
                snapshots.after(mine)
                snapshots.save()
    # From here on `mine` has blocks of other processes too, which have kept them in snapshots of their own.
    ranks.add_up(lambda: _bytes(mine), lambda other: mine.merge(Tally.load(io.BytesIO(other))))
    if not ranks.first:
        return None
    if not mine.done[list(numbers)].all():
        raise RuntimeError(f"counted by no process: {named_blocks(~mine.done)} of {len(mine.done)}")
    if snapshots is not None:
        snapshots.collect()
    return mine


def process_folder(state: str | os.PathLike[str], ranks: Ranks) -> Path:
    """Where a process keeps its snapshots; that of rank 0, which adds up all, in `state` itself.

    >>> process_folder("run", Ranks(0, 4)).name, process_folder("run", Ranks(3, 4)).name
    ('run', 'process-3')
    """
    return Path(state) if ranks.first else Path(state) / f"{PROCESS}{ranks.rank}"


def _nothing(_: Tally) -> None:
    pass


def _shared_out(tally: Tally | None, ranks: Ranks) -> tuple[Tally, NDArray[np.bool_]]:
    """What this process adds to, and bool [blocks], which blocks are counted already."""

    def first() -> tuple[bytes, NDArray[np.bool_]]:
        assert tally is not None
        sizes = tally.images, len(tally.done)
        args = tally.right, tally.owner, *sizes, tally.asked, tally.identity, tally.band, tally.about
        return _bytes(Tally(*args)), tally.done.copy()

    empty, done = ranks.on_first(first)
    return Tally.load(io.BytesIO(empty)) if tally is None else tally, done


def _count(
    blocks: Blocks,
    mine: Tally,
    lacking: Sequence[int],
    numbers: Sequence[int],
    ranks: Ranks,
    progress: bool,
    snapshots: Snapshots | None,
) -> float:
    """Count blocks until the queue is empty in all processes; return how far a band was exceeded, 0 if it was not."""
    from tqdm import tqdm

    queue = _Queue(ranks, blocks, lacking)
    total, exceeded = queue.pairs(numbers), 0.0
    begun = total - queue.pairs(lacking)
    show = progress and ranks.first
    with tqdm(total=total, initial=begun, desc="scores", unit="pair", unit_scale=True, disable=not show) as bar:

        def refresh() -> None:
            if show:
                bar.update(begun + queue.counted() - bar.n)

        try:
            for number in blocks.add(mine, queue):
                queue.finished(number)
                refresh()
                if snapshots is not None:
                    snapshots.after(mine)
        except BandExceeded as error:
            exceeded = error.difference
            queue.stop()
        if snapshots is not None and mine.whole:
            snapshots.save()  # another process may end while this one waits
        exceeded = ranks.most(exceeded, meanwhile=refresh)
        refresh()
    return exceeded


class _Queue:
    """Numbers of blocks, each of which one process gets, those with the longest captions first.

    The last blocks are then short ones, and all processes end at about the same time.
    """

    def __init__(self, ranks: Ranks, blocks: Blocks, numbers: Sequence[int]) -> None:
        self._plan, self._each = blocks.plan, len(blocks.members)
        self._store = ranks.store(f"itm_fast/evaluation {next(_evaluations)}")
        # Columns are sorted by length, and numbers go row by row.
        self._numbers = sorted(numbers, key=lambda number: (self._plan.block(number)[1].start, number))

    def __iter__(self) -> Iterator[int]:
        while (ticket := self._store.add("tickets", 1)) <= len(self._numbers):
            yield self._numbers[ticket - 1]

    def stop(self) -> None:
        """Let no process take another number."""
        self._store.add("tickets", len(self._numbers))

    def pairs(self, numbers: Sequence[int] | range) -> int:
        """Pairs that are scored for these blocks, by all scorers."""
        return sum(self._plan.pairs_of(number) for number in numbers) * self._each

    def finished(self, number: int) -> None:
        self._store.add("pairs", self.pairs([number]))

    def counted(self) -> int:
        """Pairs of the blocks that all processes have finished."""
        return self._store.add("pairs", 0)


def _bytes(tally: Tally) -> bytes:
    file: Any = io.BytesIO()
    tally.save(file)
    return file.getvalue()
