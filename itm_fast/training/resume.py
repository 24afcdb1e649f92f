"""`resume.pt`, from which an interrupted run continues as if it had not been interrupted."""

from __future__ import annotations

import argparse
import io
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._files import atomic_write
from ..models import model_class
from ..models._options import finite
from ..models.torch_file import describe, load_plain
from .recipe import TRAINING

NAME = "resume.pt"
LEARNED = "learned"
_FORMAT = "itm-fast resume 1"
_KINDS: dict[str, Any] = {  # attribute of `Progress` -> its type
    **dict.fromkeys(("options", "arguments", "optimizer", "rng"), dict),
    **dict.fromkeys(("data", "model"), list),
    **dict.fromkeys(("epoch", "step", "iterations"), int),
    "best_rsum": (float, int, type(None)),
    "best_epoch": (int, type(None)),
}


@dataclass
class Progress:
    """The state of a training run.

    Attributes:
        options: the run's options, by their published names; under `LEARNED` those that training has changed, if any.
        arguments: plain values that the caller of `train` wants back, such as paths and names of splits.
        data: how many captions and images the training split has, then checksums (`setup.identity`) of the training
            and the dev split, then of the boxes of both (`setup.boxes_identity`), so that a run is not resumed with
            other data. Files of older versions have only the two counts, or no boxes.
        epoch: finished epochs.
        step: batches done in the current epoch; all of them if only its validation is missing.
        iterations: optimiser steps so far.
        best_rsum, best_epoch: the best validation so far; None before the first.
        model, optimizer: state dicts.
        rng: states of torch's random generators: "cpu", and under "cuda" one per CUDA device.
    """

    options: dict[str, Any]
    arguments: dict[str, Any]
    data: list[Any]
    epoch: int
    step: int
    iterations: int
    best_rsum: float | None
    best_epoch: int | None
    model: list[dict[str, Tensor]]
    optimizer: dict[str, Any]
    rng: dict[str, Any]


def save(folder: Path, progress: Progress) -> None:
    """Write `folder/resume.pt`, completely or not at all.

    Raises:
        OSError: it cannot be written; an older file is unchanged.
    """
    buffer = io.BytesIO()
    content = {field.name: getattr(progress, field.name) for field in fields(progress)}
    torch.save({"format": _FORMAT, **content}, buffer)
    with atomic_write(folder / NAME, "wb") as file:
        file.write(buffer.getbuffer())


def require(folder: Path) -> Path:
    """The path of `folder/resume.pt`.

    Raises:
        FileNotFoundError: there is none.
    """
    path = folder / NAME
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist, so there is no run to resume; leave --resume out to start one")
    return path


def load(folder: Path) -> Progress:
    """Read `folder/resume.pt`; code in the file is never run.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged or another kind of file; the message names the parts that are missing or wrong.
    """
    path = require(folder)
    content, _ = load_plain(path, wanted="it should be the resume file that an interrupted training run wrote")
    if not isinstance(content, dict) or content.pop("format", None) != _FORMAT:
        raise ValueError(f"{path} is not a resume file of this version of itm-fast")
    odd = [
        f"{name} of {describe(content[name])}" if name in content else f"no {name}"
        for name, kind in _KINDS.items()
        if not isinstance(content.get(name, _KINDS), kind)
    ]
    if not odd:
        options = content["options"]
        try:
            wanted = (*model_class(argparse.Namespace(**options)).reads(), *TRAINING)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: its options describe no known model: {error}") from error
        odd = [f"no option {name}" for name in wanted if name not in options]
    best = content.get("best_rsum")
    if not odd and best is not None and not finite(best):
        odd = ["a best_rsum that is no finite number"]
    if odd:
        raise ValueError(f"{path} is not a complete resume file: it holds {', '.join(odd)}; start in another folder")
    return Progress(**{name: content[name] for name in _KINDS})


def random_state() -> dict[str, Any]:
    """The states of torch's global random generators."""
    return {
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict[str, Any], device: torch.device, alone: bool = True) -> None:
    """Restore the generators; those of CUDA only if there are as many CUDA devices as when they were saved.

    Args:
        state: as `random_state` returned it.
        device: where this process computes.
        alone: False if several processes train together. All their generators are in the same state, which the process
            of rank 0 saved as that of its own device, the first.
    """
    torch.set_rng_state(state["cpu"])
    if not alone:
        if device.type == "cuda" and state["cuda"]:
            torch.cuda.set_rng_state(state["cuda"][0], device)
    elif state["cuda"] and torch.cuda.is_available() and torch.cuda.device_count() == len(state["cuda"]):
        torch.cuda.set_rng_state_all(state["cuda"])
