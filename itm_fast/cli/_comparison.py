"""The papers' scoring loop and `itm_fast.evaluation` on one split: recall, largest difference, time."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from .._backends import recorded
from ..evaluation import Pool, Report, System, encode, metrics, ranks, score_all
from ..packing import unpack
from ..testing import scan, sgraf

if TYPE_CHECKING:
    from ..data import Split, Vocabulary
    from ..evaluation import Encoded

SHARD = 100  # images, and captions, of one step of the published evaluators
TURN = 250  # images scored by one way before the other has its turn
TIE = 1e-5  # float32 rounding of either way is a tenth of this; scores lie in -1..1


@dataclass(frozen=True)
class Compared:
    """One model, or the mean of two, both ways.

    Attributes:
        name: row title.
        loop, fast: recall by the papers' loop and by itm-fast.
        moved: queries, of both directions, whose right answer has another rank.
        difference: largest absolute difference of two scores.
        scores: the matrices, and the time that scoring took; encoding is common to both and not counted.
    """

    name: str
    loop: Pool
    fast: Pool
    moved: int
    difference: float
    scores: _Scores = field(repr=False, compare=False)

    @property
    def equal(self) -> bool:
        """Whether the two recall tables are the same, number by number."""
        return self.loop == self.fast

    def __str__(self) -> str:
        verdict = "tables equal" if self.equal else f"tables DIFFER ({self.moved} queries have another rank)"
        slow, fast = self.scores.loop_seconds, self.scores.fast_seconds
        return (
            f"{verdict}, largest score difference {self.difference:.1e}; loop {slow:.1f} s, itm-fast {fast:.2f} s: "
            f"{slow / fast:.1f} times as fast"
        )

    def to_dict(self) -> dict[str, Any]:
        """What is not in the report already, as plain values."""
        return {
            "name": self.name,
            "tables_equal": self.equal,
            "queries_with_another_rank": self.moved,
            "largest_score_difference": self.difference,
            "loop_seconds": self.scores.loop_seconds,
            "itm_fast_seconds": self.scores.fast_seconds,
            "ratio": self.scores.loop_seconds / self.scores.fast_seconds,
        }


def compare(models: Mapping[str, Any], split: Split, vocabulary: Vocabulary, progress: bool = True) -> list[Compared]:
    """Score a split with every model by both ways; SGR and SAF, when both are there, also as SGRAF, their mean.

    A wrong answer whose score is within `TIE` of the right one's counts as better in both tables, so that they can
    be compared number by number.

    Args:
        models: by name, as `itm_fast.models.build` gives them.
        split: what to evaluate.
        vocabulary: what the models were trained with.
        progress: show bars on standard error.
    """
    found: dict[str, Compared] = {}
    for name, model in models.items():
        encoded = encode(model, split, vocabulary, progress=False)
        found[name] = _both(name, model, encoded, progress).compared(split)
        if {"SGR", "SAF"} <= found.keys() and "SGRAF" not in found:
            found["SGRAF"] = _mean("SGRAF", found["SGR"], found["SAF"]).compared(split)
    return list(found.values())


def report(compared: list[Compared]) -> Report:
    """Both recall tables, row under row."""
    systems = []
    for row in compared:
        systems.append(System(f"{row.name}, papers' loop", (row.loop,), seconds={"score": row.scores.loop_seconds}))
        seconds = {"score": row.scores.fast_seconds}
        systems.append(
            System(f"{row.name}, itm-fast", (row.fast,), seconds=seconds, backends=row.scores.backends)
        )
    return Report(tuple(systems), {}, None, np.empty((0, 0), np.float32))


@dataclass(frozen=True)
class _Scores:
    """Score matrices [I, T] of both ways, the time they took, and the backend that each op of ours ran on."""

    name: str
    loop: NDArray[np.float32]
    fast: NDArray[np.float32]
    loop_seconds: float
    fast_seconds: float
    backends: dict[str, str]

    def compared(self, split: Split) -> Compared:
        owner = split.caption_to_image
        scores = [_lowered(score, owner) for score in (self.loop, self.fast)]
        first, second = (ranks(score, owner) for score in scores)
        # The lowered scores decide every tie, so there is nothing that other rules for ties could tell.
        loop, fast = (Pool(replace(metrics(score, owner), others=())) for score in scores)
        return Compared(
            self.name,
            loop,
            fast,
            moved=int((first.i2t != second.i2t).sum() + (first.t2i != second.t2i).sum()),
            difference=float(np.abs(self.loop - self.fast).max()),
            scores=self,
        )


def _both(name: str, model: Any, encoded: Encoded, progress: bool) -> _Scores:
    """Score by both ways, some images at a time and in turn, so that a machine that slows down favours neither."""
    from tqdm import tqdm

    parts: dict[bool, list[NDArray[np.float32]]] = {True: [], False: []}
    seconds = {True: 0.0, False: 0.0}
    total = len(encoded.image) * len(encoded.lengths)
    with (
        recorded() as ran,
        tqdm(total=2 * total, desc=name, unit="pair", unit_scale=True, disable=not progress, leave=False) as bar,
    ):
        for turn, start in enumerate(range(0, len(encoded.image), TURN)):
            part = replace(encoded, image=encoded.image[start : start + TURN])
            for fast in (turn % 2 == 0, turn % 2 == 1):
                bar.set_postfix_str("itm-fast" if fast else "papers' loop")
                began = time.perf_counter()
                score = score_all(model.scorer, part, progress=False) if fast else _loop(model.scorer, part, bar.update)
                seconds[fast] += time.perf_counter() - began
                parts[fast].append(score)
                if fast:
                    bar.update(score.size)
    slow, ours = (np.concatenate(parts[way]) for way in (False, True))
    return _Scores(name, slow, ours, seconds[False], seconds[True], ran)


def _mean(name: str, first: Compared, second: Compared) -> _Scores:
    a, b = first.scores, second.scores
    return _Scores(
        name,
        np.add(a.loop, b.loop) / np.float32(2),
        np.add(a.fast, b.fast) / np.float32(2),
        a.loop_seconds + b.loop_seconds,
        a.fast_seconds + b.fast_seconds,
        a.backends | b.backends,
    )


def _lowered(score: NDArray[np.float32], owner: NDArray[np.int64]) -> NDArray[np.float32]:
    """The scores with the right answers `TIE` lower: a wrong answer nearer than that then counts as better.

    Captions that differ in unknown words only have the same score in exact arithmetic, and rounding would decide.
    """
    lowered = score.copy()
    lowered[owner, np.arange(len(owner))] -= TIE
    return lowered


@torch.no_grad()
def _loop(scorer: Any, encoded: Encoded, done: Callable[[int], object]) -> NDArray[np.float32]:
    """All scores by the papers' loop, in shards as their evaluators have them."""
    image = encoded.image.to(encoded.device)
    caption = unpack(encoded.words.to(encoded.device), encoded.cu_seqlens.to(encoded.device))
    lengths = encoded.lengths.tolist()
    options = getattr(scorer, "options", None)  # SCAN's, which has no parameters
    state = scorer.state_dict()
    score = np.empty((len(image), len(caption)), np.float32)
    for i in range(0, len(image), SHARD):
        for t in range(0, len(caption), SHARD):
            images, captions = image[i : i + SHARD], caption[t : t + SHARD]
            if options is None:
                found = sgraf.loop(state, images, captions, lengths[t : t + SHARD])
            else:
                found = scan.loop(images, captions, lengths[t : t + SHARD], **options)
            score[i : i + SHARD, t : t + SHARD] = found.cpu().numpy()
            done(found.numel())
    return score
