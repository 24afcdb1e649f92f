"""What `itm_fast.training` offers."""

# ruff: noqa: F401

from .building import rebuild
from .checkpoint import Checkpoint
from .recipe import learning_rate, options
from .trainer import Result, train
