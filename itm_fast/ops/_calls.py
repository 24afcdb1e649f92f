"""The structs that Python passes to C++, one for each op with C++ kernels: for Python (ctypes) and for C++; and the
values of options that CUDA kernels get.

They follow from the ops' declarations. C++ includes csrc/cpu/calls/<op>.h, and CUDA C++ csrc/cuda/choices.h, generated
by

    python -m itm_fast.ops._calls

Run it when a declaration changes: a library with different structs refuses every call. All fields have eight bytes, so
no compiler leaves gaps between them.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from . import _attention
from ._declare import (
    CPU_ONLY,
    DECLARED,
    Choice,
    Counts,
    Declaration,
    Flag,
    Floats,
    Integers,
    Positive,
    Result,
    Share,
    cpu_only,
)

REGULATORS = ("coop_rcar", "only_rar", "only_rcr")  # of RCAR
ENUMS = {
    "Dtype": ("float32", "float64", "bfloat16", "float16"),
    "Direction": (*_attention.DIRECTIONS, "both"),
    "Norm": (*_attention.NORMS, "cosine"),  # cosine, for global_local_score: the affinity is divided by both lengths
    "Output": _attention.OUTPUTS,
    "Pool": (*_attention.POOLS, *_attention.NEGATIVE),
    "Weights": _attention.WEIGHTS,
    "Similarity": _attention.SIMILARITIES,
    "Regulator": REGULATORS,
}
# Of csrc/cuda, where the LeakyReLU before a norm is a number of its own. All contexts share a softmax
# with weights "softmax", and with "hard", where its scale is `HARD`.
CUDA_ENUMS = {
    "Norm": tuple(dict.fromkeys(_attention.clipped(norm)[1] for norm in _attention.NORMS)),
    "Pool": (*_attention.POOLS, "negative"),
    "Sharing": ("all", "focal_equal", "focal_prob", "threshold"),
    "Similarity": _attention.SIMILARITIES,
}
# exp(HARD (a - b)) is 0 for float32 numbers a < b, unless both are below 2e-27.
HARD = 2.0**120
SIZES = "IRTNMDPSKCBQ"  # the order of the sizes in every struct


class Field(NamedTuple):
    """One field of a struct: its name, its type in Python and in C++, and a comment such as its shape."""

    name: str
    python: Any
    cpp: str
    comment: str = ""


# x W^T + b, which models apply to each image and each caption alone.
LINEAR = cpu_only(
    "linear",
    [Floats("x", "N K"), Floats("weight", "S K"), Floats("bias", "S", optional=True)],
    [Result("product", "N S")],
)

# IMRAM's gate, and its cosines, of C times the same Q queries in each of B sets. `products` and the last 2 D values of
# attended rows add up to the candidate and the gate; the first D values are what the cosines are with.
GATED_ROWS = cpu_only(
    "gated_rows",
    [Floats("queries", "B Q D"), Floats("products", "B Q S"), Floats("attended", "B C Q P"), Flag("unit")],
    [Result("refined", "B C Q D")],
    backward="torch",
)
ROW_COSINES = cpu_only(
    "row_cosines",
    [Floats("queries", "B Q D"), Floats("attended", "B C Q P")],
    [Result("cosine", "B C Q")],
    backward="torch",
)

# RCAR's pair score of all pairs. Layer k of each kind belongs to step k. `kept` are the bits of what dropout kept, as
# models/_by_caption.py packs them: for each image and step those of all captions' queries, each caption's followed by
# those of `overall`.
REGULATED_MATCHING = cpu_only(
    "regulated_matching",
    [
        Floats("image", "I R D"), Floats("words", "N D"),
        Floats("align_weight", "M S D"), Floats("align_bias", "M S"),
        Floats("key_weight", "P S S"), Floats("key_bias", "P S"),
        Floats("ask_weight", "P S S"), Floats("ask_bias", "P S"), Floats("share_weight", "P S"),
        Floats("matrix_in_weight", "K B S"), Floats("matrix_in_bias", "K B"),
        Floats("matrix_out_weight", "K D B"), Floats("matrix_out_bias", "K D"),
        Floats("smooth_in_weight", "K C S"), Floats("smooth_in_bias", "K C"),
        Floats("smooth_out_weight", "K C"), Floats("smooth_out_bias", "K"),
        Floats("score_weight", "S"), Floats("score_bias", "1"),
        Integers("cu_seqlens", "T+1"), Integers("region_lengths", "I", optional=True),
        Integers("kept", "I P Q W", optional=True),
        Choice("direction", _attention.DIRECTIONS, "Direction"), Choice("regulator", REGULATORS, "Regulator"),
        Positive("scale"), Share("dropped"),
    ],
    [Result("score", "I T")],
    backward="torch",
)  # fmt: skip


def _graph(of: str) -> list[Floats]:
    names = (f"{of}_{name}" for name in ("query", "key", "value"))
    return [x for name in names for x in (Floats(f"{name}_weight", "K S S"), Floats(f"{name}_bias", "K S"))]


# CMCAN's pair score of all pairs, likewise.
CONFIDENCE_MATCHING = cpu_only(
    "confidence_matching",
    [
        Floats("image", "I R D"), Floats("image_global", "I D"), Floats("part", "I R D"),
        Floats("words", "N D"), Floats("caption_global", "T D"),
        Floats("global_weight", "S D"), Floats("global_bias", "S"),
        Floats("word_weight", "S D"), Floats("word_bias", "S"),
        Floats("region_weight", "S D"), Floats("region_bias", "S"),
        Floats("part_weight", "S D"), Floats("part_bias", "S"),
        Floats("common_weight", "S"), Floats("common_bias", "1"), Floats("norm_weight", "R"), Floats("norm_bias", "R"),
        Floats("score_weight", "B"), Floats("score_bias", "1"),
        *_graph("word"), *_graph("region"),
        Integers("cu_seqlens", "T+1"), Integers("region_lengths", "I", optional=True),
    ],
    [Result("score", "I T")],
    backward="torch",
)  # fmt: skip


def called() -> list[Declaration]:
    """The declarations that have a struct; `global_local_score` calls C++ with that of `cross_attention_score`."""
    ops = (op for op in DECLARED.values() if "cpu" in op.offered and op.name != "global_local_score")
    return sorted([*ops, *CPU_ONLY.values()], key=lambda op: op.name)


def fields(op: Declaration) -> Iterator[Field]:
    """The fields in their order: arguments, results, gradients, dtype, sizes, and options of the call itself."""
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
    for result in op.written:
        comment = "" if callable(result.shape) else f"[{', '.join(result.shape.split())}]"
        if result is op.trained:
            comment = "of any shape, or null"
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
    """The struct of an op as a ctypes class."""
    return type(_title(op.name), (ctypes.Structure,), {"_fields_": [(f.name, f.python) for f in fields(op)]})


def _title(name: str) -> str:
    return "".join(part.capitalize() for part in name.split("_")) + "Call"


def _enumerators(values: Iterable[str]) -> str:
    return f"{{ {', '.join(v.upper() for v in values)} }}"


def _enums() -> str:
    return "\n".join(f"enum class {name} : int64_t {_enumerators(values)};" for name, values in ENUMS.items())


def _struct(op: Declaration) -> str:
    lines = [f"struct {_title(op.name)} {{"]
    count = 0
    for field in fields(op):
        code = f"  {field.cpp} {field.name};"
        if field.name in SIZES and lines[-1].startswith("  int64_t"):  # all sizes share a line
            lines[-1] = f"{lines[-1][:-1]}, {field.name};"
        else:
            lines.append(f"{code:<34} // {field.comment}" if field.comment else code)
        count += 1
    return "\n".join([*lines, "};", f"static_assert(sizeof({_title(op.name)}) == 8 * {count});"])


@functools.cache
def digest() -> str:
    """A hash of all structs: Python and C++ compare theirs at the first call."""
    text = "\n".join([_enums(), *map(_struct, called())])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def headers() -> dict[str, str]:
    """The generated files by their paths in csrc. Each struct has one, as a change then compiles its op alone."""
    cuda = "\n".join(f"enum {name} {_enumerators(values)};" for name, values in CUDA_ENUMS.items())
    compared = f'constexpr char CALLS[] = "{digest()}";'
    return {
        "cuda/choices.h": _header("Values of the ops' options that kernels get.", cuda),
        "cpu/calls/choices.h": _header("Values of the ops' options.", _in_namespace("<cstdint>", _enums())),
        "cpu/calls/digest.h": _header("A hash of all calls, which Python compares with its own.", compared),
    } | {
        f"cpu/calls/{op.name}.h": _header(
            f"The call of `{op.name}`; who owns what: calls.cpp.", _in_namespace('"choices.h"', _struct(op))
        )
        for op in called()
    }


def _header(about: str, code: str) -> str:
    return f"""// {about}
//
// Generated by `python -m itm_fast.ops._calls` from the declarations in itm_fast/ops; do not edit.
#pragma once

{code}
"""


def _in_namespace(included: str, code: str) -> str:
    return f"#include {included}\n\nnamespace itm_fast {{\n\n{code}\n\n}}  // namespace itm_fast"


if __name__ == "__main__":
    from .._native import csrc_dir

    texts = headers()
    for old in (csrc_dir() / "cpu" / "calls").glob("*.h"):
        old.unlink()
    for name, text in texts.items():
        path = csrc_dir() / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    print(f"{csrc_dir()}: wrote {', '.join(texts)}")
