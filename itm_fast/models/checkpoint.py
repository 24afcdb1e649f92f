"""Reading the published checkpoint format.

`model_best.pth.tar` of kuanghuei/SCAN and Paranioar/SGRAF is `torch.save` of a dict: epoch, model (a list of
state dicts), best_rsum, opt (an `argparse.Namespace`), Eiters. Repositories that build on them save two networks as
model_A and model_B, or leave out options that only training reads. Scoring needs only model and opt.
`itm_fast.training.checkpoint` writes such files.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .._files import path_of
from ._options import finite
from ._recognised import marked, recognised
from .torch_file import ALLOWED, describe, load_plain

State: TypeAlias = collections.OrderedDict[str, Tensor]
BEST = "model_best.pth.tar"
_WANTED = (
    "a checkpoint is the model_best.pth.tar that a published model or `itm-fast train` wrote: a dict with opt and "
    "model (or state_dict, or model_A and model_B)"
)


@dataclass(frozen=True)
class Checkpoint:
    """One network of a published checkpoint.

    Attributes:
        epoch: as in the file: SGRAF stores the number of finished epochs, SCAN the last epoch counted from 0. None if
            the file has none.
        model: state dicts, CPU tensors: image encoder, text encoder and, for SGRAF, similarity encoder.
        best_rsum: best sum of the six recalls on the dev split, in percent (at most 600), or None.
        opt: the options of the training run, under their published names.
        iterations: optimiser steps taken (`Eiters`), or None.
        path: the file.
        name: the network's name if the file holds two: "A" for `model_A`, "B" for `model_B`; else "".
    """

    epoch: int | None
    model: list[State]
    best_rsum: float | None
    opt: argparse.Namespace
    iterations: int | None
    path: str = ""
    name: str = ""

    @property
    def vocab_size(self) -> int:
        """Number of words that the text encoder embeds.

        Raises:
            ValueError: no part of the model has word embeddings.
        """
        for state in self.model:
            if "embed.weight" in state and state["embed.weight"].dim() == 2:
                return len(state["embed.weight"])
        raise ValueError(f"{self.path}: no part of the model has word embeddings (embed.weight)")


def load(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a published checkpoint: torch's zip or older format, written by Python 2 or 3, on CPU or GPU.

    Nothing in the file is executed; a file with anything but tensors, plain values and an `argparse.Namespace` is
    refused. Tensors are loaded to the CPU. The prefix `module.` that DataParallel adds to names is removed.

    Args:
        path: the file, for example `runs/f30k_SGR/checkpoint/model_best.pth.tar`, or its folder.

    Returns:
        The content, with every key checked.

    Raises:
        OSError: the file cannot be opened, or is a FIFO, a socket or a device.
        ValueError: it is not such a checkpoint, or holds two networks; the message says what was found and what was
            expected.

    >>> import argparse, tempfile, torch
    >>> states = [torch.nn.Linear(2, 3).state_dict(), torch.nn.Linear(3, 4).state_dict()]
    >>> file = tempfile.mkdtemp() + "/model_best.pth.tar"
    >>> opt = argparse.Namespace(cross_attn="t2i")
    >>> torch.save({"model": states, "opt": opt}, file)
    >>> load(file).opt.cross_attn
    't2i'
    """
    found = load_all(path)
    if len(found) > 1:
        names = ", ".join(one.name for one in found)
        raise ValueError(
            f"{path}: holds {len(found)} networks ({names}), whose scores are averaged; `load_all` reads them, and "
            "`itm-fast evaluate` takes them as members of an ensemble"
        )
    return found[0]


def load_all(path: str | os.PathLike[str]) -> list[Checkpoint]:
    """Read every network of a checkpoint: one, or two where the file holds `model_A` and `model_B`.

    Args and Raises: as `load`, but two networks are not an error.

    Returns:
        The networks in the order of their names.
    """
    path = _file(path_of("load", path))
    content, repair = load_plain(path, wanted=_WANTED, allowed=ALLOWED)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds {describe(content)}; {_WANTED}")
    networks = _networks(content)
    missing = [key for key, there in (("model", networks), ("opt", "opt" in content)) if not there]
    if missing:
        raise ValueError(f"{path}: holds {describe(content)} without {', '.join(missing)}; {_WANTED}")
    opt = _options(path, content["opt"], repair)
    epoch, best_rsum, iterations = (_number(content.get(key)) for key in ("epoch", "best_rsum", "Eiters"))
    return [
        Checkpoint(
            epoch=None if epoch is None else int(epoch),
            model=_state_dicts(path, key, content[key], opt),
            best_rsum=None if best_rsum is None else float(best_rsum),
            opt=opt,
            iterations=None if iterations is None else int(iterations),
            path=str(path),
            name=name,
        )
        for name, key in networks.items()
    ]


def _file(path: Path) -> Path:
    """The checkpoint file at a path; if this is a folder, its `model_best.pth.tar`.

    Raises:
        FileNotFoundError: the path does not exist.
        ValueError: the folder has no such file; the message says what it holds.
    """
    if not path.is_dir() or (path / BEST).is_file():
        return path / BEST if path.is_dir() else path
    names = sorted(entry.name for entry in path.iterdir())
    held = ", ".join(names[:8] + ["..."] * (len(names) > 8)) or "nothing"
    raise ValueError(f"{path}: is a folder without {BEST}; it holds {held}. Give the checkpoint file itself")


def _networks(content: Mapping[str, Any]) -> dict[str, str]:
    """Name of each network -> its key."""
    for key in ("model", "state_dict"):
        if key in content:
            return {"": key}
    prefix = "model_"
    keys = sorted(str(key) for key in content if str(key).startswith(prefix))
    return {key.removeprefix(prefix): key for key in keys if isinstance(content[key], (list, tuple, dict))}


def _number(value: object) -> float | None:
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_meta and not value.is_complex():
        value = value.item()
    return value if isinstance(value, (int, float)) and finite(value) else None


def _options(path: Path, opt: object, repair: bool) -> argparse.Namespace:
    values = vars(opt) if isinstance(opt, argparse.Namespace) else opt
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise ValueError(f"{path}: opt must be an argparse.Namespace or a dict, holds {describe(opt)}; {_WANTED}")
    return argparse.Namespace(**{name: _utf8(value) if repair else value for name, value in values.items()})


def _utf8(value: object) -> object:
    """Decode text as UTF-8 that was decoded as latin1."""
    if isinstance(value, str):
        with contextlib.suppress(UnicodeError):
            return value.encode("latin1").decode("utf-8")
    return value


def _state_dicts(path: Path, key: str, model: object, opt: argparse.Namespace) -> list[State]:
    option = marked(opt)
    try:
        kind = None if option is None else recognised(opt).model()
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if isinstance(model, dict) and kind is not None:
        model = _by_part(model, kind.parts, kind.scorer_without_name) or model
    if not isinstance(model, (list, tuple)) or not model:
        raise ValueError(f"{path}: {key} must be a list of state dicts, holds {describe(model)}; {_WANTED}")
    for position, state in enumerate(model):
        if not isinstance(state, dict) or not state or not all(isinstance(v, Tensor) for v in state.values()):
            raise ValueError(
                f"{path}: {key}[{position}] must be a state dict (names to tensors), holds {describe(state)}"
            )
        for name, value in state.items():
            if odd := _not_plain(value):
                where = f"{key}[{position}][{name!r}]"
                raise ValueError(f"{path}: {where} is {odd}; only dense tensors of numbers can be read")
    if kind is not None and len(model) != len(kind.parts):
        raise ValueError(
            f"{path}: opt.{option} says {kind.__name__}, whose model is {len(kind.parts)} state dicts, but the "
            f"file holds {len(model)}"
        )
    return [_without_prefix(state) for state in model]


def _by_part(model: dict[Any, Any], parts: Sequence[str], last_without_name: bool) -> list[Any] | None:
    """List the state dicts of a dict, or of one state dict whose names begin with the parts' names; None for others.

    `last_without_name`: names that begin with no part's name are those of the last part.
    """
    if set(model) == set(parts):
        return [model[part] for part in parts]
    if not all(isinstance(name, str) for name in model):
        return None
    model = _without_prefix(model)
    states: dict[str, State] = {part: collections.OrderedDict() for part in parts}
    for name, value in model.items():
        part, _, rest = name.partition(".")
        if part not in states and last_without_name:
            part, rest = parts[-1], name
        if part not in states:
            return None
        states[part][rest] = value
    return list(states.values())


def _not_plain(value: Tensor) -> str | None:
    if value.is_meta:
        return "a tensor on the meta device, without values"
    if value.layout != torch.strided or value.is_nested:
        return "a sparse or nested tensor"
    if value.is_quantized:
        return "a quantised tensor"
    if value.is_complex():
        return "a complex tensor"
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        return f"a tensor of shape {list(value.shape)} of which the file holds a part"
    return None


def _without_prefix(state: dict[str, Tensor]) -> State:
    named = collections.OrderedDict(state)
    metadata = getattr(state, "_metadata", None)
    if all(str(name).startswith("module.") for name in named):
        cut = len("module.")
        named = collections.OrderedDict((name[cut:], value) for name, value in named.items())
        if isinstance(metadata, Mapping):
            metadata = {name[cut:] if name.startswith("module.") else name: v for name, v in metadata.items()}
    if isinstance(metadata, Mapping):
        # BatchNorm reads its version from here: files from before torch 0.4.1 have no num_batches_tracked.
        named._metadata = metadata  # type: ignore[attr-defined]
    return named
