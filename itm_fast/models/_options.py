"""Options under their published names, each with default, help and range, and the options that all models share.

This module does not import torch, so that `itm-fast train --help` and errors in options appear at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

DEEPEST = 100  # most layers or steps, each a module (published models have up to 3), and most numbers of a list
MOST = 2**63 - 1  # the largest size and seed that torch takes
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
        default: the published value. All values must have its type; if it is None, any type.
        help: its text in `itm-fast train --help`; None: the command line does not have it.
        metavar: the placeholder of its value there.
        flag: its name on the command line, if that is not the published one.
        choices: the texts that are allowed; empty: any.
        least: the smallest number that is allowed.
        most: the largest number that is allowed.
        above: the value must be more than this number.
        count: how many numbers a list must have; None: any.
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
            name: the option's name in the message.
            value: the value to check.

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
    """Whether a number is finite as a float: not infinite, not NaN, and not an int that is too large for a float.

    >>> finite(2), finite(10**400)
    (True, False)
    """
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _fits(value: object, wanted: object) -> bool:
    """Whether a value has the type of `wanted`; an int is also a float, and 0 and 1 are bools."""
    if isinstance(wanted, bool):
        return isinstance(value, int) and value in (0, 1)
    if isinstance(wanted, list):
        return isinstance(value, (list, tuple)) and all(_fits(item, wanted[0]) for item in value)
    if isinstance(wanted, str):
        return isinstance(value, str)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return isinstance(value, int) if isinstance(wanted, int) else finite(value)


# Options that training reads.
TRAINING = {
    "num_epochs": size(30, "how often training passes over all captions", "N", flag="epochs"),
    "lr_update": size(20, "divide the learning rate by 10 every N epochs", "N"),
    "learning_rate": Option(2e-4, "learning rate of the first epoch", "LR", "lr", above=0),
    "batch_size": Option(
        128,
        "captions per batch, with their images; at least 2, as negatives come from the batch",
        "N",
        least=2,
        most=MOST,
    ),
    "margin": Option(0.2, "margin of the ranking loss", least=0),
    "max_violation": Option(True, "only the hardest negative counts (default), or all do"),
    "exclude_same_image": Option(
        False, "other captions of an image are not its negatives (default, and published: they are)"
    ),
    "grad_clip": Option(2.0, "scale larger gradients down to this norm; 0: no clipping", "NORM", least=0),
    "val_step": Option(0, "also validate every N steps, only for the log (default 0: never)", "N", least=0, most=MOST),
    "seed": Option(0, "random seed of weights, dropout and data order (default 0)", least=0, most=MOST),
}
# Options that the encoders of every model read.
ENCODERS = {
    "embed_size": size(1024, "size of the joint embedding", "D"),
    "word_dim": size(300, "size of the word embeddings", "N"),
    "num_layers": Option(1, "number of GRU layers", "N", least=1, most=DEEPEST),
    "bi_gru": Option(True, "bidirectional GRU (default) or one-way"),
    "no_imgnorm": Option(False, "scale regions to unit length (default), or not", flag="imgnorm"),
    "no_txtnorm": Option(False, "scale words to unit length (default), or not", flag="txtnorm"),
}
# Options that follow from the data, and those that only the published scripts read.
OTHERS = {
    "img_dim": size(2048),
    "workers": Option(1),
    "log_step": Option(1),
    "data_path": Option("."),
    "data_name": Option("data"),
}
COMMON = {**TRAINING, **ENCODERS, **OTHERS}
# Options that only checkpoints have: sizes that depend on the data, and the options that say which model it is.
MARKS = {
    "num_region": size(36),
    "vocab_size": size(1),
    **dict.fromkeys(("system", "module_name", "cross_attn", "alignment", "attn_type"), Option("")),
}
