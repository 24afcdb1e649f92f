"""The published checkpoint format, read without running anything the file brings along.

`model_best.pth.tar` of kuanghuei/SCAN and Paranioar/SGRAF is `torch.save` of a dict: epoch, model (a list of
state dicts), best_rsum, opt (an `argparse.Namespace`), Eiters. Such a file is a pickle, and a pickle is a
program. It is read with `weights_only=True` and an exact allow-list; the numpy scalars that old files hold
are rebuilt by the two small stand-ins below, so that not even numpy's functions are called from a file.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import io
import math
import os
import pickle
import re
import struct
import tarfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .._files import atomic_write
from ..models import model_class

State: TypeAlias = collections.OrderedDict[str, Tensor]
_KEYS = ("epoch", "model", "best_rsum", "opt", "Eiters")
_WANTED = "a checkpoint is the model_best.pth.tar that SCAN, SGRAF or `itm-fast train` wrote: a dict of " + ", ".join(
    _KEYS
)


@dataclass(frozen=True)
class Checkpoint:
    """What a published checkpoint holds.

    Attributes:
        epoch: as the file has it; SGRAF counts finished epochs, SCAN writes the 0-based last one.
        model: state dicts, CPU tensors: image encoder, text encoder and, for SGRAF, similarity encoder.
        best_rsum: best sum of the six recalls on the dev split, in percent (at most 600).
        opt: the options of the training run, under their published names.
        iterations: optimiser steps taken (`Eiters`).
    """

    epoch: int
    model: list[State]
    best_rsum: float
    opt: argparse.Namespace
    iterations: int


def load(path: str | os.PathLike[str]) -> Checkpoint:
    """Read an original checkpoint, zip or older, written by Python 2 or 3, on CPU or GPU.

    Nothing in the file is executed: all but tensors, plain values and an `argparse.Namespace` is refused.
    Tensors come to the CPU; a `module.` prefix left by DataParallel is dropped from the names.

    Args:
        path: the file, for example `runs/f30k_SGR/checkpoint/model_best.pth.tar`.

    Returns:
        the content, checked key by key.

    Raises:
        FileNotFoundError, IsADirectoryError, PermissionError: the file cannot be opened.
        ValueError: it is no such checkpoint; the sentence names what was found and what was expected.

    >>> import argparse, tempfile, torch
    >>> states = [torch.nn.Linear(2, 3).state_dict(), torch.nn.Linear(3, 4).state_dict()]
    >>> file = tempfile.mkdtemp() + "/model_best.pth.tar"
    >>> opt = argparse.Namespace(cross_attn="t2i")
    >>> save(file, epoch=0, model=states, best_rsum=412.5, opt=opt, iterations=9)
    >>> load(file).opt.cross_attn
    't2i'
    """
    path = Path(path)
    content, repair = load_plain(path, wanted=_WANTED, allowed=_ALLOWED)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds {_describe(content)}; {_WANTED}")
    missing = [key for key in _KEYS if key not in content]
    if missing:
        raise ValueError(f"{path}: holds {_describe(content)} without {', '.join(missing)}; {_WANTED}")
    opt = _options(path, content["opt"], repair)
    return Checkpoint(
        epoch=int(_number(path, "epoch", content["epoch"])),
        model=_state_dicts(path, content["model"], opt),
        best_rsum=float(_number(path, "best_rsum", content["best_rsum"])),
        opt=opt,
        iterations=int(_number(path, "Eiters", content["Eiters"])),
    )


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
    The file appears whole or not at all: when the disk is full, an older file of that name stays as it was.

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


def load_plain(path: Path, *, wanted: str, allowed: Sequence[Any] = ()) -> tuple[Any, bool]:
    """`torch.load(weights_only=True)` to the CPU, with exactly this allow-list and one sentence per failure.

    Args:
        path: the file.
        wanted: half a sentence that ends the messages: what the file should have been.
        allowed: what the file may name, as `torch.serialization.add_safe_globals` takes it.

    Returns:
        the content, and whether its text was read as latin1 (raw bytes of Python 2) and needs repair.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is not a torch file, is damaged, or wants something that is not allowed.
    """
    with open(path, "rb") as file:  # what cannot be opened ends here, with Python's own sentence
        head = file.read(512)
    reason: Exception | None = None
    # Python 2's text is bytes: nearly all of it UTF-8, its numpy numbers raw bytes, which latin1 keeps.
    for encoding in ("utf-8", "latin1"):
        try:
            with _exactly(allowed), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                content = torch.load(path, map_location="cpu", weights_only=True, encoding=encoding)
            return content, encoding == "latin1"
        except (OSError, MemoryError):
            raise
        except Exception as error:  # the bytes decide what is raised: any type is possible
            reason = error
            if not isinstance(error, (UnicodeDecodeError, _BadNumber)):
                break
    raise ValueError(f"{path}: {_diagnosis(path, head, reason)}; {wanted}") from None


@contextlib.contextmanager
def _exactly(allowed: Sequence[Any]) -> Iterator[None]:
    before = list(torch.serialization.get_safe_globals())
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(list(allowed))
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


class _BadNumber(ValueError):
    """A numpy scalar whose bytes do not fit its type under this text encoding."""


class _Dtype:
    """Stands in for `numpy.dtype`: remembers kind, width and byte order, builds nothing."""

    def __init__(self, name: str, *_: object) -> None:
        self.name, self.order = str(name), "<"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = ">" if state[1] == ">" else "<"


_FORMATS = {
    "f8": "d", "f4": "f", "f2": "e", "b1": "?",
    "i8": "q", "i4": "i", "i2": "h", "i1": "b", "u8": "Q", "u4": "I", "u2": "H", "u1": "B",
}  # fmt: skip


def _scalar(dtype: _Dtype, data: bytes | str) -> float | int | bool:
    """Stands in for numpy's `scalar`: raw bytes of one number to a Python number."""
    if not isinstance(dtype, _Dtype) or dtype.name not in _FORMATS:
        raise pickle.UnpicklingError(f"a numpy scalar of type {getattr(dtype, 'name', dtype)!r}")
    try:
        raw = data.encode("latin1") if isinstance(data, str) else bytes(data)
        return struct.unpack(dtype.order + _FORMATS[dtype.name], raw)[0]
    except (UnicodeEncodeError, struct.error) as error:
        raise _BadNumber(str(error)) from None


_ALLOWED = (
    argparse.Namespace,
    collections.OrderedDict,
    (_Dtype, "numpy.dtype"),
    (_scalar, "numpy.core.multiarray.scalar"),
    (_scalar, "numpy._core.multiarray.scalar"),
)


def _diagnosis(path: Path, head: bytes, reason: Exception | None) -> str:
    message = str(reason)
    unwanted = re.search(r"GLOBAL (\S+) was not an allowed|unsupported GLOBAL (\S+) whose module", message)
    if unwanted:
        name = unwanted.group(1) or unwanted.group(2)
        return f"refused, because it would run or build {name!r}, which no such checkpoint needs"
    if not head:
        return "is an empty file"
    if head.lstrip()[:1] == b"<":
        return "is a web page, not the download itself (fetch the file again in a browser)"
    if head.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the file itself (run `git lfs pull`)"
    if head.startswith(b"\x1f\x8b"):
        return "is a gzip file (unpack it first)"
    if tarfile.is_tarfile(path):
        return "is a tar archive (unpack it first; the name .pth.tar of the published files means no archive)"
    if "TorchScript" in message:
        return "is a TorchScript archive"
    kind = "zip" if head.startswith(b"PK") else "pickle"
    detail = message.split("WeightsUnpickler error:")[-1].strip().splitlines()
    return (
        f"cannot be read as a torch file; it is damaged, cut short or something else "
        f"({kind}: {type(reason).__name__} {detail[0] if detail else ''})".replace(" )", ")")
    )


def _describe(value: object) -> str:
    if isinstance(value, Mapping):
        if value and all(isinstance(item, Tensor) for item in value.values()):
            return f"a bare state dict of {len(value)} tensors (first {next(iter(value))!r})"
        names = [str(key) for key in value][:9]
        return "a dict of " + ", ".join(names[:8] + ["..."] * (len(names) > 8) or ["nothing"])
    if isinstance(value, Tensor):
        return f"one tensor {list(value.shape)}"
    return f"a {type(value).__name__}"


def _number(path: Path, key: str, value: object) -> float:
    if isinstance(value, Tensor) and value.numel() == 1:
        return float(value)
    if isinstance(value, (int, float)) and math.isfinite(value):
        return value
    raise ValueError(f"{path}: {key} must be a finite number, holds {_describe(value)}; {_WANTED}")


def _options(path: Path, opt: object, repair: bool) -> argparse.Namespace:
    if not isinstance(opt, argparse.Namespace):
        raise ValueError(f"{path}: opt must be an argparse.Namespace, holds {_describe(opt)}; {_WANTED}")
    values = vars(opt).items()
    return argparse.Namespace(**{name: _utf8(value) if repair else value for name, value in values})


def _utf8(value: object) -> object:
    """UTF-8 that was read as latin1, put right."""
    if isinstance(value, str):
        with contextlib.suppress(UnicodeError):
            return value.encode("latin1").decode("utf-8")
    return value


def _state_dicts(path: Path, model: object, opt: argparse.Namespace) -> list[State]:
    if not isinstance(model, (list, tuple)) or not model:
        raise ValueError(f"{path}: model must be a list of state dicts, holds {_describe(model)}; {_WANTED}")
    states = []
    for position, state in enumerate(model):
        if not isinstance(state, dict) or not state or not all(isinstance(v, Tensor) for v in state.values()):
            raise ValueError(
                f"{path}: model[{position}] must be a state dict (names to tensors), holds {_describe(state)}"
            )
        states.append(_without_prefix(state))
    option = next((name for name in ("system", "module_name", "cross_attn") if hasattr(opt, name)), None)
    if option is not None:
        kind = model_class(opt)
        if len(states) != len(kind.parts):
            raise ValueError(
                f"{path}: opt.{option} says {kind.__name__}, whose model is {len(kind.parts)} state dicts, but the "
                f"file holds {len(states)}"
            )
    return states


def _without_prefix(state: dict[str, Tensor]) -> State:
    named = collections.OrderedDict(state)
    metadata = getattr(state, "_metadata", None)
    if all(str(name).startswith("module.") for name in named):
        cut = len("module.")
        named = collections.OrderedDict((name[cut:], value) for name, value in named.items())
        if isinstance(metadata, Mapping):
            metadata = {name[cut:] if name.startswith("module.") else name: v for name, v in metadata.items()}
    if isinstance(metadata, Mapping):
        # BatchNorm reads its version here to know that a file from before torch 0.4.1 has no batch counter.
        named._metadata = metadata  # type: ignore[attr-defined]
    return named


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
    got = _describe(value)
    raise TypeError(f"opt.{name} must be text, a number, a boolean, None or a list of them, got {got}")
