"""The published training recipes as options under their published names."""

from __future__ import annotations

import argparse
from typing import Any

from ..models._catalogue import CATALOGUE, RECIPES
from ..models._recognised import check

# The options that training reads in addition to those of the model.
TRAINING = ("num_epochs", "lr_update", "batch_size", "seed", "exclude_same_image", "val_step", "data_name")


def options(model: str, *, recipe: str = "f30k", direction: str | None = None, **changes: Any) -> argparse.Namespace:
    """The options of one published training run.

    Args:
        model: "sgr", "saf" (SGRAF's two halves), "scan", "shan", "hgan" and "tshsr" (reconstructed from their
            abstracts, with SGRAF's schedules), or "dual" (the plain dual encoder).
        recipe: "f30k" or "coco": epochs, schedule, SCAN's learning rate and temperatures for that data set.
        direction: SCAN's `cross_attn`, "t2i" (words attend to regions; the default) or "i2t"; SHAN's `alignment`,
            "full" (the default), "t2i" or "i2t"; the other models ignore it.
        **changes: other values for options, by their published names; None keeps the published value.

    Returns:
        The options that `itm_fast.models.build` and `itm_fast.training.train` take.

    Raises:
        ValueError: an unknown model, recipe, direction or option name.

    >>> opt = options("scan", recipe="coco", direction="i2t", batch_size=32)
    >>> opt.num_epochs, opt.lr_update, opt.learning_rate, opt.lambda_softmax, opt.lambda_lse, opt.batch_size
    (20, 10, 0.0005, 4.0, 20.0, 32)
    """
    row = CATALOGUE.get(model)
    directions = row.directions if row is not None else ()
    if direction is None and directions:
        direction = directions[0]
    for name, value, known in (
        ("model", model, tuple(CATALOGUE)),
        ("recipe", recipe, tuple(RECIPES)),
        ("direction", direction, directions),
    ):
        if known and value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    chosen = CATALOGUE[model].published(recipe, direction)
    unknown = [name for name in changes if name not in chosen]
    if unknown:
        raise ValueError(f"{model} has no option {', '.join(unknown)}; its options are {', '.join(sorted(chosen))}")
    chosen.update({name: value for name, value in changes.items() if value is not None})
    check(chosen)
    return argparse.Namespace(**chosen)


def learning_rate(opt: argparse.Namespace, epoch: int) -> float:
    """The learning rate of one epoch: it is divided by 10 after every `lr_update` epochs.

    Args:
        opt: with `learning_rate` and `lr_update`.
        epoch: 0, 1, ...

    >>> opt = options("saf")
    >>> [learning_rate(opt, epoch) == expected for epoch, expected in ((19, 2e-4), (20, 2e-4 * 0.1))]
    [True, True]
    """
    return opt.learning_rate * (0.1 ** (epoch // opt.lr_update))
