"""Linear maps in C++, which models apply to rows of images and captions: their gradients, and at precision "medium"."""

import pytest
import torch
import torch.nn.functional as F
from cpu_cases import at_level, needs_cpu, over_lesser_processors
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import itm_fast
from itm_fast import _native
from itm_fast.models import _rows
from itm_fast.ops import _cpu_calls
from itm_fast.testing import assert_accurate

pytestmark = needs_cpu
SIZES = 1030, 35, 37  # rows, of which a gradient's product takes 1,024 at a time; inputs and outputs


def case(N, K, S, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(dtype)  # noqa: E731
    return [draw(N, K), draw(S, K), draw(S)], draw(N, S)


def outcome(function, given, grad):
    """The product, and the gradients of x, weight and bias."""
    leaves = [x.detach().requires_grad_() for x in given]
    y = function(*leaves)
    return [y, *torch.autograd.grad(y, leaves, grad.to(y.dtype))]


def by_torch(given, grad):
    return lambda dtype: outcome(F.linear, [x.to(dtype) for x in given], grad)


def in_cpp(given, grad, threads=1):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return [_cpu_calls.linear(*given), *_cpu_calls.linear_backward(grad, [True] * 3, *given)]
    finally:
        torch.set_num_threads(before)


@pytest.fixture
def medium():
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", [SIZES, (1, 1, 1), (3, 4, 0), (0, 4, 3)])
def test_gradients(sizes, dtype):
    given, grad = case(*sizes, dtype)
    assert_accurate(in_cpp(given, grad), by_torch(given, grad), dtype)


def test_any_number_of_threads(medium):
    for a, b in zip(in_cpp(*case(*SIZES)), in_cpp(*case(*SIZES), threads=3), strict=True):
        assert torch.equal(a, b)


def test_a_gradient_alone():
    given, grad = case(*SIZES)
    whole = in_cpp(given, grad)[1:]
    for k, exact in enumerate(whole):
        found = _cpu_calls.linear_backward(grad, [n == k for n in range(3)], *given)
        assert len(found) == 1
        assert torch.equal(found[0], exact)


@over_lesser_processors
def test_older_processors(level, monkeypatch):
    at_level(level, monkeypatch)
    for dtype in (torch.float64, torch.float32):
        given, grad = case(*SIZES, dtype)
        assert_accurate(in_cpp(given, grad), by_torch(given, grad), dtype)


@pytest.fixture
def step(medium, monkeypatch):
    """The linear map of a training step at "medium", in C++ on every processor; its arguments, and a gradient."""
    monkeypatch.setattr(_rows, "_rounded", lambda dtype: True)
    return case(70, 33, _rows.OUTPUTS)


def test_a_training_step_multiplies_bfloat16_values(step):
    given, grad = step
    found = outcome(lambda x, *rest: _rows.linear(x.view(2, -1, 33), *rest).flatten(0, 1), given, grad)
    assert_accurate(found, by_torch(given, grad), torch.float32, products=torch.bfloat16)
    exact = outcome(F.linear, given, grad)
    rounds = _cpu_calls.bfloat16_products(torch.float32)
    assert [torch.equal(a, b) for a, b in zip(found[:3], exact[:3], strict=True)].count(True) <= (0 if rounds else 3)
    given[0].requires_grad_()
    assert torch.equal(_rows.linear(given[0][1:], *given[1:]), found[0][1:])  # whatever rows stand beside
    with itm_fast.use_backend("torch"):
        assert torch.equal(_rows.linear(*given), exact[0])


def test_torch_takes_what_it_multiplies_with_amx_itself(medium):
    assert _rows._rounded(torch.float32) == (_native.outcome().level == "avx512_bf16")
    assert not _rows._rounded(torch.float64)


def test_second_derivatives(step):
    """Torch finds them, from products of float32 values."""
    x, weight, bias = (t.requires_grad_() for t in step[0])

    def second(linear):
        (first,) = torch.autograd.grad((linear(x, weight, bias) ** 3).sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), [x, weight, bias])

    for found, exact in zip(second(_rows.linear), second(F.linear), strict=True):
        assert (found - exact).norm() < 0.1 * exact.norm()


@pytest.mark.parametrize("grad", [True, False])
def test_traces_and_fake_tensors_are_torchs(step, grad):
    given = [t.requires_grad_(grad) for t in step[0]]
    trace = make_fx(_rows.linear)(*(torch.zeros_like(t).requires_grad_(grad) for t in given))
    assert torch.allclose(trace(*given), F.linear(*given), rtol=1e-4, atol=1e-4)
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(t) for t in given]
        assert _rows.linear(*fake).shape == (70, _rows.OUTPUTS)
    assert _rows.linear(*fake).shape == (70, _rows.OUTPUTS)
