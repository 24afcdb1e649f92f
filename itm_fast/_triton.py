"""Whether the Triton kernels can run on a device."""

from __future__ import annotations

import functools
import importlib
import os

import torch

from ._nvidia import NO_FLOAT64
from ._nvidia import why_not as too_old

REGIONS = 128  # the most regions of an image in hierarchical_alignment_score: its largest tile
LEAST = (8, 0)  # least compute capability: it brought bfloat16 and TF32 products and asynchronous copies
_TRUE = ("1", "true", "yes", "on", "y")  # values that Triton reads as true in its environment variables


def interpreted() -> bool:
    """Whether Triton interprets its kernels: on any device, but far more slowly than compiled ones."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in _TRUE


def why_not(device: torch.device, dtype: torch.dtype | None) -> str | None:
    """None if Triton can run on the device in this dtype, else one sentence that says what is missing."""
    if device.type != "cuda" and not (device.type == "cpu" and interpreted()):
        return f"needs CUDA tensors, got {device.type}"
    if dtype == torch.float64:
        return NO_FLOAT64
    if problem := _unusable():
        return problem
    return None if interpreted() else too_old(device, LEAST)


@functools.cache
def _unusable() -> str | None:
    try:
        importlib.import_module("triton")
    except ModuleNotFoundError as error:
        if error.name == "triton":
            return "triton is not installed; `pip install triton`"
        return f"triton does not import: {error}"
    except Exception as error:  # a package built for another Python or torch may raise anything
        return f"triton does not import: {type(error).__name__}: {error}"
    return None
