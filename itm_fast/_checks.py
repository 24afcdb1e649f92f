"""Shape, dtype and device checks with one message format, traceable by torch.compile."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def matmul_precision() -> str:
    """What float32 matrix products may be made of, in torch's words: "highest", "high" (TF32) or "medium" (bfloat16).

    torch refuses to tell once its newer switches, torch.backends.*.fp32_precision, have been set; TF32 is then what the
    one for CUDA's matrix products says.
    """
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return "high" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "highest"


class Arguments:
    """Checks an op's tensors against letters such as "I R D"; a letter must mean one size throughout.

    >>> check = Arguments("cross_attention_score")
    >>> check.floats(image=(torch.zeros(2, 3, 8), "I R D"), words=(torch.zeros(5, 9), "N D"))
    Traceback (most recent call last):
    ValueError: cross_attention_score: words must be [N, D] with D = 8 as in image, got [5, 9]
    """

    def __init__(self, op: str) -> None:
        self.op = op
        self.size: dict[str, tuple[int, str]] = {}
        self.first: tuple[str, Tensor] | None = None

    def shape(self, name: str, tensor: Tensor, letters: str) -> None:
        want = letters.split()
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{self.op}: {name} must be a tensor, got {type(tensor).__name__}")
        if tensor.dim() != len(want):
            raise ValueError(f"{self.op}: {name} must be [{', '.join(want)}], got {list(tensor.shape)}")
        for letter, n in zip(want, tensor.shape, strict=True):
            known = int(letter) if letter.isdigit() else self.size[letter][0] if letter in self.size else None
            if known is not None and n != known:
                where = f" with {letter} = {known} as in {self.size[letter][1]}" if letter in self.size else ""
                raise ValueError(f"{self.op}: {name} must be [{', '.join(want)}]{where}, got {list(tensor.shape)}")
            if known is None:
                self.size[letter] = (n, name)
            if n == 0 and letter in ("R", "D", "S", "T+1"):
                raise ValueError(
                    f"{self.op}: {name} must be [{', '.join(want)}] with {letter} > 0, got {list(tensor.shape)}"
                )

    def floats(self, **tensors: tuple[Tensor, str]) -> None:
        """Floating-point tensors, all of one dtype and on one device."""
        for name, (tensor, letters) in tensors.items():
            self.shape(name, tensor, letters)
            if tensor.dtype not in FLOATS:
                raise TypeError(f"{self.op}: {name} must be float64, float32, float16 or bfloat16, got {tensor.dtype}")
            if self.first is None:
                self.first = (name, tensor)
            first_name, first = self.first
            if not _autocast_unites(tensor, first):
                raise TypeError(
                    f"{self.op}: {name} and {first_name} must have one dtype, got {tensor.dtype} and {first.dtype}"
                )
            self._same_device(name, tensor)

    def integers(self, name: str, tensor: Tensor, letters: str) -> None:
        self.shape(name, tensor, letters)
        if tensor.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{self.op}: {name} must be int32 or int64, got {tensor.dtype}")
        self._same_device(name, tensor)

    def choice(self, name: str, value: str, known: Sequence[str]) -> None:
        if value not in known:
            raise ValueError(f"{self.op}: {name} must be one of {', '.join(known)}, got {value!r}")

    def positive(self, name: str, value: float) -> None:
        if not 0 < value < float("inf"):
            raise ValueError(f"{self.op}: {name} must be more than 0 and finite, got {value}")

    def _same_device(self, name: str, tensor: Tensor) -> None:
        if self.first is not None and tensor.device != self.first[1].device:
            raise ValueError(
                f"{self.op}: {name} and {self.first[0]} must be on one device, "
                f"got {tensor.device} and {self.first[1].device}"
            )


def _autocast_unites(a: Tensor, b: Tensor) -> bool:
    """One dtype already, or two that `autocast` makes one."""
    narrowed = torch.float64 not in (a.dtype, b.dtype) and torch.is_autocast_enabled(a.device.type)
    return a.dtype == b.dtype or narrowed


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under torch.autocast, float tensors in its dtype; outside it, as they came. float64 is never narrowed."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if t.dtype in FLOATS and t.dtype != torch.float64 else t for t in tensors)


def work_dtype(tensor: Tensor) -> torch.dtype:
    """What sums over a tensor are kept in: float32, or float64 where the tensor is; half precision never is."""
    return torch.promote_types(tensor.dtype, torch.float32)
