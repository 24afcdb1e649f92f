"""Train the demo's SGR, SAF and SCAN on what `make_data.py` made; report held-out recall; ship the checkpoints.

    export PYTHONPATH=.
    python benchmarks/demo/train.py --data DATA --output RUNS             # train, evaluate, write the result file
    python benchmarks/demo/train.py --data DATA --output RUNS --ship      # and put the checkpoints in the package
    python benchmarks/demo/train.py --data DATA --output RUNS --control   # and train SCAN on shuffled captions

The best epoch is chosen by the dev split; the test split is read once, after training. Shipped weights are float16,
and they are what is evaluated. A run that RUNS already holds is not repeated. Two threads, seed 0: the same software on
the same processor gives the same weights.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import manifest
import numpy as np
import torch

from benchmarks.harness import RESULTS
from benchmarks.machine import environment
from itm_fast.cli import main as itm_fast
from itm_fast.data import Vocabulary, open_split
from itm_fast.evaluation import Report, evaluate
from itm_fast.models import load
from itm_fast.models.checkpoint import load as load_checkpoint
from itm_fast.training import checkpoint

VOCABULARY = "openclipart_vocab.json"
# The loss over all negatives: with some 1,500 captions the hardest one alone collapses the embedding.
COMMON = [
    "--embed-size", "128", "--word-dim", "128", "--no-max-violation", "--exclude-same-image", "--seed", "0",
    "--device", "cpu", "--quiet",
]  # fmt: skip
SGRAF = ["--sim-dim", "64", "--batch-size", "64", "--lr", "1e-3", "--epochs", "30", "--lr-update", "22"]
RECIPES = {
    "sgr": ["--model", "sgr", *SGRAF],
    "saf": ["--model", "saf", *SGRAF],
    "scan": ["--model", "scan", "--agg-func", "Mean", "--lr", "2e-3", "--epochs", "12", "--lr-update", "8"],
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="what make_data.py wrote")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for the runs")
    parser.add_argument("--model", choices=RECIPES, action="append", help="only this one (repeatable)")
    parser.add_argument("--ship", action="store_true", help="copy the checkpoints into the package")
    parser.add_argument("--control", action="store_true", help="also train SCAN with captions of other pictures")
    args = parser.parse_args(argv)

    torch.set_num_threads(2)
    runs = {name: _train(name, args.data, args.output / name) for name in args.model or RECIPES}
    files = {name: args.output / f"{name}.pth.tar" for name in runs}
    for name, file in files.items():
        _halve(args.output / name / "model_best.pth.tar", file)
    reports = [_evaluate(args.data, {name: files[name] for name in group if name in files}) for group in GROUPS]
    if args.control:
        folder = _shuffled(args.data, args.output / "shuffled")
        runs["scan, captions shuffled"] = _train("scan", folder, args.output / "control")
        control = args.output / "control" / "model_best.pth.tar"
        reports.append(_evaluate(args.data, {"scan, captions shuffled": control}))
    reports = [report for report in reports if report is not None]
    print(*reports, sep="\n\n")
    if args.ship:
        for file in files.values():
            shutil.copyfile(file, manifest.SHIPPED / file.name)
        manifest.write()
    if set(files) == set(RECIPES):
        _save(args.data, runs, reports)
    return 0


GROUPS = (("sgr", "saf"), ("scan",))  # SGRAF is the mean of the first group's scores


def _train(name: str, data: Path, output: Path) -> dict[str, Any]:
    """Train one model with the program itself; how long it took, and its best epoch."""
    summary = output / "summary.json"
    if summary.exists():
        return json.loads(summary.read_text())
    options = [*RECIPES[name], *COMMON]
    places = ["--data", str(data), "--vocab", str(data / VOCABULARY), "--output", str(output)]
    start = time.perf_counter()
    if itm_fast(["train", *options, *places]):
        raise SystemExit(f"training {name} failed")
    seconds = time.perf_counter() - start
    with open(output / "log.csv", newline="") as file:
        rsums = [float(row["rsum"]) for row in csv.DictReader(file) if row["rsum"]]
    found = {
        "options": options,
        "seconds": round(seconds),
        "epochs": len(rsums),
        "best_epoch": int(np.argmax(rsums)) + 1,
        "best_dev_rsum": max(rsums),
    }
    summary.write_text(json.dumps(found))
    return found


def _halve(source: Path, target: Path) -> None:
    """The checkpoint with float16 weights, and without the folders of the machine that trained it."""
    found = load_checkpoint(source)
    opt = argparse.Namespace(**vars(found.opt))
    opt.data_path = opt.vocab_path = opt.model_name = opt.logger_name = "."
    opt.data_name = "openclipart"
    states = [
        {key: value.half() if value.is_floating_point() else value for key, value in state.items()}
        for state in found.model
    ]
    checkpoint.save(
        target, epoch=found.epoch, model=states, best_rsum=found.best_rsum, opt=opt, iterations=found.iterations
    )


def _evaluate(data: Path, files: dict[str, Path]) -> Report | None:
    if not files:
        return None
    models = [load(file, "cpu").model for file in files.values()]
    vocabulary = Vocabulary.load(data / VOCABULARY)
    names = [name if " " in name else name.upper() for name in files]
    return evaluate(models, open_split(data, "test"), vocabulary, names=names, progress=False)


def _shuffled(data: Path, folder: Path) -> Path:
    """The same data, every training caption with a picture drawn at random."""
    shutil.copytree(data, folder, dirs_exist_ok=True)
    file = folder / "train_caption_to_image.npy"
    np.save(file, np.random.default_rng(0).permutation(np.load(file)))
    return folder


def _save(data: Path, runs: dict[str, Any], reports: list[Report]) -> None:
    sizes = {}
    for name in ("train", "dev", "test"):
        split = open_split(data, name)
        sizes[name] = {"images": len(split.features), "captions": len(split.captions)}
    systems = [system for report in reports for system in report.to_dict()["systems"]]
    content = {"environment": environment(), "data": sizes, "training": runs, "held_out": systems}
    (RESULTS / "demo_recall.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
