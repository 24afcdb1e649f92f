"""The checkpoints of `itm-fast evaluate`: the networks in them, their names, and the vocabulary that they share."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..data import Split, Vocabulary
    from ..evaluation import Report
    from ..models.checkpoint import Checkpoint


def members(paths: list[str]) -> list[Checkpoint]:
    """Every network of every checkpoint file, in order; a file may hold two."""
    from ..models import checkpoint

    return [found for path in paths for found in checkpoint.load_all(path)]


def check_features(found: Checkpoint, split: Split, args: argparse.Namespace) -> None:
    """Refuse data whose features have a different size than those of the checkpoint."""
    size = split.features.shape[2]
    if size != found.opt.img_dim:
        raise ValueError(
            f"{args.data}: the {args.split} split has {size:,} features per region, and {found.path} was trained on "
            f"{found.opt.img_dim:,}; use the features that it was trained on"
        )


def check_vocabulary(found: Checkpoint, vocab_path: Path, vocab: Vocabulary) -> None:
    """Refuse a vocabulary whose words differ from those that the checkpoint was trained with."""
    from ..models._vocabulary import why_another

    if reason := why_another(found, vocab_path, vocab):
        raise ValueError(f"{reason}: --vocab FILE.json")


def find_vocabulary(args: argparse.Namespace, found: Checkpoint) -> tuple[Path, Vocabulary]:
    """The vocabulary of --vocab, or the first found: beside the checkpoint, where it was trained, or near the data."""
    from ..data import Vocabulary
    from ..models._vocabulary import files, places

    data = Path(args.data)
    path = Path(args.vocab) if args.vocab else next(files(found, data), None)
    if path is not None:
        return path, Vocabulary.load(path)
    folders, names = places(found, data)
    raise FileNotFoundError(
        f"no vocabulary found; give it with --vocab FILE.json. Looked for {', '.join(names[:-1])} and {names[-1]} in "
        + ", ".join(map(str, folders))
    )


def member_names(loaded: list[Checkpoint]) -> list[str]:
    """One name per network, such as "SCAN t2i"; equal names are followed by the shortest ends of the paths that differ.
    """
    from ..models._recognised import title

    plain = [f"{title(found.opt)} {found.name}".rstrip() for found in loaded]
    parts = [Path(found.path).absolute().parts for found in loaded]
    names = plain
    for depth in range(1, max(map(len, parts)) + 1):
        if len(set(names)) == len(names):
            break
        names = [f"{name} ({'/'.join(part[-depth:])})" for name, part in zip(plain, parts, strict=True)]
    return names


def with_name_of_ensemble(report: Report) -> Report:
    """The report, with the mean of an SGR and a SAF checkpoint under its published name, SGRAF."""
    *members, last = report.systems
    if sorted(system.name for system in members) != ["SAF", "SGR"]:
        return report
    return replace(report, systems=(*members, replace(last, name="SGRAF")))
