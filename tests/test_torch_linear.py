"""The product of the `torch` backend, whichever library makes it."""

import pytest
import torch
import torch.nn.functional as F

from itm_fast.ops._torch import _linear
from itm_fast.testing import assert_accurate

CONVOLUTION = torch.mkldnn_convolution
needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


@pytest.fixture
def calls(monkeypatch):
    """Counts the convolutions; the processor is taken to have AVX-512."""
    seen = []
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(torch, "mkldnn_convolution", lambda *args: seen.append(1) or CONVOLUTION(*args))
    return seen


def case(n, K=24, S=10, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*shape, generator=generator, dtype=dtype) for shape in ((n, 2 * K), (S, K), (S,)))
    return [t.requires_grad_() for t in (x, weight, bias)]


def outcome(function, x, weight, bias):
    y = function(x[:, ::2], weight, bias)
    upstream = torch.arange(y.numel(), dtype=y.dtype).cos().view_as(y)
    return [y, *torch.autograd.grad(y, (x, weight, bias), upstream)]


@needs_onednn
@pytest.mark.parametrize("n", [1, 7, 64])
def test_a_convolution_is_the_product(calls, n):
    leaves = case(n)
    exact = outcome(F.linear, *(x.detach().double().requires_grad_() for x in leaves))
    for a, b, c in zip(outcome(_linear.linear, *leaves), outcome(F.linear, *leaves), exact, strict=True):
        assert_accurate(a, b, c)
    assert calls


@needs_onednn
def test_strided_weights_and_biases(calls):
    x, weight, bias = (t.detach() for t in case(7))
    wide = torch.full((10, 48), float("nan")), torch.full((20,), float("nan"))
    wide[0][:, ::2], wide[1][::2] = weight, bias
    found = _linear.linear(x[:, ::2], wide[0][:, ::2], wide[1][::2])
    torch.testing.assert_close(found, F.linear(x[:, ::2], weight, bias))
    assert calls


@pytest.mark.parametrize("n,dtype,precision", [(0, "float32", "highest"), (3, "float64", "highest"),
                                               (3, "float32", "medium")])  # fmt: skip
def test_where_only_the_product_will_do(calls, n, dtype, precision):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        leaves = case(n, dtype=getattr(torch, dtype))
        for a, b in zip(outcome(_linear.linear, *leaves), outcome(F.linear, *leaves), strict=True):
            assert torch.equal(a, b)
    finally:
        torch.set_float32_matmul_precision(before)
    assert not calls


def test_autocast_keeps_its_dtype(calls):
    x, weight, bias = case(3)
    with torch.autocast("cpu", torch.bfloat16):
        assert _linear.linear(x[:, ::2], weight, bias).dtype == torch.bfloat16
    assert not calls
