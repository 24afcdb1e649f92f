"""The structs that C++ is called with, one for each op with kernels there, for both sides of the call.

They follow from the ops' declarations. C++ includes them as csrc/cpu/calls.h, which is written by

    python -m itm_fast.ops._calls

and has to be written again when a declaration changes: a library whose structs are others refuses every call.
All fields have eight bytes, so no compiler leaves gaps between them.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from . import _attention
from ._declare import DECLARED, Choice, Counts, Declaration, Flag, Floats, Integers, Result

ENUMS = {
    "Dtype": ("float32", "float64", "bfloat16", "float16"),
    "Direction": (*_attention.DIRECTIONS, "both"),
    "Norm": (*_attention.NORMS, "cosine"),  # cosine, of global_local_score: each affinity over both rows' own lengths
    "Pool": _attention.POOLS,
}
SIZES = "IRTNMDPSKC"  # the order of the sizes in every struct


class Field(NamedTuple):
    """One field of a struct: its name, its type on either side, and its shape or what else is to be said of it."""

    name: str
    python: Any
    cpp: str
    comment: str = ""


# x W^T + b, which models make of what depends on one image or one caption alone: no op, but called as one.
LINEAR = Declaration(
    "linear",
    [Floats("x", "N K"), Floats("weight", "S K"), Floats("bias", "S", optional=True)],
    [Result("product", "N S")],
    offered=("cpu",),
    reference=torch.nn.functional.linear,
    examples=[],
    backward="torch",
)


def called() -> list[Declaration]:
    """The declarations that have a struct. C++ scores `global_local_score` as a case of `cross_attention_score`."""
    ops = (op for op in DECLARED.values() if "cpu" in op.offered and op.name != "global_local_score")
    return sorted([*ops, LINEAR], key=lambda op: op.name)


def fields(op: Declaration) -> Iterator[Field]:
    """Arguments, results, gradients, sizes, and how the call is to be made."""
    pointer, integers = ctypes.c_void_p, "const int64_t*"
    for argument in op.arguments:
        if isinstance(argument, Floats):
            comment = f"{argument.shape}, double" if argument.fixed else str(argument.shape)
            yield Field(argument.name, pointer, "const void*", comment)
        elif isinstance(argument, Integers):
            yield Field(argument.name, pointer, integers, f"{argument.shape}{', or null' * argument.optional}")
        elif isinstance(argument, Counts):
            yield Field(argument.name, pointer, integers)
        elif isinstance(argument, Choice):
            yield Field(argument.name, ctypes.c_int64, argument.enum)
        elif isinstance(argument, Flag):
            yield Field(argument.name, ctypes.c_int64, "int64_t", "0 or 1")
        else:
            yield Field(argument.name, ctypes.c_double, "double")
    for result in op.results:
        comment = "" if callable(result.shape) else f"[{', '.join(result.shape.split())}]"
        yield Field(result.name, pointer, "void*", comment)
    if op.backward is None:
        yield Field("grad", pointer, "const void*", f"of {op.results[0].name}")
        for argument in op.arguments[: op.differentiable]:
            yield Field(f"d_{argument.name}", pointer, "void*", "or null")
    yield Field("dtype", ctypes.c_int64, "Dtype", "of all tensors of floats")
    for letter in SIZES:
        if letter in op.places:
            yield Field(letter, ctypes.c_int64, "int64_t")
    yield Field("bfloat16", ctypes.c_int64, "int64_t", "products may multiply bfloat16 values")
    yield Field("threads", ctypes.c_int64, "int64_t")


@functools.cache
def struct(op: Declaration) -> type[ctypes.Structure]:
    """The struct of an op for Python."""
    return type(_title(op.name), (ctypes.Structure,), {"_fields_": [(f.name, f.python) for f in fields(op)]})


def _title(name: str) -> str:
    return "".join(part.capitalize() for part in name.split("_")) + "Call"


def _structs() -> str:
    lines = []
    for name, values in ENUMS.items():
        lines.append(f"enum class {name} : int64_t {{ {', '.join(v.upper() for v in values)} }};")
    for op in called():
        lines += ["", f"struct {_title(op.name)} {{"]
        count = 0
        for field in fields(op):
            code = f"  {field.cpp} {field.name};"
            lines.append(f"{code:<34}// {field.comment}" if field.comment else code)
            count += 1
        lines += ["};", f"static_assert(sizeof({_title(op.name)}) == 8 * {count});"]
    return "\n".join(lines)


@functools.cache
def digest() -> str:
    """A name of the structs as they are declared now."""
    return hashlib.sha256(_structs().encode()).hexdigest()[:16]


def header() -> str:
    """The text of calls.h."""
    return f"""// The structs that Python calls C++ with: one for each op, with its arguments, results and sizes.
//
// Written by `python -m itm_fast.ops._calls` from the declarations in itm_fast/ops; do not change it by hand.
#pragma once
#include <cstdint>

namespace itm_fast {{

constexpr char CALLS[] = "{digest()}";  // what the structs are compared by at the first call

{_structs()}

}}  // namespace itm_fast
"""


if __name__ == "__main__":
    from .._native import csrc_dir

    path = csrc_dir() / "cpu" / "calls.h"
    path.write_text(header())
    print(f"{path}: structs of {', '.join(op.name for op in called())}")
