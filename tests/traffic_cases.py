"""What Triton's interpreter loads, stores and multiplies in each launch of a kernel."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from triton.runtime import interpreter

from benchmarks import traffic_triton
from benchmarks.traffic_counts import Count
from itm_fast.ops import _examples as examples

ELEMENTWISE = [
    *("fadd", "fsub", "fmul", "fdiv", "precise_divf", "fneg", "exp", "log", "sqrt", "precise_sqrt"),
    *("fp_ext", "fp_trunc", "fcmpOLT", "fcmpOGT", "fcmpULT", "fcmpUGT"),
]
PRECISIONS = {"TF32": "tf32", "TF32x3": "tf32x3", "IEEE": "ieee"}
MATMUL = {"float32": "highest", "tf32": "high", "float16": "highest"}


@pytest.fixture(autouse=True)
def precision_restored():
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def given(op: str, size: examples.Size, precision: str) -> list[Any]:
    """An op's example in the dtype of a precision, whose products are set."""
    torch.set_float32_matmul_precision(MATMUL[precision])
    dtype = torch.float16 if precision == "float16" else torch.float32
    args = examples.example(op, size)
    return [a.to(dtype) if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]


class Seen:
    """What one launch did to tensors of floats, in bytes; [0] of what is read, [1] of what is written."""

    def __init__(self) -> None:
        self.requested, self.places = [0, 0], [[], []]
        self.products: dict[str, int] = {}
        self.vector = 0

    def touch(self, pointers: Any, mask: Any, written: bool) -> None:
        element = pointers.get_element_ty()
        if element.is_floating():
            at, inside = np.broadcast_arrays(pointers.data, mask.data)
            inside, size = inside.astype(bool), element.primitive_bitwidth // 8
            again = 0  # neighbours in a row of a tile that have one address
            if at.ndim > 1:
                again = np.count_nonzero((at[..., 1:] == at[..., :-1]) & inside[..., 1:] & inside[..., :-1])
            at = at[inside]
            self.requested[written] += (at.size - again) * size
            self.places[written].append((at, size))

    def distinct(self, written: bool) -> int:
        found: dict[int, list] = {}
        for at, size in self.places[written]:
            found.setdefault(size, []).append(np.unique(at))
        return sum(size * len(np.unique(np.concatenate(at))) for size, at in found.items())


@contextmanager
def watched(seen: Seen, monkeypatch) -> Iterator[None]:
    """Put into `seen` what the interpreter does inside the `with`."""

    def before(owner, name, look):
        real = getattr(owner, name)
        patch.setattr(owner, name, lambda *args: (look(*args), real(*args))[1])

    def dot(_, a, b, d, precision, most):
        kind = PRECISIONS[precision.name] if a.data.dtype == np.float32 else "float16"
        operations = 2 * a.data.shape[0] * a.data.shape[1] * b.data.shape[1]
        seen.products[kind] = seen.products.get(kind, 0) + operations

    def element(_, x, *rest):
        if x.dtype.scalar.is_floating() and x.data.size > 1:
            seen.vector += max(x.data.size, *(y.data.size for y in rest if hasattr(y, "data")), 0)

    builder = interpreter.InterpreterBuilder
    with monkeypatch.context() as patch:
        before(builder, "create_masked_load", lambda _, at, mask, *rest: seen.touch(at, mask, False))
        before(builder, "create_masked_store", lambda _, at, value, mask, *rest: seen.touch(at, mask, True))
        before(builder, "create_dot", dot)
        before(interpreter.ReduceOps, "apply_impl", lambda _, x: element(None, x[0].handle))
        for name in ELEMENTWISE:
            before(builder, f"create_{name}", element)
        yield


@contextmanager
def compared(monkeypatch) -> Iterator[list[tuple[str, Count, Seen]]]:
    """After the `with`, each launch inside it: its kernel's name, what the model says, and what the interpreter did."""
    done: list[Seen] = []
    pairs: list[tuple[str, Count, Seen]] = []

    def run(kernel, grid, args, constants):
        done.append(Seen())
        with watched(done[-1], monkeypatch):
            kernel.run(*args, grid=grid, warmup=False, **constants)

    with traffic_triton.recording(90, run) as found:
        yield pairs
    pairs += [(name, count, seen) for (name, count), seen in zip(found, done, strict=True)]
