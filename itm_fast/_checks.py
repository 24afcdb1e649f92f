"""Checks of shapes, dtypes and devices, which torch.compile can trace, with one format for all messages."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from numbers import Integral
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def matmul_precision() -> str:
    """torch.get_float32_matmul_precision(): "highest", "high" (TF32 allowed) or "medium" (bfloat16 allowed).

    torch raises once its newer switches, torch.backends.*.fp32_precision, have been set. Then the switch for CUDA's
    matrix products decides between "highest" and "high".
    """
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return "high" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "highest"


class Shape:
    """A tensor's shape in letters, "I R D"; a letter means one size in all tensors of a call.

    "T+1" is one more than T, "2" is a size of 2, and "K=1|D" a K that must be 1 or D.
    """

    def __init__(self, letters: str) -> None:
        parts = [part.partition("=") for part in letters.split()]
        self.labels = tuple(label for label, _, _ in parts)
        # For each dimension its letter, and what is added to the letter's size: 1 for "T+1".
        self.dims = tuple((label.removesuffix("+1"), int(label.endswith("+1"))) for label in self.labels)
        self.allowed = {label: allowed.split("|") for label, _, allowed in parts if allowed}

    def __str__(self) -> str:
        return f"[{', '.join(self.labels)}]"


class Arguments:
    """Checks an op's tensors against their shapes in letters, and against each other.

    >>> check = Arguments("cross_attention_score")
    >>> check.floats("image", torch.zeros(2, 3, 8), Shape("I R D"))
    >>> check.floats("words", torch.zeros(5, 9), Shape("N D"))
    Traceback (most recent call last):
    ValueError: cross_attention_score: words must be [N, D] with D = 8 as in image, got [5, 9]
    """

    def __init__(self, op: str) -> None:
        self.op = op
        self.size: dict[str, int] = {}  # by letter
        self.seen: dict[str, str] = {}  # letter -> the first tensor that has it
        self.first: tuple[str, torch.dtype, torch.device] | None = None

    def shape(self, name: str, tensor: Tensor, shape: Shape) -> None:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{self.op}: {name} must be a tensor, got {type(tensor).__name__}")
        if not dense(tensor):
            raise TypeError(f"{self.op}: {name} must be a dense tensor, got {layout(tensor)}")
        sizes, known = tensor.shape, self.size
        if len(sizes) != len(shape.dims):
            raise self._wrong(name, sizes, shape)
        for (letter, more), n in zip(shape.dims, sizes):
            if letter not in known:
                self._meet(letter, n - more, name, sizes, shape)
            elif n != known[letter] + more:
                raise self._wrong(name, sizes, shape, f" with {letter} = {known[letter]} as in {self.seen[letter]}")

    def _meet(self, letter: str, size: int, name: str, sizes: torch.Size, shape: Shape) -> None:
        """Record the size of a letter when it first appears, and check that it is allowed."""
        if letter.isdigit():
            if size != int(letter):
                raise self._wrong(name, sizes, shape)
            return
        self.size[letter], self.seen[letter] = size, name
        if (size == 0 and letter in "RDS") or size < 0:
            raise self._wrong(name, sizes, shape, f" with {letter}{'+1' if size < 0 else ''} > 0")
        if letter in shape.allowed:
            values = {x: int(x) if x.isdigit() else self.size[x] for x in shape.allowed[letter]}
            if all(size != n for n in values.values()):
                words = [x if x.isdigit() else f"{x} = {n}" for x, n in values.items()]
                raise self._wrong(name, sizes, shape, f" with {letter} = {' or '.join(words)}")

    def _wrong(self, name: str, sizes: torch.Size, shape: Shape, why: str = "") -> ValueError:
        return ValueError(f"{self.op}: {name} must be {shape}{why}, got {list(sizes)}")

    def floats(self, name: str, tensor: Tensor, shape: Shape) -> None:
        """Check a tensor's shape, that it is floating-point, and that dtype and device are those of the ones before."""
        self.shape(name, tensor, shape)
        dtype, device = tensor.dtype, tensor.device
        if dtype not in FLOATS:
            raise TypeError(f"{self.op}: {name} must be float64, float32, float16 or bfloat16, got {dtype}")
        if self.first is None:
            if device.type == "meta":
                raise ValueError(f"{self.op}: {name} must hold values, got a tensor on the meta device, which has none")
            self.first = name, dtype, device
            return
        first, of_first, _ = self.first
        if dtype != of_first and not autocast_unites(dtype, of_first, device):
            raise TypeError(f"{self.op}: {name} and {first} must have one dtype, got {dtype} and {of_first}")
        self._same_device(name, device)

    def integers(self, name: str, tensor: Tensor, shape: Shape) -> None:
        self.shape(name, tensor, shape)
        if tensor.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{self.op}: {name} must be int32 or int64, got {tensor.dtype}")
        self._same_device(name, tensor.device)

    def weights(self, name: str, tensor: Tensor, module: nn.Module) -> None:
        """Refuse a floating-point tensor of a dtype, or on a device, that none of a module's weights has.

        A module may have weights of several dtypes, and converts between them itself; most have one, so that the first
        weight ends the search.
        """
        first: Tensor | None = None
        of_dtype = on_device = False
        for weight in module.parameters():
            if weight.dtype not in FLOATS:
                continue
            first = weight if first is None else first
            of_dtype |= tensor.dtype == weight.dtype or autocast_unites(tensor.dtype, weight.dtype, tensor.device)
            on_device |= tensor.device == weight.device
            if of_dtype and on_device:
                return
        if first is None:
            return
        if not of_dtype:
            mine, theirs = tensor.dtype, first.dtype
            raise TypeError(
                f"{self.op}: {name} and the weights must have one dtype, got {mine} and {theirs}; convert what is "
                f"given, .to({theirs}), or the module, .to({mine})"
            )
        raise ValueError(
            f"{self.op}: {name} and the weights must be on one device, got {tensor.device} and {first.device}; "
            "move one of them with .to(device)"
        )

    def choice(self, name: str, value: str, known: Sequence[str]) -> None:
        if value not in known:
            raise ValueError(f"{self.op}: {name} must be one of {', '.join(known)}, got {value!r}")

    def number(self, name: str, value: object) -> None:
        # A string has no __float__, although float() reads "9"; an array has one, although it may hold several numbers.
        one = isinstance(value, (int, float)) or (
            hasattr(value, "__float__") and math.prod(getattr(value, "shape", ())) == 1
        )
        if not one:
            raise TypeError(f"{self.op}: {name} must be a number, got {value!r:.60}")
        # torch.compile may trace a number whose value it does not know.
        if not torch.compiler.is_compiling() and value != value:
            raise ValueError(f"{self.op}: {name} must be a number, got nan")

    def flag(self, name: str, value: object) -> None:
        if isinstance(value, Tensor):
            known = value.dtype == torch.bool and not value.dim() and value.device.type == "cpu"
        elif isinstance(value, Integral):  # True and False are
            known = value in (0, 1)
        else:
            known = type(value).__name__ in ("bool", "bool_")  # numpy's has these names
        if not known:
            raise TypeError(f"{self.op}: {name} must be True or False, got {value!r:.60}")

    def counts(self, name: str, value: object) -> None:
        if not isinstance(value, Iterable) or not all(hasattr(n, "__index__") for n in value):
            raise TypeError(f"{self.op}: {name} must be a sequence of whole numbers, got {value!r:.60}")

    def positive(self, name: str, value: float) -> None:
        if not 0 < value < float("inf"):
            raise ValueError(f"{self.op}: {name} must be more than 0 and finite, got {value}")

    def share(self, name: str, value: float) -> None:
        if not 0 <= value <= 1:
            raise ValueError(f"{self.op}: {name} must lie in 0..1, got {value}")

    def _same_device(self, name: str, device: torch.device) -> None:
        if self.first is not None and device != self.first[2]:
            raise ValueError(
                f"{self.op}: {name} and {self.first[0]} must be on one device, got {device} and {self.first[2]}"
            )


def autocast_unites(a: torch.dtype, b: torch.dtype, device: torch.device) -> bool:
    """Whether `autocast` makes tensors of two dtypes one dtype."""
    return torch.float64 not in (a, b) and torch.is_autocast_enabled(device.type)


def dense(tensor: object) -> TypeGuard[Tensor]:
    """Whether it is a tensor whose elements all exist and lie at fixed strides: no sparse and no nested one."""
    return isinstance(tensor, Tensor) and tensor.layout == torch.strided and not tensor.is_nested


def plain(*tensors: Tensor) -> bool:
    """Whether only the values of tensors matter now: none is fake, a negated view or of a transform of torch.func, no
    graph is traced, and no dispatch mode, such as make_fx's or a count of operations, sees what is computed."""
    return (
        not torch.compiler.is_compiling()
        and torch._C._get_tracing_state() is None  # torch.jit.trace
        and not is_in_torch_dispatch_mode()
        and all(type(x) in (Tensor, nn.Parameter) and not x.is_neg() for x in tensors)
        and forward_ad._current_level < 0
        and not any(torch._C._functorch.is_functorch_wrapped_tensor(x) for x in tensors)
    )


def layout(tensor: Tensor) -> str:
    """What a tensor that is not `dense` is, for messages."""
    return "a nested tensor" if tensor.is_nested else f"a tensor of layout {tensor.layout}"


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast floating-point tensors to torch.autocast's dtype where it is enabled. float64 is never cast."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if t.dtype in FLOATS and t.dtype != torch.float64 else t for t in tensors)


def traced(tensor: Tensor) -> bool:
    """Whether a tensor's values are not known, as torch.compile traces the call, or the tensor is fake."""
    return torch.compiler.is_compiling() or is_fake(tensor)


def without_autocast(device: str) -> AbstractContextManager:
    """A context in which autocast is off; where it is already, torch's own would take longer than some ops."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is captured on a device, whose tensors can then not be read."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def refuse_captured(lengths: Tensor) -> None:
    """Raise a RuntimeError if a CUDA graph is captured on the device of lengths that would be read now."""
    if capturing(lengths.device):
        raise RuntimeError(
            f"lengths {list(lengths.shape)} cannot be read while a CUDA graph is captured; run the same calls with the "
            "same tensors of lengths once before, and a backward pass with a gradient of every pair's score"
        )


def work_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype for sums over a tensor: float64 for float64, else float32."""
    return torch.promote_types(tensor.dtype, torch.float32)
