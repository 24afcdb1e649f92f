"""Whether there is memory for the model that options describe."""

from __future__ import annotations

import argparse

import torch

from ..evaluation.memory import GB, available_bytes
from ..models._building import outline


def affordable(opt: argparse.Namespace, device: torch.device) -> None:
    """Refuse options whose model cannot be trained in the memory that is free, before it is built.

    Raises:
        ValueError: says how much is needed and how much there is; or as `outline`.
    """
    weights = sum(p.numel() * p.element_size() for p in outline(opt).params)
    needed, free = 4 * weights, available_bytes(device)  # weights, their gradients, and Adam's two moments
    if needed > free:
        raise ValueError(
            f"these options describe a model that takes {needed / GB:,.1f} GB to train, and {free / GB:,.1f} GB are "
            f"free on {device}; choose smaller sizes"
        )
