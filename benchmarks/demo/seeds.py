"""Train SHAN's three models and the plain dual encoder on what `make_data.py` made, from several seeds each.

    export PYTHONPATH=.
    python benchmarks/demo/seeds.py --data DATA --output RUNS                      # all models, seeds 0, 1 and 2
    python benchmarks/demo/seeds.py --data DATA --output RUNS --model shan-t2i --seeds 0

Held-out recall of every run on the test split, its mean and spread over the seeds, beside the level of chance and
beside the same recipe on training captions of other pictures (seed 0). The best epoch is chosen by the dev split; the
test split is read once a run, after training. A run that RUNS already holds is not repeated. Two threads, minutes a
run. All runs done, the table and benchmarks/results/seeds_recall.json are written.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from train import COMMON, VOCABULARY, _shuffled

from benchmarks.harness import RESULTS
from benchmarks.machine import environment
from itm_fast.cli import main as itm_fast
from itm_fast.data import Vocabulary, open_split
from itm_fast.evaluation import evaluate
from itm_fast.models import build
from itm_fast.training import checkpoint

SHAN = ["--model", "shan", "--lr", "2e-3", "--epochs", "12", "--lr-update", "8"]
RECIPES = {
    "dual": ["--model", "dual", "--lr", "2e-3", "--epochs", "12", "--lr-update", "8"],
    "shan-t2i": [*SHAN, "--direction", "t2i"],
    "shan-i2t": [*SHAN, "--direction", "i2t"],
    "shan": [*SHAN, "--direction", "full"],
}
SEEDS = (0, 1, 2)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="what make_data.py wrote")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for the runs")
    parser.add_argument("--model", choices=RECIPES, action="append", help="only this one (repeatable)")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, metavar="N", help="default: 0 1 2")
    parser.add_argument("--epochs", type=int, metavar="N", help="for a trial: nothing is written to the results")
    args = parser.parse_args(argv)

    torch.set_num_threads(2)
    names = args.model or list(RECIPES)
    shuffled = _shuffled(args.data, args.output / "shuffled")
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        runs = {f"seed {n}": (args.data, n) for n in args.seeds} | {"captions shuffled": (shuffled, 0)}
        found[name] = {}
        for label, (data, seed) in runs.items():
            output = args.output / f"{name} {label}".replace(" ", "_")
            run = _run(RECIPES[name], data, output, seed, args.epochs)
            found[name][label] = {**run, "held_out": _held_out(args.data, output / "model_best.pth.tar")}
            print(f"{name}, {label}: {_line(found[name][label]['held_out'])}", flush=True)
    for name, runs in found.items():
        sums = [run["held_out"]["rsum"] for label, run in runs.items() if label.startswith("seed")]
        spread = f" (from {min(sums):.1f} to {max(sums):.1f})"
        control, chance = (runs["captions shuffled"]["held_out"][key] for key in ("rsum", "chance_rsum"))
        print(f"{name}: rsum {statistics.mean(sums):.1f}{spread}; captions shuffled {control:.1f}; chance {chance:.1f}")
    if names == list(RECIPES) and tuple(args.seeds) == SEEDS and args.epochs is None:
        content = {"environment": environment(), "recipes": RECIPES, "common": COMMON, "models": found}
        (RESULTS / "seeds_recall.json").write_text(json.dumps(content, indent=1) + "\n")
    return 0


def _run(recipe: list[str], data: Path, output: Path, seed: int, epochs: int | None) -> dict[str, Any]:
    """Train by the program itself; how long it took, and its best epoch."""
    summary = output / "summary.json"
    if summary.exists():
        return json.loads(summary.read_text())
    options = [*recipe, *COMMON, "--seed", str(seed)]  # the last of two seeds counts
    if epochs is not None:
        options += ["--epochs", str(epochs)]
    start = time.perf_counter()
    places = ["--data", str(data), "--vocab", str(data / VOCABULARY), "--output", str(output)]
    if itm_fast(["train", *options, *places]):
        raise SystemExit(f"training into {output} failed")
    seconds = time.perf_counter() - start
    with open(output / "log.csv", newline="") as file:
        sums = [float(row["rsum"]) for row in csv.DictReader(file) if row["rsum"]]
    found = {"seconds": round(seconds), "best_epoch": sums.index(max(sums)) + 1, "best_dev_rsum": max(sums)}
    summary.write_text(json.dumps(found))
    return found


def _held_out(data: Path, file: Path) -> dict[str, float]:
    """The test split's recalls, and the level of chance of their sum."""
    saved = checkpoint.load(file)
    model = build(argparse.Namespace(**{**vars(saved.opt), "device": "cpu"}))
    model.load_state_dict(saved.model)
    report = evaluate([model], open_split(data, "test"), Vocabulary.load(data / VOCABULARY), progress=False)
    pool = report.to_dict()["systems"][0]["pools"][0]
    found = {f"{side} {key}": pool[side][key] for side in ("i2t", "t2i") for key in ("r1", "r5", "r10")}
    chance = sum(sum(pool[side]["chance"].values()) for side in ("i2t", "t2i"))
    return {**found, "rsum": pool["rsum"], "chance_rsum": chance}


def _line(held_out: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.1f}" for name, value in held_out.items())


if __name__ == "__main__":
    sys.exit(main())
