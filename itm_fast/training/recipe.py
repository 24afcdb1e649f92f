"""The published training recipes as options under their published names."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping
from typing import Any

# What training reads beside the model's own options.
TRAINING = ("num_epochs", "lr_update", "batch_size", "seed", "exclude_same_image", "val_step", "data_name")
MODELS = ("sgr", "saf", "scan", "shan", "hgan", "tshsr", "dual")
RECIPES = ("f30k", "coco")

_COMMON: dict[str, Any] = {
    "batch_size": 128,
    "learning_rate": 2e-4,
    "grad_clip": 2.0,
    "margin": 0.2,
    "max_violation": True,
    "img_dim": 2048,
    "word_dim": 300,
    "embed_size": 1024,
    "num_layers": 1,
    "bi_gru": True,
    "no_imgnorm": False,
    "no_txtnorm": False,
    "workers": 1,
    "log_step": 1,
    "val_step": 0,
    "seed": 0,
    "exclude_same_image": False,
    "data_path": ".",
    "data_name": "data",
}
# What the models that are neither SGRAF's halves nor SCAN add to the common options.
_SYSTEMS: dict[str, dict[str, Any]] = {
    "shan": {
        "system": "SHAN",
        "gate": "scalar",
        "gate_sharing": False,
        "affinity": "cosine",
        "pooling": "mean",
        "lambda_softmax": 15.0,
        "mu1": 0.3,
        "mu2": 0.5,
        "projection_bias": False,
        "word_vectors": None,
        "vector_dim": 0,
    },
    "hgan": {
        "system": "HGAN",
        "graph_layers": 2,
        "granularities": [1, 4, 16],
        "levels": [1.0, 1.0, 1.0],
        "lambda_t2i": 9.0,
        "lambda_i2t": 4.0,
        "lambda_global": 1.0,
        "share_local": 0.5,
        "share_global": 0.5,
    },
    "tshsr": {
        "system": "TSHSR",
        "sim_dim": 256,
        "context_nodes": [4, 1],
        "sgr_step": 3,
        "lambda_t2i": 9.0,
        "lambda_i2t": 4.0,
    },
    "dual": {"system": "DualEncoder"},
}
# (model, recipe) -> epochs, and epochs between two cuts of the learning rate; the others as SAF's
_SCHEDULES = {
    ("sgr", "f30k"): (40, 30),
    ("tshsr", "f30k"): (40, 30),
    ("saf", "f30k"): (30, 20),
    ("scan", "f30k"): (30, 15),
    ("saf", "coco"): (20, 10),
    ("shan", "f30k"): (30, 15),
    ("shan", "coco"): (30, 15),
}
DIRECTIONS = {"scan": ("t2i", "i2t"), "shan": ("full", "t2i", "i2t")}  # of each model that has any, the default first
# SCAN: direction -> (lambda_softmax, lambda_lse per recipe)
_LAMBDAS = {"t2i": (9.0, {"f30k": 6.0, "coco": 6.0}), "i2t": (4.0, {"f30k": 5.0, "coco": 20.0})}


def options(model: str, *, recipe: str = "f30k", direction: str | None = None, **changes: Any) -> argparse.Namespace:
    """The options of one published training run.

    Args:
        model: "sgr", "saf" (SGRAF's two halves), "scan", "shan", "hgan" and "tshsr" (reconstructed from their
            abstracts, with SGRAF's schedules), or "dual" (the plain dual encoder).
        recipe: "f30k" or "coco": epochs, schedule, SCAN's learning rate and temperatures for that data set.
        direction: SCAN's `cross_attn`, "t2i" (words attend to regions; the default) or "i2t"; SHAN's `alignment`,
            "full" (the default), "t2i" or "i2t"; the others ignore it.
        **changes: options that are to differ, by their published names; None means as published.

    Returns:
        what `itm_fast.models.build` and `itm_fast.training.train` take.

    Raises:
        ValueError: an unknown model, recipe, direction or option name.

    >>> opt = options("scan", recipe="coco", direction="i2t", batch_size=32)
    >>> opt.num_epochs, opt.lr_update, opt.learning_rate, opt.lambda_softmax, opt.lambda_lse, opt.batch_size
    (20, 10, 0.0005, 4.0, 20.0, 32)
    """
    directions = DIRECTIONS.get(model, ())
    if direction is None and directions:
        direction = directions[0]
    for name, value, known in (
        ("model", model, MODELS),
        ("recipe", recipe, RECIPES),
        ("direction", direction, directions),
    ):
        if known and value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    chosen = dict(_COMMON)
    chosen["num_epochs"], chosen["lr_update"] = _SCHEDULES.get((model, recipe), _SCHEDULES["saf", recipe])
    if model == "scan":
        softmax, lse = _LAMBDAS[str(direction)]
        chosen.update(
            cross_attn=direction,
            raw_feature_norm="clipped_l2norm",
            agg_func="LogSumExp",
            lambda_softmax=softmax,
            lambda_lse=lse[recipe],
            precomp_enc_type="basic",
        )
    elif model in _SYSTEMS:
        chosen.update(_SYSTEMS[model])
        if model == "shan":
            chosen["alignment"] = direction
    else:
        chosen.update(module_name=model.upper(), sim_dim=256, sgr_step=3)
    if model in ("scan", "shan") and recipe == "coco":
        chosen["learning_rate"] = 5e-4
    unknown = [name for name in changes if name not in chosen]
    if unknown:
        raise ValueError(f"{model} has no option {', '.join(unknown)}; its options are {', '.join(sorted(chosen))}")
    chosen.update({name: value for name, value in changes.items() if value is not None})
    check(chosen)
    return argparse.Namespace(**chosen)


def learning_rate(opt: argparse.Namespace, epoch: int) -> float:
    """The learning rate of one epoch: a tenth of the last after every `lr_update` epochs.

    Args:
        opt: with `learning_rate` and `lr_update`.
        epoch: 0, 1, ...

    >>> opt = options("saf")
    >>> [learning_rate(opt, epoch) == expected for epoch, expected in ((19, 2e-4), (20, 2e-4 * 0.1))]
    [True, True]
    """
    return opt.learning_rate * (0.1 ** (epoch // opt.lr_update))


def check(values: Mapping[str, Any], spell: Callable[[str], str] = str) -> None:
    """Refuse options that no model can be built or trained with, before anything is built.

    Args:
        values: any options by their published names; those that no recipe has are left alone.
        spell: how a message calls an option.

    Raises:
        ValueError: a value is of another type, not finite, or out of its range.

    >>> check({"sim_dim": 0})
    Traceback (most recent call last):
    ValueError: sim_dim must be at least 1, got 0
    """
    for name, value in values.items():
        wanted = _TYPES.get(name)
        if wanted is not None and not _fits(value, wanted):
            raise ValueError(f"{spell(name)} must be {_WORDS[type(wanted)]}, got {value!r}")
        for low, high, names in _RANGES:
            if name in names and not low <= value <= high:
                allowed = f"at least {low}" if high == math.inf or value < low else f"at most {high}"
                raise ValueError(f"{spell(name)} must be {allowed}, got {value}")
        if name in _POSITIVE and not value > 0:
            raise ValueError(f"{spell(name)} must be more than 0, got {value}")
        if name in _LAYERS and len(value) > _DEEPEST:
            raise ValueError(f"{spell(name)} must be at most {_DEEPEST} numbers, got {len(value)}")
    if values.get("batch_size", 2) < 2:
        raise ValueError(
            f"{spell('batch_size')} must be at least 2: the negatives come from the batch; got {values['batch_size']}"
        )


def _fits(value: object, wanted: object) -> bool:
    """Whether a value is of the type of an example; a whole number may stand for a float, 0 and 1 for a bool."""
    if isinstance(wanted, bool):
        return isinstance(value, int) and value in (0, 1)
    if isinstance(wanted, list):
        return isinstance(value, (list, tuple)) and all(_fits(item, wanted[0]) for item in value)
    if isinstance(wanted, str):
        return isinstance(value, str)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return isinstance(value, int) if isinstance(wanted, int) else finite(value)


def finite(value: float) -> bool:
    """Whether a number is finite as a float: no infinity, no NaN, and no whole number beyond all floats.

    >>> finite(2), finite(10**400)
    (True, False)
    """
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


_DEEPEST = 100  # layers or steps: each is a module of its own, and the published models have up to 3
_MOST = 2**63 - 1  # what torch takes as a size or a seed
# Every option's type, by an example of it.
_TYPES: dict[str, Any] = {
    **_COMMON,
    **{name: value for system in _SYSTEMS.values() for name, value in system.items() if value is not None},
    **dict.fromkeys(("num_epochs", "lr_update", "sim_dim", "sgr_step", "num_region", "vocab_size"), 1),
    **dict.fromkeys(("module_name", "cross_attn", "alignment", "agg_func", "raw_feature_norm"), ""),
    **dict.fromkeys(("lambda_softmax", "lambda_lse"), 1.0),
}
_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a finite number",
    str: "text",
    list: "a list of numbers",
}
# least, most, of which options
_RANGES: tuple[tuple[float, float, tuple[str, ...]], ...] = (
    (1, _MOST, ("num_epochs", "lr_update", "img_dim", "word_dim", "embed_size", "sim_dim", "num_region", "vocab_size")),
    (1, _DEEPEST, ("num_layers",)),
    (0, _DEEPEST, ("sgr_step", "graph_layers")),
    (0, _MOST, ("val_step", "seed", "batch_size", "vector_dim")),
    (0, math.inf, ("margin", "grad_clip")),
    (0, 1, ("mu1", "mu2")),
)
_POSITIVE = ("learning_rate", "lambda_softmax", "lambda_lse")
_LAYERS = ("granularities", "context_nodes")
