"""The checkpoints of `itm-fast evaluate`: the networks in them, their names, and the vocabulary that they share."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..data import Split, Vocabulary
    from ..training.checkpoint import Checkpoint


def members(paths: list[str]) -> list[Checkpoint]:
    """Every network of every checkpoint file, in order; a file may hold two."""
    from ..training import checkpoint

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
    if len(vocab) != found.words:
        raise ValueError(
            f"{found.path} embeds {found.words:,} words, and {vocab_path} has {len(vocab):,}; give the vocabulary that "
            "it was trained with: --vocab FILE.json"
        )
    if getattr(found.opt, "vocab_checksum", vocab.checksum()) != vocab.checksum():
        raise ValueError(
            f"{found.path} was trained with other words than the {len(vocab):,} of {vocab_path}; give the vocabulary "
            "that it was trained with: --vocab FILE.json"
        )


def find_vocabulary(args: argparse.Namespace, found: Checkpoint) -> tuple[Path, Vocabulary]:
    """The vocabulary named, or the first found: beside the first checkpoint, where it was trained, near the data."""
    from ..data import Vocabulary

    if args.vocab:
        return Path(args.vocab), Vocabulary.load(args.vocab)
    data = Path(args.data)
    beside = data if data.is_dir() else data.parent
    stems = dict.fromkeys([getattr(found.opt, "data_name", None), data.stem])
    names = [*(f"{stem}_vocab.json" for stem in stems if stem), "vocab.json"]
    folders = [Path(found.path).parent]
    if getattr(found.opt, "vocab_path", None):
        folders.append(Path(str(found.opt.vocab_path)))
    # SCAN keeps data/f30k_precomp/ and vocab/ side by side.
    near = (beside, beside.parent, beside.parent.parent)
    folders += [beside, *(folder / "vocab" for folder in near), beside.parent]
    folders = list(dict.fromkeys(folders))
    for folder in folders:
        for name in names:
            if (folder / name).is_file():
                return folder / name, Vocabulary.load(folder / name)
    raise FileNotFoundError(
        f"no vocabulary found; give it with --vocab FILE.json. Looked for {', '.join(names[:-1])} and {names[-1]} in "
        + ", ".join(map(str, folders))
    )


def member_names(models: list[Any], loaded: list[Checkpoint]) -> list[str]:
    """SGR, SAF, SCAN t2i, ...; where two would be equal, with the shortest part of the path that tells them apart."""
    plain = []
    for model, found in zip(models, loaded, strict=True):
        kind = type(model).__name__
        suffix = "".join(f" {getattr(found.opt, x)}" for x in ("cross_attn", "alignment") if hasattr(found.opt, x))
        plain.append(f"{found.opt.module_name if kind == 'SGRAF' else kind + suffix} {found.name}".rstrip())
    parts = [Path(found.path).absolute().parts for found in loaded]
    names = plain
    for depth in range(1, max(map(len, parts)) + 1):
        if len(set(names)) == len(names):
            break
        names = [f"{name} ({'/'.join(part[-depth:])})" for name, part in zip(plain, parts, strict=True)]
    return names
