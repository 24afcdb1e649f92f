"""What `itm_fast.training` offers."""

# ruff: noqa: F401

from ..models._building import rebuild
from ..models.checkpoint import Checkpoint
from .loop import Result
from .recipe import learning_rate, options
from .trainer import train
