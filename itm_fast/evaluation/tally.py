"""What the scored blocks of an evaluation add up to: counts, and the best items of each query.

A `Tally` is of a set of blocks. Tallies of disjoint sets add up to that of their union, whoever scored the blocks and
in which order, with the same bits: counts are sums of integers, and the best items are the largest of unique integers.
So processes share an evaluation by sharing out the numbers of its blocks, and a run that was interrupted goes on with
the blocks that its last tally lacks.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from .._files import atomic_write, open_regular
from .best import Best, TieOrder, Wanted
from .counters import Counters
from .ranking import fold_images
from .relevance import wanted_for_relevance

_VERSION = 1  # of the file format


@dataclass(frozen=True, eq=False)
class Asked:
    """What is asked of a ranking.

    Attributes:
        folds: also rank within this many parts of the images, or None.
        best: keep this many best items of every query, or None.
        image_ids, caption_ids: ids of the data such as COCO's; None without them.
        relevance: whether CxC and ECCV metrics are asked for.
    """

    folds: int | None = None
    best: int | None = None
    image_ids: NDArray[np.int64] | None = None
    caption_ids: NDArray[np.int64] | None = None
    relevance: bool = False

    def wanted(self) -> dict[str, Wanted]:
        """The lists of best items that answer this, by name."""
        found = {} if self.best is None else {side: Wanted(side, self.best, TieOrder()) for side in ("i2t", "t2i")}
        if self.relevance:
            assert self.image_ids is not None
            assert self.caption_ids is not None
            found |= wanted_for_relevance(self.image_ids, self.caption_ids)
        return found


class Tally:
    """What a set of blocks adds up to, for each system: each scorer and, with several, the mean of their scores.

    Args:
        right: of each system, float32 [T], the score of each caption with its image; see `Counters`.
        owner: int64 [T], the image that each caption describes.
        images: I.
        blocks: how many blocks the evaluation has.
        asked: what is to be found.
        identity: what the scores are computed from; tallies add up only if it is the same.
        band: see `Counters`.
        about: what else a report of this tally needs, as plain values.

    Attributes:
        done: bool [blocks], which blocks are in.
        whole: whether no block is half in; an interruption in the middle of `add` leaves False.

    Raises:
        ValueError: as `fold_metrics`, for folds that do not fit.
    """

    def __init__(
        self,
        right: Iterable[NDArray[np.float32]],
        owner: NDArray[np.int64],
        images: int,
        blocks: int,
        asked: Asked | None = None,
        identity: Mapping[str, str] | None = None,
        band: float = 0.0,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        self.right, self.owner, self.images = list(right), owner, images
        self.asked, self.identity, self.about = asked or Asked(), dict(identity or {}), dict(about or {})
        self.done, self.whole = np.zeros(blocks, bool), True
        folds = self.asked.folds
        self.parts = [] if folds is None else fold_images(owner, images, folds, "rank_all")
        self.wanted = self.asked.wanted()
        self._row = {name: _rows(one, images, len(owner)) for name, one in self.wanted.items()}
        self.counters = [Counters(known, owner, images, band) for known in self.right]
        self.within = [Counters(known, owner, images, band) for known in self.right if self.parts]
        self.best = [{name: self._empty(one) for name, one in self.wanted.items()} for _ in self.right]

    def add(
        self,
        number: int,
        first_image: int,
        pieces: Iterable[tuple[NDArray[np.int64], list[NDArray[np.float32]]]],
    ) -> None:
        """Add a block.

        Args:
            number: of the block, which must not be in yet.
            first_image: its images are this one and those that follow.
            pieces: captions [m] of the block and the scores [n, m] of each system; all captions of the block together.

        Raises:
            BandExceeded: as `Counters.add`; the tally is of no use any more.
        """
        if self.done[number]:
            raise ValueError(f"block {number} has been counted already")
        self.whole = False
        for captions, scores in pieces:
            for system, score in enumerate(scores):
                self.counters[system].add(score, first_image, captions)
                if self.within:
                    _add_within_folds(self.within[system], self.parts, score, first_image, captions)
                images = np.arange(first_image, first_image + len(score))
                for name, best in self.best[system].items():
                    i2t = self.wanted[name].side == "i2t"
                    block, queries, items = (score, images, captions) if i2t else (score.T, captions, images)
                    rows = self._row[name]
                    if rows is not None:
                        chosen = np.flatnonzero(rows[queries] >= 0)
                        block, queries = block[chosen], rows[queries[chosen]]
                    best.add(block, queries, items)
        self.done[number] = self.whole = True

    def widened(self, band: float) -> Tally:
        """The same tally without any block, with this band, or one for rounding errors of float32 if that is wider."""
        largest = max(float(np.abs(known).max(initial=0)) for known in self.right)
        band = max(band, 64 * float(np.finfo(np.float32).eps) * largest)
        blocks = len(self.done)
        return Tally(self.right, self.owner, self.images, blocks, self.asked, self.identity, band, self.about)

    @property
    def band(self) -> float:
        """The narrowest band that blocks were counted with."""
        return self.counters[0].band

    def merge(self, other: Tally) -> None:
        """Add the blocks of another tally of the same evaluation.

        Raises:
            ValueError: the tallies share a block, or are of different evaluations; the message says which or how.
        """
        differing = [key for key in self.identity | other.identity if self.identity.get(key) != other.identity.get(key)]
        if differing:
            raise ValueError(f"they are of evaluations with other {', '.join(differing)}")
        if self.done.shape != other.done.shape or len(self.counters) != len(other.counters):
            raise ValueError("they are of evaluations with other blocks or scorers")
        if np.any(self.done & other.done):
            raise ValueError(f"both have {named_blocks(self.done & other.done)}")
        self.whole = False
        for mine, theirs in zip(self.counters + self.within, other.counters + other.within, strict=True):
            mine.merge(theirs)
        for lists, others in zip(self.best, other.best, strict=True):
            for name, best in lists.items():
                best.merge(others[name])
        self.done |= other.done
        self.whole = True

    def save(self, file: str | os.PathLike[str] | BinaryIO) -> None:
        """Write everything to a .npz file, completely or not at all, or to an open one.

        Raises:
            ValueError: a block is half in.
            OSError: the file cannot be written.
        """
        if not self.whole:
            raise ValueError("a block was interrupted while it was counted, so this tally cannot be kept")
        about = {
            "version": _VERSION, "images": self.images, "folds": self.asked.folds, "best": self.asked.best,
            "relevance": self.asked.relevance, "identity": self.identity, "about": self.about,
        }  # fmt: skip
        arrays: dict[str, NDArray] = {
            "about": np.frombuffer(json.dumps(about).encode(), np.uint8),
            "right": np.stack(self.right),
            "owner": self.owner,
            "done": self.done,
        }
        for name, ids in (("image ids", self.asked.image_ids), ("caption ids", self.asked.caption_ids)):
            if ids is not None:
                arrays[name] = ids
        for prefix, one in self._counters():
            arrays |= {f"{prefix} {name}": array for name, array in one.arrays().items()}
        for system, lists in enumerate(self.best):
            arrays |= {f"{system} best {name}": best.keys for name, best in lists.items()}
        if isinstance(file, (str, os.PathLike)):
            with atomic_write(file, "wb") as opened:
                np.savez(opened, **arrays)  # type: ignore[arg-type]
        else:
            np.savez(file, **arrays)  # type: ignore[arg-type]

    @classmethod
    def load(cls, file: str | os.PathLike[str] | BinaryIO) -> Tally:
        """Read what `save` has written; nothing is unpickled.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is damaged, or not such a file.
        """
        if isinstance(file, (str, os.PathLike)):
            with open_regular(file) as opened:
                return cls._load(opened, str(Path(file)))
        return cls._load(file, "the file")

    @classmethod
    def _load(cls, file: BinaryIO, name: str) -> Tally:
        try:
            with np.load(file, allow_pickle=False) as arrays:
                about = json.loads(arrays["about"].tobytes())
                if about["version"] != _VERSION:
                    raise ValueError(f"its format is number {about['version']}, and this itm-fast reads {_VERSION}")
                ids = [arrays.get(key) for key in ("image ids", "caption ids")]
                asked = Asked(about["folds"], about["best"], ids[0], ids[1], about["relevance"])
                done = arrays["done"]
                identity, more = about["identity"], about["about"]
                found = cls(arrays["right"], arrays["owner"], about["images"], len(done), asked, identity, np.inf, more)
                for prefix, one in found._counters():
                    one.load({k.removeprefix(f"{prefix} "): arrays[k] for k in arrays if k.startswith(f"{prefix} ")})
                for system, lists in enumerate(found.best):
                    for key, best in lists.items():
                        best.load(arrays[f"{system} best {key}"])
                found.done |= done
        except (KeyError, ValueError, TypeError, AttributeError, IndexError, EOFError, zipfile.BadZipFile) as error:
            why = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"{name} is not a snapshot of an evaluation, or is damaged ({why})") from error
        return found

    def _counters(self) -> Iterable[tuple[str, Counters]]:
        """Every `Counters` with the prefix of its arrays' names."""
        for kind, ones in (("all", self.counters), ("folds", self.within)):
            for system, one in enumerate(ones):
                yield f"{system} {kind}", one

    def _empty(self, wanted: Wanted) -> Best:
        sizes = self.images, len(self.owner)
        queries, items = sizes if wanted.side == "i2t" else sizes[::-1]
        return Best(queries if wanted.queries is None else len(wanted.queries), items, wanted.k, wanted.order)


def named_blocks(chosen: NDArray[np.bool_]) -> str:
    """The numbers of the chosen blocks, for messages.

    >>> named_blocks(np.array([True, True, False, True])), named_blocks(np.array([False, True]))
    ('blocks 0-1, 3', 'block 1')
    """
    numbers = np.flatnonzero(chosen)
    runs = np.split(numbers, np.flatnonzero(np.diff(numbers) > 1) + 1)
    names = [f"{run[0]}" if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    more = f", ... ({len(numbers):,} in all)" if len(names) > 6 else ""
    return f"block{'s' if len(numbers) > 1 else ''} {', '.join(names[:6])}{more}"


def _rows(wanted: Wanted, images: int, captions: int) -> NDArray[np.int64] | None:
    """The row of each image or caption among the queries that are wanted, -1 for the others; None if all are."""
    if wanted.queries is None:
        return None
    rows = np.full(images if wanted.side == "i2t" else captions, -1)
    rows[wanted.queries] = np.arange(len(wanted.queries))
    return rows


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
