"""Build models from options or from checkpoints."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..nn import PairScorer
from ._catalogue import ALONE, CATALOGUE
from ._common import Matcher
from ._options import TRAINING
from ._recognised import check, recognised
from .checkpoint import Checkpoint

# Options that only training reads. A checkpoint may lack them or have invalid ones, so scoring uses their defaults.
_UNUSED = ("grad_clip", "margin", "max_violation", "learning_rate")


def model_class(opt: argparse.Namespace) -> type[Matcher]:
    """The class of the model that these options describe.

    Args:
        opt: SGRAF's options have `module_name`, SCAN's have `cross_attn`, those of other models `system`.

    Raises:
        ValueError: they have none of these, or `system` is unknown.

    >>> model_class(argparse.Namespace(system="DualEncoder")).__name__
    'DualEncoder'
    """
    return recognised(opt).model()


def scorer(
    name: str,
    *,
    dim: int = 1024,
    sim_dim: int = 256,
    regions: int = 36,
    direction: str | None = None,
    **options: Any,
) -> PairScorer:
    """Build a model's pair scorer alone, with new weights and, without `mode`, in training mode, as modules are.

    It is called as `scorer(image, words, cu_seqlens, region_lengths)` -> scores [I, T]; its parameters have the names
    of the published checkpoint's part.

    Args:
        name: a model's name for `itm-fast train --model`; or "laps", "teran" and "aladin" for the pair scores of these
            papers, which have no parameters; "laps_slim" for LAPS' with its choice of patches, which reads `dim` and
            `num_patches`; "gsmn" for GSMN's, which is called with `bbox=`. The others of these five read no size.
        dim: D.
        sim_dim: S, for models with similarity vectors.
        regions: R, for models with weights for each region.
        direction: which side attends, for models that have the choice; None: the published default.
        **options: the model's own options under their published names, or those of its pair scorer, as RCAR's step and
            smooth; the defaults are the F30K recipe's. For "imram" this recipe has one step of attention, which uses
            none of the parameters; `iteration_step=3` uses them. And mode, "train" or "eval", for models that have no
            option of this name (NAAF has).

    Raises:
        ValueError: the name, the direction or an option is unknown, or a value is out of its range.

    >>> import itm_fast
    >>> scorer = itm_fast.models.scorer("bfan", dim=64, focal_type="prob")
    >>> words, cu_seqlens = itm_fast.pack(torch.randn(3, 12, 64), [12, 5, 8])
    >>> scorer(torch.randn(2, 36, 64), words, cu_seqlens).shape
    torch.Size([2, 3])
    """
    if name not in CATALOGUE and name not in ALONE:
        raise ValueError(f"scorer: name must be one of {', '.join((*CATALOGUE, *ALONE))}, got {name!r}")
    if name in ALONE:
        return _alone(name, direction, dim, options)
    row, asked = CATALOGUE[name], "direction"
    if row.directions and direction is None:
        asked = row.direction if row.direction in options else asked
        direction = options.pop(row.direction, row.directions[0])
    if direction is not None and direction not in row.directions:
        known = f"must be one of {', '.join(row.directions)}" if row.directions else f"is not an option of {name}"
        raise ValueError(f"scorer: {asked} {known}, got {direction!r}")
    chosen = row.published("f30k", direction)
    own = {option for option in row.model().options if option in row.options}
    mode = None if "mode" in own else options.pop("mode", None)
    if mode not in (None, "eval", "train"):
        raise ValueError(f"scorer: mode must be eval or train, got {mode!r}")
    options = row.model().scorer_options(options, chosen)
    if unknown := sorted(set(options) - own):
        known = ", ".join(sorted(own)) or "none"
        raise ValueError(f"scorer: {name} has no option {', '.join(unknown)}; it has {known}")
    chosen |= {"embed_size": dim, "num_region": regions, **options}
    if "sim_dim" in own:
        chosen["sim_dim"] = sim_dim
    spelled = {"embed_size": "dim", "num_region": "regions"}
    check(chosen, lambda option: spelled.get(option, option))
    return row.model().similarity(argparse.Namespace(**chosen)).train(mode != "eval")


def _alone(name: str, direction: str | None, dim: int, options: dict[str, Any]) -> PairScorer:
    home, known = ALONE[name]
    own = [option for option in known if option != "embed_size"]  # which is `dim` here
    unknown = sorted(set(options) - set(own)) + ["direction"] * (direction is not None)
    if unknown:
        raise ValueError(f"scorer: {name} has no option {', '.join(unknown)}; it has {', '.join(own)}")
    given = {"embed_size": dim, **options} if "embed_size" in known else options
    for option, value in given.items():
        known[option].check("dim" if option == "embed_size" else option, value)
    module, cls = home.split(":")
    return getattr(importlib.import_module(f"{__package__}.{module}"), cls)(**given)


def build(opt: argparse.Namespace) -> Matcher:
    """Build the model that the options of a checkpoint describe.

    Args:
        opt: all options that the model reads, by their published names: those of a checkpoint, or what
            `itm_fast.training.options` returns, with `vocab_size`.

    Raises:
        ValueError: no model fits the options, they lack one, or one has an unknown value.

    >>> opt = argparse.Namespace(
    ...     grad_clip=2.0, img_dim=6, embed_size=8, no_imgnorm=False, vocab_size=9, word_dim=5, num_layers=1,
    ...     bi_gru=True, no_txtnorm=False, sim_dim=4, module_name="SAF", sgr_step=3, margin=0.2,
    ...     max_violation=True, learning_rate=2e-4)
    >>> type(build(opt)).__name__
    'SGRAF'
    """
    return model_class(opt)(opt)


def rebuild(found: Checkpoint, device: str | torch.device | None = None) -> Matcher:
    """Build the model of a checkpoint, with its weights. Options that only training reads get their default values.

    Args:
        found: one network of a checkpoint file.
        device: the model's device; None: CUDA if there is a GPU, else the CPU.

    Returns:
        The model in training mode, like a new one; call `val_start()` before scoring. Its `vocab_checksum` is
        `Vocabulary.checksum()` of the vocabulary that it was trained with, or None if the file does not have it.

    Raises:
        ValueError: an option that scoring needs is missing; no model can be built with the options; or the weights in
            the file have other shapes than those of the model. In all cases nothing is built.

    >>> from itm_fast.models import checkpoint
    >>> from itm_fast.data.openclipart import CHECKPOINTS
    >>> type(rebuild(checkpoint.load(CHECKPOINTS["saf"]))).__name__
    'SGRAF'
    """
    opt = argparse.Namespace(**vars(found.opt))
    for name in _UNUSED:
        setattr(opt, name, TRAINING[name].default)
    if getattr(opt, "module_name", None) == "SAF" and not hasattr(opt, "sgr_step"):
        opt.sgr_step = 0  # SAF has no reasoning steps
    if getattr(opt, "agg_func", None) in ("Mean", "Max", "Sum") and not hasattr(opt, "lambda_lse"):
        opt.lambda_lse = CATALOGUE["scan"].options["lambda_lse"].default  # only LogSumExp reads it
    opt.vocab_size = found.vocab_size
    opt.device = None if device is None else str(device)
    try:
        fits(opt, found.model)
        model = build(opt)
        model.load_state_dict(found.model)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{found.path}: {' '.join(str(error).split())}") from error
    model.vocab_checksum = getattr(found.opt, "vocab_checksum", None)
    model.trained_with_boxes = getattr(found.opt, "trained_with_boxes", None)
    return model


def fits(opt: argparse.Namespace, states: Sequence[Mapping[str, Tensor]]) -> None:
    """Check that weights have the shapes of the model that options describe; the model is not built.

    Raises:
        ValueError: names the weight that differs.
    """
    read = (*model_class(opt).reads(), "num_region")
    check({name: value for name, value in vars(opt).items() if name in read})
    model = outline(opt)
    for part, mine, theirs in zip(model.parts, model.state_dict(), states, strict=False):
        for name, value in mine.items():
            if name in theirs and theirs[name].shape != value.shape:
                raise ValueError(
                    f"opt describes a model whose {part}.{name} is {list(value.shape)}, and the weights given are "
                    f"{list(theirs[name].shape)}; they belong to another model"
                )
            if name not in theirs and not name.endswith("num_batches_tracked"):  # missing before torch 0.4.1
                raise ValueError(
                    f"opt describes a model with {part}.{name} {list(value.shape)}, which the weights given lack; they "
                    "belong to another model"
                )


def outline(opt: argparse.Namespace) -> Matcher:
    """Build the model that options describe on the meta device: its tensors have shapes but no memory.

    Raises:
        ValueError: as `build`, or a size is too large for torch.
    """
    try:
        # An optimiser imports torch._dynamo, whose import in torch 2.6 computes with tensors of the default device.
        importlib.import_module("torch._dynamo")
        with torch.device("meta"):
            return build(argparse.Namespace(**{**vars(opt), "device": "meta"}))
    except (RuntimeError, OverflowError) as error:
        raise ValueError(f"no model can be built with these options: {' '.join(str(error).split())}") from error
