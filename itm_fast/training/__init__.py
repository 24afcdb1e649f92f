"""The published training recipe, and checkpoints in the published format."""

# ruff: noqa: F403, F405

from typing import TYPE_CHECKING

from .._lazy import lazy

if TYPE_CHECKING:
    from ._public import *

__all__ = ["Checkpoint", "Result", "learning_rate", "options", "rebuild", "train"]

__getattr__ = lazy(__name__, __all__)
