"""Triton's interpreter with less work around each operation, and the same results: half the time of these tests.

Triton replaces the functions of `triton.language` when a kernel starts, and searches for all of them again whenever a
kernel calls a function of its own; it looks a dtype up in a table that it builds anew each time; and it computes the
check of every integer sum and product for overflow by a dozen operations of its own.
"""

from types import SimpleNamespace

import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

_dtypes = {}  # by the name of Triton's
NUMPY = {"add": np.add, "sub": np.subtract, "mul": np.multiply}


def _patch_lang(fn, patch=interpreter._patch_lang):
    """Replace what the kernel and all functions that it calls see of `triton.language`, Triton's own among them."""
    return patch(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))


def _call(self, *args, **kwargs):
    """A function called by a kernel, which has replaced the functions of `triton.language` already."""
    try:
        return self.rewrite()(*args, **kwargs)
    except Exception as error:
        raise interpreter.InterpreterError(repr(error)) from error


def _dtype(kind, look_up=interpreter._get_np_dtype):
    kind = kind.scalar
    if kind.is_ptr():
        return look_up(kind)
    if kind.name not in _dtypes:
        _dtypes[kind.name] = look_up(kind)
    return _dtypes[kind.name]


def _check_overflow(self, lhs, rhs, binary_op):
    """Fail where an integer sum, difference or product does not fit its type; Triton computes this and drops it."""
    kind = lhs.type.scalar
    if kind.int_bitwidth >= 64 or not self.builder.options.sanitize_overflow:
        return
    assert kind == rhs.type.scalar, f"expected matching operand types, got {kind} and {rhs.type.scalar}"
    assert kind.is_int(), f"expected integer type, got {kind}"
    wide = NUMPY[binary_op.__name__](lhs.handle.data.astype(np.int64), rhs.handle.data.astype(np.int64))
    if wide.size and (wide.max() > kind.get_int_max_value() or wide.min() < kind.get_int_min_value()):
        raise OverflowError(f"{binary_op.__name__} of {kind} overflows")


def install():
    """Make all interpreted kernels of this process run so."""
    interpreter._patch_lang = _patch_lang
    interpreter.InterpretedFunction.__call__ = _call
    interpreter._get_np_dtype = _dtype
    TritonSemantic.binary_op_sanitize_overflow_impl = _check_overflow
    assert tl.core.is_builtin(tl.load), "this version of Triton has another interpreter"
