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
TURN = 250  # images that one implementation scores before the other one continues
TIE = 1e-5  # ten times the float32 rounding error of either implementation; scores lie in -1..1


@dataclass(frozen=True)
class Compared:
    """One model, or the mean of two, scored by both implementations.

    Attributes:
        name: row title.
        loop, fast: recall by the papers' loop and by itm-fast.
        moved: number of queries, in both directions, whose right answer has another rank in the other table.
        difference: largest absolute difference of two scores.
        scores: the score matrices, and the scoring times; encoding is shared and not timed.
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
        """The results that `report` does not have, ready for `json.dump`."""
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
    """Score a split with every model, by the papers' loop and by itm-fast; SGRAF, the mean of SGR and SAF, is added.

    In both tables a wrong answer whose score is within `TIE` of the right one's is ranked above it, so that rounding
    cannot make the tables differ.

    Args:
        models: models by name, as `itm_fast.models.build` returns them.
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
    """The recall tables of both implementations, two rows per model."""
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
    """Score matrices [I, T] of both implementations, their times, and the backend that ran each itm-fast op."""

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
        # Lowering has broken the ties, so the metrics under other rules for ties are left out.
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
    """Score with both implementations, alternating every `TURN` images so that a machine that slows down slows both."""
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
    """Lower the scores of the right answers by `TIE`, so that wrong answers within `TIE` are ranked above them.

    Captions that differ only in unknown words have equal scores but for rounding, which would decide their ranks.
    """
    lowered = score.copy()
    lowered[owner, np.arange(len(owner))] -= TIE
    return lowered


@torch.no_grad()
def _loop(scorer: Any, encoded: Encoded, done: Callable[[int], object]) -> NDArray[np.float32]:
    """All scores by the papers' loop, in shards of the size that their evaluators use."""
    image = encoded.image.to(encoded.device)
    caption = unpack(encoded.words.to(encoded.device), encoded.cu_seqlens.to(encoded.device))
    lengths = encoded.lengths.tolist()
    of_scan = "direction", "affinity_norm", "scale", "pool", "pool_scale"
    options = {name: scorer.options[name] for name in of_scan} if hasattr(scorer, "options") else None
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
