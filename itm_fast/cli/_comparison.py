"""The papers' scoring loop and `itm_fast.evaluation` on one split: recall, largest difference, time."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from ..evaluation import Pool, Report, System, encode, metrics, ranks, score_all
from ..packing import unpack
from ..testing import scan, sgraf

if TYPE_CHECKING:
    from ..data import Split, Vocabulary
    from ..evaluation import Encoded

SHARD = 100  # images, and captions, of one step of the published evaluators
TOLERANCE = 1e-5  # largest score difference that float32 rounding explains; scores lie in -1..1
Result = TypeVar("Result")


@dataclass(frozen=True)
class Compared:
    """One model, or the mean of two, both ways.

    Attributes:
        name: row title.
        loop, fast: recall by the papers' loop and by itm-fast.
        moved: queries, of both directions, whose right answer has another rank.
        difference: largest absolute difference of two scores.
        loop_seconds, fast_seconds: time that scoring took; encoding is common to both and not counted.
        score: [I, T] by itm-fast.
    """

    name: str
    loop: Pool
    fast: Pool
    moved: int
    difference: float
    loop_seconds: float
    fast_seconds: float
    score: NDArray[np.float32] = field(repr=False, compare=False)

    @property
    def equal(self) -> bool:
        """Whether the two recall tables are the same, number by number."""
        return self.loop == self.fast

    def __str__(self) -> str:
        verdict = "tables equal" if self.equal else f"tables DIFFER ({self.moved} queries have another rank)"
        return (
            f"{verdict}, largest score difference {self.difference:.1e}; loop {self.loop_seconds:.1f} s, "
            f"itm-fast {self.fast_seconds:.2f} s: {self.loop_seconds / self.fast_seconds:.1f} times as fast"
        )

    def to_dict(self) -> dict[str, Any]:
        """What is not in the report already, as plain values."""
        return {
            "name": self.name,
            "tables_equal": self.equal,
            "queries_with_another_rank": self.moved,
            "largest_score_difference": self.difference,
            "loop_seconds": self.loop_seconds,
            "itm_fast_seconds": self.fast_seconds,
            "ratio": self.loop_seconds / self.fast_seconds,
        }


def compare(models: Mapping[str, Any], split: Split, vocabulary: Vocabulary, progress: bool = True) -> list[Compared]:
    """Score a split with every model by both ways; SGR and SAF, when both are there, also as SGRAF, their mean.

    itm-fast runs once before and once after the loop, so that a machine that speeds up or slows down meanwhile
    favours neither; its time is the mean of the two.

    Args:
        models: by name, as `itm_fast.models.build` gives them.
        split: what to evaluate.
        vocabulary: what the models were trained with.
        progress: show bars on standard error.
    """
    found: dict[str, Compared] = {}
    kept: dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]] = {}
    for name, model in models.items():
        encoded = encode(model, split, vocabulary, progress=False)

        fast = partial(score_all, model.scorer, encoded, progress=False)
        score, before = _timed(fast)
        slow, taken = _timed(partial(_loop, name, model, encoded, progress))
        again, after = _timed(fast)
        if not np.array_equal(score, again):
            raise ValueError(f"{name}: two runs of the same scoring gave different scores; see `itm-fast doctor`")
        found[name] = _compared(name, slow, score, taken, (before + after) / 2, split)
        kept[name] = slow, score
        if {"SGR", "SAF"} <= kept.keys() and "SGRAF" not in found:
            mean = [(first + second) / 2 for first, second in zip(kept["SGR"], kept["SAF"], strict=True)]
            parts = found["SGR"], found["SAF"]
            found["SGRAF"] = _compared(
                "SGRAF", mean[0], mean[1], sum(part.loop_seconds for part in parts),
                sum(part.fast_seconds for part in parts), split,
            )  # fmt: skip
    return list(found.values())


def report(compared: list[Compared]) -> Report:
    """Both recall tables, row under row."""
    systems = []
    for row in compared:
        systems.append(System(f"{row.name}, papers' loop", (row.loop,), seconds={"score": row.loop_seconds}))
        systems.append(System(f"{row.name}, itm-fast", (row.fast,), seconds={"score": row.fast_seconds}))
    return Report(tuple(systems), {}, None, np.empty((0, 0), np.float32))


def _compared(
    name: str, slow: NDArray, score: NDArray, loop_seconds: float, fast_seconds: float, split: Split
) -> Compared:
    owner = split.caption_to_image
    orders = [ranks(scores, owner) for scores in (slow, score)]
    moved = sum(int((first != second).sum()) for first, second in zip(orders[0][:2], orders[1][:2], strict=True))
    loop, fast = (Pool(metrics(scores, owner)) for scores in (slow, score))
    return Compared(name, loop, fast, moved, float(np.abs(slow - score).max()), loop_seconds, fast_seconds, score)


@torch.no_grad()
def _loop(name: str, model: Any, encoded: Encoded, progress: bool) -> NDArray[np.float32]:
    """All scores by the papers' loop, in shards as their evaluators have them."""
    from tqdm import tqdm

    image = encoded.image.to(encoded.device)
    caption = unpack(encoded.words.to(encoded.device), encoded.cu_seqlens.to(encoded.device))
    lengths = encoded.lengths.tolist()
    options = getattr(model.scorer, "options", None)
    state = model.scorer.state_dict()
    score = np.empty((len(image), len(caption)), np.float32)
    with tqdm(
        total=score.size, desc=f"{name}, papers' loop", unit="pair", unit_scale=True, disable=not progress, leave=False
    ) as bar:
        for i in range(0, len(image), SHARD):
            for t in range(0, len(caption), SHARD):
                images, captions = image[i : i + SHARD], caption[t : t + SHARD]
                if options is None:
                    found = sgraf.loop(state, images, captions, lengths[t : t + SHARD])
                else:
                    found = scan.loop(images, captions, lengths[t : t + SHARD], **options)
                score[i : i + SHARD, t : t + SHARD] = found.cpu().numpy()
                bar.update(found.numel())
    return score


def _timed(run: Callable[[], Result]) -> tuple[Result, float]:
    start = time.perf_counter()
    result = run()
    return result, time.perf_counter() - start
