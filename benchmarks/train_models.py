"""Train every model on the openclipart training split and report held-out recall beside chance and controls.

    export PYTHONPATH=.
    python benchmarks/demo/make_data.py --output DATA             # once: the three splits
    python benchmarks/train_models.py --data DATA --output RUNS   # all models, three seeds; about 100 minutes
    python benchmarks/train_models.py --data DATA --output RUNS --models hgan dual --seeds 0

Every model is trained by the program itself, once per seed, with one recipe: D 128, words 128, S 64, batches of 64,
learning rate 1e-3, 30 epochs, a tenth of it after 22, the loss over all negatives. With some 1,500 captions the hardest
negative alone collapses the embedding. The best epoch is chosen by the dev split, and the test split is read once, by
that epoch's checkpoint. The control of a model is the same run, seed 0, on captions of other training pictures; the
baseline is the dual encoder, the cosine of the mean region and the mean word.

A run or an evaluation that RUNS already holds is not repeated, and one that was interrupted goes on where it stopped:
the same command continues, and commands with other --models may run side by side. Results of all runs that are there
go to benchmarks/results/trained_models.json, anew after each, with the processor's time and not the clock's. With one
thread the same software on the same processor gives the same weights.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import harness, machine, page
from itm_fast._files import atomic_write
from itm_fast.cli import main as itm_fast
from itm_fast.data import open_split
from itm_fast.evaluation import evaluate
from itm_fast.models import load
from itm_fast.models._catalogue import CATALOGUE
from itm_fast.training import resume

VOCABULARY = "openclipart_vocab.json"
RECIPE = [
    "--embed-size", "128", "--word-dim", "128", "--batch-size", "64", "--lr", "1e-3", "--epochs", "30",
    "--lr-update", "22", "--no-max-violation", "--exclude-same-image", "--device", "cpu", "--quiet",
]  # fmt: skip
SIMILARITY = ["--sim-dim", "64"]
BASELINE = "dual"
POOLING = ["--agg-func", "Mean"]
# name -> what of it differs from the recipe; the baseline first
MODELS = {
    f"{row.name}-{direction}" if direction else row.name: [
        *("--model", row.name),
        *(["--direction", direction] if direction else []),
        *(POOLING if "agg_func" in row.options else []),
        *(SIMILARITY if "sim_dim" in row.options else []),
    ]
    for row in sorted(CATALOGUE.values(), key=lambda row: row.name != BASELINE)
    for direction in row.directions or [None]
}
RESULT = "trained_models"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="what make_data.py wrote")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for the runs")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="default: all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N", help="default: 0 1 2")
    parser.add_argument("--no-control", action="store_true", help="leave the shuffled captions out")
    parser.add_argument("--minutes", type=float, metavar="M", help="start no other run after so many minutes")
    parser.add_argument("--epochs", type=int, metavar="N", help="other than the recipe's, for a trial")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of torch (default: 1)")
    args = parser.parse_args(argv)

    torch.set_num_threads(args.threads)
    changes = [] if args.epochs is None else ["--epochs", str(args.epochs)]
    jobs = [(model, seed, False) for seed in args.seeds for model in args.models]
    if not args.no_control:
        jobs += [(model, args.seeds[0], True) for model in args.models]
    start = time.monotonic()
    for number, (model, seed, control) in enumerate(jobs):
        if args.minutes is not None and time.monotonic() - start > 60 * args.minutes:
            print(f"{len(jobs) - number} runs are left; the same command goes on", file=sys.stderr)
            break
        job(args.data, args.output, model, seed, control, changes)
        save(args.data, args.output, changes)
    print(page.trained(json.loads(save(args.data, args.output, changes).read_text())))
    return 0


def folder(output: Path, model: str, seed: int, control: bool) -> Path:
    return output / f"{model}-{seed}{'-shuffled' if control else ''}"


def job(data: Path, output: Path, model: str, seed: int, control: bool, changes: list[str]) -> None:
    """One run and its evaluation, where they are not there yet: `summary.json` in the run's folder."""
    home = folder(output, model, seed, control)
    summary = home / "summary.json"
    options = [*MODELS[model], *RECIPE, "--seed", str(seed), *changes]
    if summary.exists():
        if json.loads(summary.read_text())["options"] != options:
            raise SystemExit(f"{home} holds a run with other options; give another --output")
        return
    harness.progress(f"training {home.name}")
    seen = shuffled(data, output / "shuffled") if control else data
    places = ["--data", str(seen), "--vocab", str(data / VOCABULARY), "--output", str(home)]
    begun = (home / resume.NAME).exists()
    start = time.process_time()
    if itm_fast(["train", *options, *places, *(["--resume"] if begun else [])]):
        raise SystemExit(f"training {home.name} failed")
    seconds = time.process_time() - start
    with open(home / "log.csv", newline="") as file:
        rsums = [float(row["rsum"]) for row in csv.DictReader(file) if row["rsum"]]
    found = {
        "options": options,
        "processor_seconds": None if begun else round(seconds, 1),  # of an interrupted run the first part is not known
        "epochs": len(rsums),
        "best_epoch": int(np.argmax(rsums)) + 1,
        "best_dev_rsum": max(rsums),
        **held_out(data, home / "model_best.pth.tar"),
    }
    with atomic_write(summary) as file:
        file.write(json.dumps(found, indent=1) + "\n")


def held_out(data: Path, file: Path) -> dict[str, Any]:
    """Recalls on the test split, and those of chance."""
    loaded = load(file, "cpu", vocab=data / VOCABULARY)
    assert loaded.vocab is not None
    report = evaluate([loaded.model], open_split(data, "test"), loaded.vocab, progress=False)
    (system,) = report.to_dict()["systems"]
    parameters = sum(p.numel() for part in loaded.model.modules for p in part.parameters())
    return {"held_out": system["pools"][0], "parameters": parameters}


def shuffled(data: Path, home: Path) -> Path:
    """The same data, every training caption with a picture drawn at random."""
    if home.exists():
        return home
    home.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix="shuffling-", dir=home.parent))
    shutil.copytree(data, made, dirs_exist_ok=True)
    name = "train_caption_to_image.npy"
    np.save(made / name, np.random.default_rng(0).permutation(np.load(data / name)))
    with contextlib.suppress(OSError):  # another process was first; both made the same
        os.rename(made, home)
    shutil.rmtree(made, ignore_errors=True)
    return home


def save(data: Path, output: Path, changes: list[str]) -> Path:
    """The result file, from all runs that are there."""
    sizes = {}
    for name in ("train", "dev", "test"):
        split = open_split(data, name)
        sizes[name] = {"images": len(split.features), "captions": len(split.captions)}
    results = []
    for model in MODELS:
        runs, control = [], None
        for home in sorted(output.glob(f"{model}-*")):
            name = home.name.removeprefix(f"{model}-")
            if not (home / "summary.json").exists() or not name.removesuffix("-shuffled").isdigit():
                continue
            run = json.loads((home / "summary.json").read_text())
            if name.isdigit():
                runs.append({"seed": int(name), **run})
            else:
                control = run
        if runs:
            results.append({"model": model, **spread(runs), "runs": runs, "control": control})
    content = {"environment": machine.environment(), "recipe": [*RECIPE, *changes], "data": sizes, "results": results}
    return harness.write(RESULT, verdicts(content))


def spread(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation over the seeds of the held-out rsum."""
    rsums = [rsum(run) for run in runs]
    return {
        "rsum_mean": statistics.mean(rsums),
        "rsum_deviation": statistics.stdev(rsums) if len(rsums) > 1 else None,
        "rsum_least": min(rsums),
        "rsum_most": max(rsums),
    }


def rsum(run: dict[str, Any]) -> float:
    return run["held_out"]["rsum"]


def verdicts(content: dict[str, Any]) -> dict[str, Any]:
    """Say of every model whether its worst seed beats the baseline's best one."""
    base = next((one for one in content["results"] if one["model"] == BASELINE), None)
    for one in content["results"]:
        if base is not None and one is not base:
            above = one["rsum_least"] > base["rsum_most"]
            below = one["rsum_most"] < base["rsum_least"]
            one["against_baseline"] = "above" if above else "below" if below else "within the seeds' spread"
    return content


if __name__ == "__main__":
    sys.exit(main())
