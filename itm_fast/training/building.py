"""From a checkpoint to a model that scores."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..evaluation.memory import GB, available_bytes
from ..models import Matcher, build, model_class
from . import recipe
from .checkpoint import Checkpoint

# What only training reads: any value scores alike, and the file's own may be missing or odd.
_TRAINING = ("grad_clip", "margin", "max_violation", "learning_rate")


def rebuild(found: Checkpoint, device: str | torch.device | None = None) -> Matcher:
    """Build the model of a checkpoint with its weights; what only training reads is neither asked for nor kept.

    Args:
        found: one network.
        device: where the model goes; CUDA where there is one when None.

    Returns:
        the model, in training mode as a new one is; `val_start()` makes it ready to score. Its `vocab_checksum` is that
        of the words it was trained with (`Vocabulary.checksum`), None where the file tells none.

    Raises:
        ValueError: the options lack one that scoring needs, describe a model that cannot be built, or another than
            the one whose weights the file holds. Nothing has been built then.

    >>> import tempfile
    >>> from itm_fast.training import checkpoint, options
    >>> opt = options("dual", img_dim=6, embed_size=8, word_dim=4)
    >>> model = build(argparse.Namespace(**vars(opt), vocab_size=9))
    >>> file = tempfile.mkdtemp() + "/model_best.pth.tar"
    >>> checkpoint.save(file, epoch=1, model=model.state_dict(), best_rsum=0.0, opt=opt, iterations=1)
    >>> type(rebuild(checkpoint.load(file))).__name__
    'DualEncoder'
    """
    opt = argparse.Namespace(**vars(found.opt))
    plain = vars(recipe.options("scan"))
    for name in _TRAINING:
        setattr(opt, name, plain[name])
    if getattr(opt, "module_name", None) == "SAF" and not hasattr(opt, "sgr_step"):
        opt.sgr_step = 0  # of the other head
    if getattr(opt, "agg_func", None) in ("Mean", "Max", "Sum") and not hasattr(opt, "lambda_lse"):
        opt.lambda_lse = plain["lambda_lse"]  # of the other aggregation
    opt.vocab_size = found.words
    opt.device = None if device is None else str(device)
    try:
        fits(opt, found.model)
        model = build(opt)
        model.load_state_dict(found.model)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{found.path}: {' '.join(str(error).split())}") from error
    model.vocab_checksum = getattr(found.opt, "vocab_checksum", None)
    return model


def fits(opt: argparse.Namespace, states: Sequence[Mapping[str, Tensor]]) -> None:
    """Refuse options that describe another model than the one whose weights are given, without building either.

    Raises:
        ValueError: says which weight differs.
    """
    read = (*model_class(opt).reads(), "num_region")
    recipe.check({name: value for name, value in vars(opt).items() if name in read})
    model = outline(opt)
    for part, mine, theirs in zip(model.parts, model.state_dict(), states, strict=False):
        for name, value in mine.items():
            if name in theirs and theirs[name].shape != value.shape:
                raise ValueError(
                    f"opt describes a model whose {part}.{name} is {list(value.shape)}, and the weights given are "
                    f"{list(theirs[name].shape)}; they belong to another model"
                )
            if name not in theirs and not name.endswith("num_batches_tracked"):  # torch 0.4 had none
                raise ValueError(
                    f"opt describes a model with {part}.{name} {list(value.shape)}, which the weights given lack; they "
                    "belong to another model"
                )


def affordable(opt: argparse.Namespace, device: torch.device) -> None:
    """Refuse options whose model cannot be trained in the memory that is free, before it is built.

    Raises:
        ValueError: says how much is needed and how much there is; or as `outline`.
    """
    weights = sum(p.numel() * p.element_size() for p in outline(opt).params)
    needed, free = 4 * weights, available_bytes(device)  # weights, their gradients, and Adam's two moments
    if needed > free:
        raise ValueError(
            f"these options describe a model that takes {needed / GB:,.1f} GB to train, and {free / GB:,.1f} GB are "
            f"free on {device}; choose smaller sizes"
        )


def outline(opt: argparse.Namespace) -> Matcher:
    """The model that options describe, its tensors without memory: shapes alone.

    Raises:
        ValueError: as `build`, or a size is beyond what torch can count.
    """
    try:
        with torch.device("meta"):
            return build(argparse.Namespace(**{**vars(opt), "device": "meta"}))
    except (RuntimeError, OverflowError) as error:
        raise ValueError(f"no model can be built with these options: {' '.join(str(error).split())}") from error
