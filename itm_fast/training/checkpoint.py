"""Write checkpoints in the published format, which `itm_fast.models.checkpoint` describes and reads."""

from __future__ import annotations

import argparse
import collections
import io
import os
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .._files import atomic_write
from ..models.checkpoint import State
from ..models.torch_file import describe

LAST = "checkpoint.pth.tar"


def save(
    path: str | os.PathLike[str],
    *,
    epoch: int,
    model: Sequence[Mapping[str, Tensor]],
    best_rsum: float,
    opt: argparse.Namespace,
    iterations: int,
) -> None:
    """Write a checkpoint that the published code reads, whatever its torch version.

    The serialisation is the one from before torch 1.6, which torch 0.4.1 (SCAN's) and every later one read.
    The file is written completely or not at all: if the disk is full, an older file stays unchanged.

    Args:
        path: the file to write, in an existing folder.
        epoch: as `Checkpoint.epoch`.
        model: one state dict per part of the model.
        best_rsum: in percent.
        opt: options with plain values (text, numbers, booleans, None, lists of them); paths become text.
        iterations: optimiser steps taken.

    Raises:
        TypeError: an option's value is not plain.
        OSError: the file cannot be written.
    """
    content = {
        "epoch": int(epoch),
        "model": [_portable(state) for state in model],
        "best_rsum": float(best_rsum),
        "opt": argparse.Namespace(**{name: _plain(name, value) for name, value in vars(opt).items()}),
        "Eiters": int(iterations),
    }
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=False)
    with atomic_write(path, "wb") as file:
        file.write(buffer.getbuffer())


def _portable(state: Mapping[str, Tensor]) -> State:
    copy = collections.OrderedDict((name, value.detach().cpu()) for name, value in state.items())
    metadata = getattr(state, "_metadata", None)
    if metadata is not None:
        copy._metadata = metadata  # type: ignore[attr-defined]
    return copy


def _plain(name: str, value: object) -> object:
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        value = value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, (list, tuple)):
        return [_plain(name, item) for item in value]
    got = describe(value)
    raise TypeError(f"opt.{name} must be text, a number, a boolean, None or a list of them, got {got}")
