"""`itm-fast compare`: is one model better than another, or is it the choice of test images and seeds?"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..evaluation import KeptRanks

HELP = """\
Compare two models that were evaluated on the same split, by a paired bootstrap of each recall.

  itm-fast evaluate --checkpoint a/model_best.pth.tar --data data/f30k_precomp --output runs/a
  itm-fast evaluate --checkpoint b/model_best.pth.tar --data data/f30k_precomp --output runs/b
  itm-fast compare runs/a runs/b

A and B are the --output folders of `itm-fast evaluate` or `itm-fast metrics`, which hold ranks.npz. A folder without
one stands for all the runs in its subfolders: the seeds of one model, such as runs/a/seed1, runs/a/seed2, ... Of an
evaluation with several checkpoints the ensemble is compared.

For each recall and their sum the table has both models, the difference B - A, its confidence interval and a two-sided
p-value. Each bootstrap sample draws images with replacement, with all their captions, and with several seeds the runs
too. The p-values are not corrected for the number of rows. Two models that differ in one run each may differ by their
seeds alone, which no test on one run can tell."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    from ..evaluation import TIES

    parser.add_argument("a", metavar="A", help="the --output folder of one model, or a folder of such folders")
    parser.add_argument("b", metavar="B", help="the same of the other model")
    parser.add_argument("--at", nargs="+", type=int, default=[1, 5, 10], metavar="K", help="cut-offs (default: 1 5 10)")
    parser.add_argument(
        "--ties", choices=TIES, default=TIES[0], help="where ties are ranked: see `itm-fast evaluate --help`"
    )
    parser.add_argument("--samples", type=int, default=10_000, metavar="N", help="bootstrap samples (default: 10000)")
    parser.add_argument("--seed", type=int, default=0, help="of the samples (default: 0)")
    parser.add_argument("--confidence", type=float, default=0.95, metavar="P", help="of the intervals (default: 0.95)")
    parser.add_argument("--output", metavar="FILE.json", help="write all numbers here too")


def run(args: argparse.Namespace) -> int:
    """Compare, and print the table."""
    from .._files import atomic_write, require_place

    if args.output:
        require_place(args.output, "--output")
    from ..evaluation import compare

    found = compare(
        runs_in(args.a), runs_in(args.b), cutoffs=args.at, ties=args.ties, samples=args.samples, seed=args.seed,
        confidence=args.confidence,
    )  # fmt: skip
    print(found)
    if args.output:
        with atomic_write(args.output) as file:
            file.write(json.dumps(found.to_dict(), indent=1, allow_nan=False) + "\n")
        print(f"\nwritten: {args.output}")
    return 0


def runs_in(path: str) -> list[KeptRanks]:
    """The run of a folder, or the runs of its subfolders."""
    from ..evaluation import load_ranks
    from ..evaluation.kept_ranks import RANKS

    folder = Path(path)
    if (folder / RANKS).exists() and (below := sorted(folder.glob(f"*/{RANKS}"))):
        raise ValueError(
            f"{path} holds a run itself, and others in folders such as {below[0].parent.name}; give the folder of one "
            "run, or one that holds nothing but the folders of the seeds"
        )
    if folder.is_dir() and not (folder / RANKS).exists():
        found = sorted(folder.glob(f"*/{RANKS}"))
        if not found:
            raise ValueError(
                f"{path} and its subfolders have no {RANKS}; give the --output folder of `itm-fast evaluate`"
            )
        return [load_ranks(file) for file in found]
    return [load_ranks(folder)]
