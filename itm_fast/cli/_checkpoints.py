"""The checkpoints of `itm-fast evaluate`: the networks in them, their names, and the vocabulary that they share."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..data import Split, Vocabulary
    from ..models.checkpoint import Checkpoint


def members(paths: list[str]) -> list[Checkpoint]:
    """Every network of every checkpoint file, in order; a file may hold two."""
    from ..models import checkpoint

    return [found for path in paths for found in checkpoint.load_all(path)]


def check_features(found: Checkpoint, split: Split, args: argparse.Namespace) -> None:
    """Refuse data of another feature size than the checkpoint's."""
    size = split.features.shape[2]
    if size != found.opt.img_dim:
        raise ValueError(
            f"{args.data}: the {args.split} split has {size:,} features per region, and {found.path} was trained on "
            f"{found.opt.img_dim:,}; use the features that it was trained on"
        )


def check_vocabulary(found: Checkpoint, vocab_path: Path, vocab: Vocabulary) -> None:
    """Refuse another vocabulary than the one that the checkpoint was trained with, as far as the file tells."""
    from ..models._vocabulary import why_another

    if reason := why_another(found, vocab_path, vocab):
        raise ValueError(f"{reason}: --vocab FILE.json")


def find_vocabulary(args: argparse.Namespace, found: Checkpoint) -> tuple[Path, Vocabulary]:
    """The vocabulary named, or the first found: beside the first checkpoint, where it was trained, near the data."""
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
    """SGR, SAF, SCAN t2i, ...; where two would be equal, with the shortest part of the path that tells them apart."""
    from ..models._catalogue import title

    plain = [f"{title(found.opt)} {found.name}".rstrip() for found in loaded]
    parts = [Path(found.path).absolute().parts for found in loaded]
    names = plain
    for depth in range(1, max(map(len, parts)) + 1):
        if len(set(names)) == len(names):
            break
        names = [f"{name} ({'/'.join(part[-depth:])})" for name, part in zip(plain, parts, strict=True)]
    return names
