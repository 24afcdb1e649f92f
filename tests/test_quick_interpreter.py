"""Triton's interpreter, as these tests run it, computes as Triton's own and sees integers that overflow."""

import pytest
import torch
from triton_cases import unless

tl = pytest.importorskip("triton.language")
triton = pytest.importorskip("triton")
pytestmark = [unless("triton", "cpu"), pytest.mark.slow]


@triton.jit
def _doubled(x):
    return x + x


@triton.jit
def _kernel(X, Y, n: tl.constexpr):
    at = tl.arange(0, n)
    x = tl.load(X + at)
    tl.store(Y + at, _doubled(x) + tl.sum(x))


def run(values, dtype):
    x = torch.tensor(values, dtype=dtype)
    y = torch.empty_like(x)
    _kernel[(1,)](x, y, len(values))
    return y.tolist()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float16, torch.float32])
def test_a_kernel_that_calls_functions_of_its_own_and_of_triton(dtype):
    assert run([1, -2, 3, 4], dtype) == [8, 2, 12, 14]


def test_integers_that_overflow_are_seen():
    with pytest.raises(triton.runtime.errors.InterpreterError, match="add of int32 overflows"):
        run([2**30, 0], torch.int32)
    assert run([2**30, 0], torch.int64) == [3 * 2**30, 2**30]
