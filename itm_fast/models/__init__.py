"""Models with the names, arguments and state_dict keys of their papers: `scan`, `sgraf` and models that build on them.

`load` returns a trained model from a checkpoint file, `build` a new model from its options, `scorer` a model's pair
scorer alone.

>>> from itm_fast.data.openclipart import CHECKPOINTS
>>> from itm_fast.models import load
>>> load(CHECKPOINTS["scan"]).name
'SCAN t2i'
"""

# ruff: noqa: F403, F405

from typing import TYPE_CHECKING

from .._lazy import lazy
from ._catalogue import CATALOGUE

if TYPE_CHECKING:
    from ._public import *

__all__ = [
    "BFAN",
    "CHAN",
    "CMCAN",
    "HGAN",
    "IMRAM",
    "NAAF",
    "RCAR",
    "SCAN",
    "SGRAF",
    "SHAN",
    "TSHSR",
    "DualEncoder",
    "Loaded",
    "Matcher",
    "MaxSim",
    "attention",
    "build",
    "load",
    "model_class",
    "scorer",
]

_PARTS = ("checkpoint", *dict.fromkeys(row.home.partition(":")[0] for row in CATALOGUE.values()))

__getattr__ = lazy(__name__, __all__, _PARTS)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_PARTS})
