"""The published training recipe, and checkpoints in the published format."""

from .building import rebuild
from .checkpoint import Checkpoint
from .recipe import learning_rate, options
from .trainer import Result, train

__all__ = ["Checkpoint", "Result", "learning_rate", "options", "rebuild", "train"]
