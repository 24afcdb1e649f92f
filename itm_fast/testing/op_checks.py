"""Checks that every op must pass on every backend.

`call(*args, backend=...)` is the op as a function of its differentiable arguments, with all others bound. If it returns
several results, only the first one is differentiable.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from .. import _backends, _native, ops
from . import assert_accurate

Call = Callable[..., Tensor | tuple[Tensor, ...]]


def backends(op: str, device: str = "cpu", dtype: torch.dtype = torch.float64) -> list[str]:
    """The op's backends that can run here in a dtype, the reference left out; one that cannot run is not listed."""
    assert op in ops.__all__, op
    return [n for n in _backends.OFFERS[op] if n != "reference" and _backends.why_not(n, device, dtype) is None]


def beside(like: Tensor, *indices: Tensor | None) -> list[Tensor | None]:
    """Move lengths and bounds to the device of `like`; None stays None."""
    return [x if x is None else x.to(like.device) for x in indices]


def first(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    return result if isinstance(result, Tensor) else result[0]


def leaves(args: Sequence[Tensor], dtype: torch.dtype, needs: Sequence[bool] | None = None) -> list[Tensor]:
    """Copies in a dtype that are autograd leaves; `needs` says which require a gradient (None: all)."""
    needs = needs or [True] * len(args)
    return [a.detach().to(dtype).clone().requires_grad_(n) for a, n in zip(args, needs, strict=True)]


def upstream(like: Tensor) -> Tensor:
    """A fixed random gradient for a result."""
    generator = torch.Generator().manual_seed(7)
    return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like.device, like.dtype)


def gradients(
    call: Call, args: Sequence[Tensor], dtype: torch.dtype, backend: str, rounded: torch.dtype
) -> list[Tensor]:
    """Gradients in `dtype` of the arguments rounded to `rounded`, for the same upstream gradient."""
    inputs = leaves([a.to(rounded) for a in args], dtype)
    result = first(call(*inputs, backend=backend))
    grad = upstream(result.to(rounded)).to(dtype)
    return list(torch.autograd.grad(result, inputs, grad, materialize_grads=True))


def factors(backend: str, dtype: torch.dtype) -> torch.dtype | None:
    """The half precision that a backend rounds intermediate results to before it multiplies them; None if it does not.

    Matrix units take no other factors for half-precision inputs.
    """
    halves = {"triton": (torch.float16, torch.bfloat16), "cpu": (torch.bfloat16,)}
    if backend == "cpu" and not _native.bfloat16_products()[0]:
        return None
    return dtype if dtype in halves.get(backend, ()) else None


def check_forward(call: Call, args: Sequence[Tensor], dtype: torch.dtype, backend: str) -> None:
    """Every result passes the accuracy rule, and the first one has the inputs' dtype."""
    rounded = [a.detach().to(dtype) for a in args]

    def run(kind: torch.dtype, name: str = "reference") -> tuple[Tensor, ...]:
        result = call(*(a.to(kind) for a in rounded), backend=name)
        return (result,) if isinstance(result, Tensor) else result

    actual = run(dtype, backend)
    assert actual[0].dtype == dtype
    assert [a.dtype for a in actual] == [s.dtype for s in run(dtype)]
    assert_accurate(actual, run, dtype, products=factors(backend, dtype))


def _accurate_gradients(
    actual: list[Tensor], call: Call, args: Sequence[Tensor], dtype: torch.dtype, backend: str
) -> None:
    def reference(kind: torch.dtype) -> list[Tensor]:
        return gradients(call, args, kind, "reference", dtype)

    assert_accurate(actual, reference, dtype, products=factors(backend, dtype), gradients=True)


def check_gradients(call: Call, args: Sequence[Tensor], dtype: torch.dtype, backend: str) -> None:
    """Every gradient passes the accuracy rule and has the inputs' dtype."""
    actual = gradients(call, args, dtype, backend, dtype)
    assert all(a.dtype == dtype for a in actual)
    _accurate_gradients(actual, call, args, dtype, backend)


def check_needs(call: Call, args: Sequence[Tensor], backend: str, dtype: torch.dtype = torch.float64) -> None:
    """If one argument requires a gradient, it alone gets one; if none does, autograd records nothing."""
    found: list[Tensor] = []
    for k in range(len(args)):
        inputs = leaves(args, dtype, [n == k for n in range(len(args))])
        result = first(call(*inputs, backend=backend))
        result.backward(upstream(result))
        assert [x.grad is not None for x in inputs] == [n == k for n in range(len(args))]
        found += [x.grad for x in inputs if x.grad is not None]
    _accurate_gradients(found, call, args, dtype, backend)
    assert not first(call(*leaves(args, dtype, [False] * len(args)), backend=backend)).requires_grad


def check_gradcheck(call: Call, args: Sequence[Tensor], backend: str) -> None:
    """Gradients in float64 equal finite differences."""
    inputs = leaves(args, torch.float64)
    assert torch.autograd.gradcheck(lambda *a: first(call(*a, backend=backend)), inputs)


def check_compile(call: Call, args: Sequence[Tensor], backend: str | None, dtype: torch.dtype = torch.float64) -> None:
    """Under torch.compile(fullgraph=True) results and gradients are the same."""
    torch.compiler.reset()
    compiled = torch.compile(lambda *a: first(call(*a, backend=backend)), fullgraph=True, backend="aot_eager")
    eager_in, graph_in = leaves(args, dtype), leaves(args, dtype)
    eager, graph = first(call(*eager_in, backend=backend)), compiled(*graph_in)
    torch.testing.assert_close(graph, eager)
    eager.backward(upstream(eager))
    graph.backward(upstream(graph))
    for a, b in zip(graph_in, eager_in, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def check_fake_backward(op: str, args: Sequence[object], differentiable: int, backend: str) -> None:
    """The backward op's fake implementation has the shapes, dtypes and strides of the real one, as inductor expects."""
    forward = getattr(torch.ops.itm_fast, op).default
    backward = getattr(torch.ops.itm_fast, f"{op}_backward").default
    with torch.no_grad():
        results = forward(*args, backend)
        grad = upstream(first(results))
        if "results" in (a.name for a in backward._schema.arguments):
            args = [*args, list(results)]
        real = backward(grad, [True] * differentiable, *args, backend)
        with torch._subclasses.FakeTensorMode() as mode:
            fakes = [tree_map_only(Tensor, mode.from_tensor, a) for a in (grad, *args)]
            fake = backward(fakes[0], [True] * differentiable, *fakes[1:], backend)
    for r, f in zip(real, fake, strict=True):
        assert (r.shape, r.dtype, r.stride()) == (f.shape, f.dtype, f.stride())


def check_deterministic(call: Call, args: Sequence[Tensor], backend: str) -> None:
    """Two calls give the same bits, forward and backward."""
    inputs = [a.float() for a in args]
    assert torch.equal(first(call(*inputs, backend=backend)), first(call(*inputs, backend=backend)))
    once, again = (gradients(call, args, torch.float32, backend, torch.float32) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


def same_bits(run: Callable[[], Sequence[Tensor]], counts: Sequence[int] = (1, 2, 4)) -> Sequence[Tensor]:
    """What `run` returns, which must have the same bits on these numbers of threads."""
    before, found = torch.get_num_threads(), []
    try:
        for threads in counts:
            torch.set_num_threads(threads)
            found.append(run())
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, found[0], strict=True))
    return found[0]


def check_threads(call: Call, args: Sequence[Tensor], dtype: torch.dtype) -> None:
    """The C++ kernels give results and gradients the same bits on any number of threads."""
    single = [a.to(dtype) for a in args]

    def run() -> list[Tensor]:
        result = call(*single, backend="cpu")
        results = [result] if isinstance(result, Tensor) else list(result)
        return [*results, *gradients(call, single, dtype, "cpu", dtype)]

    same_bits(run)


def check_autocast(call: Call, args: Sequence[Tensor]) -> None:
    """Under autocast `torch` computes in its dtype, and gradients have that of the arguments."""
    single = leaves(args, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        result = first(call(*single, backend="torch"))
    assert result.dtype == torch.bfloat16
    result.sum().backward()
    assert all(s.grad is not None and s.grad.dtype == torch.float32 for s in single)


def check_strided(call: Call, args: Sequence[Tensor], backend: str) -> None:
    """Inputs that are not contiguous give the same result."""
    spread = []
    for a in args:
        wide = torch.full((*a.shape[:-1], 2 * a.shape[-1]), float("nan"), dtype=a.dtype, device=a.device)
        wide[..., ::2] = a
        spread.append(wide[..., ::2])
    torch.testing.assert_close(first(call(*spread, backend=backend)), first(call(*args, backend=backend)))
