"""Read files of `torch.save` without running code from them.

Such a file contains a pickle, which can call any function. It is loaded with `weights_only=True` and an exact
allow-list. Numpy scalars, which old files contain, are rebuilt by `_Dtype` and `_scalar` below, so that a file cannot
call numpy's functions either.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import pickle
import re
import struct
import tarfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._files import open_regular


def load_plain(path: Path, *, wanted: str, allowed: Sequence[Any] = ()) -> tuple[Any, bool]:
    """`torch.load(weights_only=True)` to the CPU, with exactly this allow-list and one sentence per failure.

    Args:
        path: the file.
        wanted: the end of the error messages, which says what the file should have been.
        allowed: the classes and functions that the file may name, as for `torch.serialization.add_safe_globals`.

    Returns:
        The content, and whether its text was decoded as latin1 (Python 2's raw bytes) and must be decoded again.

    Raises:
        OSError: the file cannot be opened, or is a folder, a FIFO, a socket or a device.
        ValueError: it is not a torch file, is damaged, or names something that is not allowed.
    """
    with open_regular(path) as file:
        head = file.read(512)
    reason: Exception | None = None
    # Python 2 wrote text as bytes, nearly always UTF-8. Its numpy numbers are raw bytes, which only latin1 keeps.
    for encoding in ("utf-8", "latin1"):
        try:
            with _exactly(allowed), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                content = torch.load(path, map_location="cpu", weights_only=True, encoding=encoding)
            return content, encoding == "latin1"
        except (OSError, MemoryError):
            raise
        except Exception as error:  # a damaged file may raise anything
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
    """Replaces `numpy.dtype`: keeps kind, width and byte order, and builds nothing."""

    def __init__(self, name: str, *_: object) -> None:
        self.name, self.order = str(name), "<"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = ">" if state[1] == ">" else "<"


_FORMATS = {
    "f8": "d", "f4": "f", "f2": "e", "b1": "?",
    "i8": "q", "i4": "i", "i2": "h", "i1": "b", "u8": "Q", "u4": "I", "u2": "H", "u1": "B",
}  # fmt: skip


def _scalar(dtype: _Dtype, data: bytes | str) -> float | int | bool:
    """Replaces numpy's `scalar`: turns the raw bytes of one number into a Python number."""
    if not isinstance(dtype, _Dtype) or dtype.name not in _FORMATS:
        raise pickle.UnpicklingError(f"a numpy scalar of type {getattr(dtype, 'name', dtype)!r}")
    try:
        raw = data.encode("latin1") if isinstance(data, str) else bytes(data)
        return struct.unpack(dtype.order + _FORMATS[dtype.name], raw)[0]
    except (UnicodeEncodeError, struct.error) as error:
        raise _BadNumber(str(error)) from None


ALLOWED = (
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
        f"({kind}: {type(reason).__name__} {detail[0].partition('. ')[0] if detail else ''})".replace(" )", ")")
    )


def describe(value: object) -> str:
    """Describe what a file holds, for an error message."""
    if isinstance(value, Mapping):
        if value and all(isinstance(item, Tensor) for item in value.values()):
            return f"a bare state dict of {len(value)} tensors (first {next(iter(value))!r})"
        names = [str(key) for key in value][:9]
        return "a dict of " + ", ".join(names[:8] + ["..."] * (len(names) > 8) or ["nothing"])
    if isinstance(value, Tensor):
        return f"one tensor {list(value.shape)}"
    return f"a {type(value).__name__}"
