"""Load a trained model, its vocabulary and its name from a checkpoint."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from . import checkpoint
from ._building import rebuild
from ._common import Matcher, usable_device
from ._recognised import title
from ._vocabulary import files, why_another

if TYPE_CHECKING:
    from ..data import Vocabulary


@dataclass(frozen=True, eq=False)
class Loaded:
    """A trained model.

    Attributes:
        model: in evaluation mode, with its weights.
        vocab: the vocabulary that it was trained with; None if no file was found.
        name: "SGR", "SCAN t2i", ...; followed by "A" or "B" if the file holds two networks.
    """

    model: Matcher
    vocab: Vocabulary | None
    name: str


def load(
    path: str | os.PathLike[str],
    device: str | torch.device | None = None,
    *,
    network: str | None = None,
    vocab: str | os.PathLike[str] | None = None,
) -> Loaded:
    """Load a trained model from a published checkpoint, ready to score.

    Nothing in the file is executed; see `itm_fast.models.checkpoint`. Without `vocab` the vocabulary is the first file
    called `{data_name}_vocab.json` (such as `f30k_precomp_vocab.json`) or `vocab.json` in the checkpoint's folder, then
    in the folder where the model was trained.

    Args:
        path: `model_best.pth.tar` of a published model or of `itm-fast train`, or its folder.
        device: the model's device: "cpu", "cuda", "cuda:1", ...; None: CUDA if there is a GPU, else the CPU.
        network: which network to load from a file that holds two, `model_A` and `model_B`: "A" or "B".
        vocab: the file of the vocabulary that the model was trained with.

    Returns:
        `Loaded`: the model in evaluation mode, its vocabulary or None, and its name.

    Raises:
        OSError: a file is missing or cannot be read.
        ValueError: the file is not such a checkpoint or is damaged; it holds two networks and `network` is None, or it
            does not hold `network`; the device does not exist; or the vocabulary has other words than the one that the
            model was trained with (its size, and where the checkpoint has it its checksum, are compared).

    >>> from itm_fast.data.openclipart import CHECKPOINTS, FOLDER
    >>> loaded = load(CHECKPOINTS["saf"], "cpu")
    >>> loaded.name, len(loaded.vocab), loaded.model.sim_enc.training
    ('SAF', 875, False)

    Score images, given as features [I, R, F], with captions:

    >>> import numpy as np
    >>> from itm_fast.evaluation import score
    >>> features = np.random.rand(2, 36, 128).astype(np.float32)
    >>> score(loaded.model, features, ["a red apple", "a black cat", "two trees"], loaded.vocab).shape
    (2, 3)
    """
    chosen = usable_device(device)
    found = _network(checkpoint.load_all(path), network)
    words = _words(found, vocab)
    model = rebuild(found, chosen)
    model.val_start()
    return Loaded(model, words, f"{title(found.opt)} {found.name}".rstrip())


def _network(networks: list[checkpoint.Checkpoint], name: str | None) -> checkpoint.Checkpoint:
    if name is None and len(networks) == 1:
        return networks[0]
    path, names = networks[0].path, [found.name for found in networks]
    if name is None:
        raise ValueError(
            f"{path}: holds {len(names)} networks ({', '.join(names)}); choose one, such as network={names[0]!r}. "
            "Their scores are averaged: `itm-fast evaluate` takes them as members of an ensemble"
        )
    if name not in names:
        held = f"holds the networks {', '.join(names)}" if len(names) > 1 else "holds one network; leave `network` out"
        raise ValueError(f"{path}: has no network {name!r}; it {held}")
    return networks[names.index(name)]


def _words(found: checkpoint.Checkpoint, named: str | os.PathLike[str] | None) -> Vocabulary | None:
    from ..data import Vocabulary

    path = next(files(found), None) if named is None else Path(named)
    if path is None:
        return None
    vocab = Vocabulary.load(path)
    if reason := why_another(found, path, vocab):
        raise ValueError(f"{reason}: vocab=FILE")
    return vocab
