"""Options under their published names: the default, the line of help and the range of each, and those of every model.

Needs no torch, so that `itm-fast train --help` and mistaken options are answered at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

DEEPEST = 100  # layers or steps, each a module of its own (the published models have up to 3), and numbers of a list
MOST = 2**63 - 1  # what torch takes as a size or a seed
_KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a finite number",
    str: "text",
    list: "a list of numbers",
}


@dataclass(frozen=True)
class Option:
    """One option of a model or of its training.

    Attributes:
        default: the published value. Other values must be of its type; any may be given where it is None.
        help: what `itm-fast train --help` says of it; None: the command line does not offer it.
        metavar: what stands for its value there.
        flag: what the command line calls it, where that is not its own name.
        choices: the texts that it may be; empty for any.
        least: the least number that it may be.
        most: the largest.
        above: a number that it must be more than.
        count: how many numbers a list has; None for any.
    """

    default: Any
    help: str | None = None
    metavar: str | None = None
    flag: str | None = None
    choices: tuple[str, ...] = ()
    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf
    count: int | None = None

    def check(self, name: str, value: object) -> None:
        """Refuse a value of another type, one that is not finite, or one out of the range.

        Args:
            name: what the message calls the option.
            value: any.

        Raises:
            ValueError: says what it must be.

        >>> Option(256, least=1).check("sim_dim", 0)
        Traceback (most recent call last):
        ValueError: sim_dim must be at least 1, got 0
        """
        if self.default is not None and not _fits(value, self.default):
            raise ValueError(f"{name} must be {_KINDS[type(self.default)]}, got {value!r}")
        if isinstance(value, (list, tuple)) and len(value) > DEEPEST:
            raise ValueError(f"{name} must be at most {DEEPEST} numbers, got {len(value)}")
        if self.default is None or not isinstance(value, (int, float)):
            return
        if value < self.least:
            raise ValueError(f"{name} must be at least {self.least}, got {value}")
        if value > self.most:
            raise ValueError(f"{name} must be at most {self.most}, got {value}")
        if not value > self.above:
            raise ValueError(f"{name} must be more than {self.above}, got {value}")


def size(default: int, help: str | None = None, metavar: str | None = None, **more: Any) -> Option:
    """An option that is a size: a whole number of at least 1."""
    return Option(default, help, metavar, least=1, most=MOST, **more)


def finite(value: float) -> bool:
    """Whether a number is finite as a float: no infinity, no NaN, and no whole number beyond all floats.

    >>> finite(2), finite(10**400)
    (True, False)
    """
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


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


# What training reads.
TRAINING = {
    "num_epochs": size(30, "", "N", flag="epochs"),
    "lr_update": size(20, "epochs between cuts of the learning rate to a tenth", "N"),
    "learning_rate": Option(2e-4, "learning rate of the first epoch", "LR", "lr", above=0),
    "batch_size": Option(
        128, "captions per batch, each with its image; 2 or more: negatives are in the batch", "N", least=2, most=MOST
    ),
    "margin": Option(0.2, "margin of the ranking loss", least=0),
    "max_violation": Option(True, "the hardest negative counts alone (default), or all do"),
    "exclude_same_image": Option(
        False, "other captions of an image are no negatives to it (published, and default: they are)"
    ),
    "grad_clip": Option(2.0, "gradients of a larger norm are scaled down to this one; 0: none is", "NORM", least=0),
    "val_step": Option(0, "also validate every N steps, for the log alone", "N", least=0, most=MOST),
    "seed": Option(0, "random seed of weights, dropout and data order (default 0)", least=0, most=MOST),
}
# What the encoders of every model read.
ENCODERS = {
    "embed_size": size(1024, "joint embedding", "D"),
    "word_dim": size(300, "word embedding", "N"),
    "num_layers": Option(1, "layers of the GRU", "N", least=1, most=DEEPEST),
    "bi_gru": Option(True, "bidirectional GRU (default) or one-way"),
    "no_imgnorm": Option(False, "unit-length regions (default) or as they come", flag="imgnorm"),
    "no_txtnorm": Option(False, "unit-length words (default) or as they come", flag="txtnorm"),
}
# What follows from the data, and what only the published scripts read.
OTHERS = {
    "img_dim": size(2048),
    "workers": Option(1),
    "log_step": Option(1),
    "data_path": Option("."),
    "data_name": Option("data"),
}
COMMON = {**TRAINING, **ENCODERS, **OTHERS}
# What a checkpoint has where it differs from what is usual, or by which a model is recognised.
MARKS = {
    "num_region": size(36),
    "vocab_size": size(1),
    **dict.fromkeys(("system", "module_name", "cross_attn", "alignment"), Option("")),
}
