"""A tiny set that can be learnt, and runs on it."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import torch

from itm_fast.data import Split, Vocabulary
from itm_fast.models import checkpoint
from itm_fast.training import loop, options, resume, train

COLOURS = ("red", "blue", "green", "black", "white", "brown")
THINGS = ("dog", "cat", "car", "tree", "boat", "house")
F = 12
SMALL = {"img_dim": F, "embed_size": 16, "word_dim": 8, "batch_size": 8, "num_epochs": 2, "learning_rate": 2e-3}
MODELS = ("sgr", "saf", "scan")


def tiny_split(first: int, count: int, captions_per_image: int = 3) -> Split:
    """Images of which some regions show a colour and some a thing, and captions that name both."""
    rng = np.random.default_rng(first)
    features = 0.1 * rng.standard_normal((count, 36, F)).astype(np.float32)
    captions, owner = [], []
    for row in range(count):
        colour, thing = rng.integers(6), rng.integers(6)
        features[row, rng.permutation(36)[:9], colour] += 1
        features[row, rng.permutation(36)[:9], 6 + thing] += 1
        for start in ("a", "one", "there is a")[:captions_per_image]:
            captions.append(f"{start} {COLOURS[colour]} {THINGS[thing]}")
            owner.append(row)
    return Split(features, captions, np.array(owner))


TRAIN, DEV = tiny_split(0, 14), tiny_split(100, 8)  # 42 captions: 6 batches of 8, the last of 2
WORDS = Vocabulary.build([f"a one there is {c} {t}" for c in COLOURS for t in THINGS], min_count=1)


def tiny_options(model: str, **changes):
    if model != "scan":
        changes = {"sim_dim": 8, **changes}
    return options(model, **{**SMALL, **changes})


def run_tiny(output, model="scan", *, opt=None, train_split=TRAIN, words=WORDS, **arguments):
    return train(opt or tiny_options(model), train_split, DEV, words, output, progress=False, device="cpu", **arguments)


def log_rows(folder) -> list[dict[str, str]]:
    """`log.csv` without the column that measures time."""
    with open(folder / "log.csv", newline="") as file:
        return [{k: v for k, v in row.items() if k != "samples_per_second"} for row in csv.DictReader(file)]


def tensors_of(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for name in value:
            yield from tensors_of(value[name])
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_of(item)


def assert_same_run(one: Path, other: Path) -> None:
    a, b = resume.load(one), resume.load(other)
    mine, theirs = ([*tensors_of([p.model, p.optimizer, p.rng["cpu"]])] for p in (a, b))
    assert len(mine) == len(theirs) > 20
    assert all(torch.equal(x, y) for x, y in zip(mine, theirs, strict=True))
    assert (a.epoch, a.step, a.iterations, a.best_rsum) == (b.epoch, b.step, b.iterations, b.best_rsum)
    for name in (loop.BEST, loop.LAST):
        c, d = checkpoint.load(one / name), checkpoint.load(other / name)
        assert all(torch.equal(x, y) for x, y in zip(tensors_of(c.model), tensors_of(d.model), strict=True))
