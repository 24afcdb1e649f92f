"""The product of the `torch` backend, whichever library makes it."""

import pytest
import torch
import torch.nn.functional as F

from itm_fast.ops._torch import _linear
from itm_fast.testing import assert_accurate

CONVOLUTION = torch.mkldnn_convolution
needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


@pytest.fixture(params=[1, 512], ids=["wide", "narrow"])
def calls(monkeypatch, request):
    """Counts the convolutions; the processor is taken to have AVX-512."""
    seen = []
    monkeypatch.setattr(_linear, "WIDE", request.param)
    monkeypatch.setattr(_linear, "ROWS", 1)
    monkeypatch.setattr(_linear, "OUTPUTS", 10)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(torch, "mkldnn_convolution", lambda *args: seen.append(1) or CONVOLUTION(*args))
    return seen


def case(n, K=24, S=10, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*shape, generator=generator, dtype=dtype) for shape in ((n, 2 * K), (S, K), (S,)))
    return [t.requires_grad_() for t in (x, weight, bias)]


def outcome(function, x, weight, bias):
    y = function(x[:, ::2], weight, bias)
    return [y, *torch.autograd.grad(y, (x, weight, bias), cosines(y))]


def cosines(like):
    return torch.arange(like.numel(), dtype=like.dtype).cos().view_as(like)


@needs_onednn
@pytest.mark.parametrize("n", [1, 7, 64])
def test_a_convolution_is_the_product(calls, n):
    leaves = case(n)

    def product(dtype):
        return outcome(F.linear, *(x.detach().to(dtype).requires_grad_() for x in leaves))

    assert_accurate(outcome(_linear.linear, *leaves), product, torch.float32)
    assert calls


@needs_onednn
@pytest.mark.parametrize("n,S,convolutions", [(8, 10, 1), (7, 10, 0), (8, 9, 0)])
def test_few_rows_or_outputs_are_no_convolution(calls, monkeypatch, n, S, convolutions):
    monkeypatch.setattr(_linear, "ROWS", 8)
    with torch.no_grad():
        _linear.linear(*case(n, S=S)[:1], torch.ones(S, 48), None)
    assert len(calls) == convolutions


@needs_onednn
def test_the_result_may_be_changed_in_place(calls):
    x, weight, bias = case(7)
    found = _linear.linear(x[:, ::2], weight, bias).relu_().sum()
    expected = F.linear(x[:, ::2], weight, bias).relu().sum()
    for a, b in zip(torch.autograd.grad(found, (x, weight)), torch.autograd.grad(expected, (x, weight)), strict=True):
        torch.testing.assert_close(a, b)
    assert calls


@needs_onednn
def test_leading_dimensions_and_weights_that_want_no_gradient(calls):
    x, weight, bias = case(6)
    found = _linear.linear(x[:, ::2].unflatten(0, (2, 3)), weight.detach(), bias.detach())
    expected = F.linear(x[:, ::2].unflatten(0, (2, 3)), weight, bias)
    torch.testing.assert_close(found, expected)
    for a, b in zip(*(torch.autograd.grad(y.cos().sum(), x) for y in (found, expected)), strict=True):
        torch.testing.assert_close(a, b)
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
