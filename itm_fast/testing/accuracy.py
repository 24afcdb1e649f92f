"""The one accuracy rule: error <= 2 x error of the reference in the same dtype + what rounding may add (`rounding`)."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

Reference = Callable[[torch.dtype], Sequence[Tensor]]

DRAWS = 8
# Hoeffding: rounding takes a number beyond six times the mean square's root with probability 2 exp(-6^2 / 2) = 3e-8 at
# most, and the tests compare a few hundred thousand numbers.
SIGMAS = 6
PRODUCTS = {"matmul", "__matmul__", "mm", "bmm", "mv", "dot", "linear"}
REDUCED = {"sum", "mean", "var", "norm", "vector_norm", "linalg_vector_norm", "logsumexp"}
COPIES = {"clone", "contiguous", "to", "double", "__getitem__"}  # round nothing
FLOAT32 = torch.finfo(torch.float32).eps


def assert_accurate(
    actual: Sequence[Tensor], reference: Reference, dtype: torch.dtype, *, products: torch.dtype | None = None
) -> None:
    """Assert the accuracy rule, error(actual) <= 2 x error(reference in `dtype`) + `rounding`, for every result.

    Errors are largest distances from the reference in float64.

    Args:
        actual: the results under test.
        reference: a dtype to compute in -> the reference's results, computed with the operations of torch and of
            `itm_fast.ops` on inputs that were rounded to `dtype` before.
        dtype: that of the inputs, in which the reference is compared.
        products: the dtype that factors of matrix products may be rounded to before, where that is another.

    Raises:
        AssertionError: shapes differ, a value is not finite, or an error is too large.

    >>> import torch
    >>> from itm_fast.testing import assert_accurate
    >>> x = torch.linspace(-1, 1, 100)
    >>> assert_accurate([x @ x], lambda dtype: [(x.to(dtype) * x.to(dtype)).sum()], torch.float32)
    """
    exact = [e.detach() for e in reference(torch.float64)]
    for a, e in zip(actual, exact, strict=True):
        assert a.shape == e.shape, f"shape {list(a.shape)}, want {list(e.shape)}"
        assert torch.isfinite(a).all(), "a value is not finite"
    plain = _distances(reference(dtype), exact)
    errors = _distances(actual, exact)
    for term in rounding(reference, exact, dtype, products):  # drawn only until the errors are within what was drawn
        allowed = [2 * p + t for p, t in zip(plain, term, strict=True)]
        if all(error <= most for error, most in zip(errors, allowed, strict=True)):
            return
    for k, (error, most) in enumerate(zip(errors, allowed, strict=True)):
        assert error <= most, f"result {k} of {len(errors)}: error {error:.3g} exceeds {most:.3g}"


def rounding(
    reference: Reference, exact: Sequence[Tensor], dtype: torch.dtype, products: torch.dtype | None = None
) -> Iterator[list[float]]:
    """How far rounding alone may take a right program from the exact results: the accuracy rule's rounding term.

    Derivation. IEEE arithmetic rounds every operation: the computed v is (1 + d) times the exact one, |d| <= u, half
    the spacing of numbers at 1 (2^-53 in float64, 2^-24 in float32). A sum of n terms, in any order and in any
    blocks, is that of terms which are each off by a relative (n - 1) u at the most, and since roundings are as good as
    independent by sqrt(n) u but with vanishing probability (Higham and Mary, 2019). To first order a result is
    therefore off by sum_k d_k df/dv_k over all operations k of the program: how many terms are summed enters by d_k,
    and how the problem is conditioned by df/dv_k. By Hoeffding's inequality such a sum of independent d_k, at most u_k,
    passes lambda s, s^2 = sum_k (u_k df/dv_k)^2, with probability 2 exp(-lambda^2 / 2) at most: see SIGMAS.

    s is measured, for it is the root of the mean square of what the results move by when each d_k is +u_k or -u_k at
    random. So the reference runs in float64, and after every operation each value is multiplied by 1 + u or 1 - u at
    random (Monte Carlo arithmetic; Parker, 1997), and each term of a sum of n before by 1 +- sqrt(n) u. The backward
    pass is drawn likewise and on its own: with C results to which an element contributes, its gradient is a sum of C
    terms. That backward rounds independently is what shows where gradients cancel: for a caption of one word, whose
    affinity a is normalised to a / |a|, d a is the difference of two equal terms of size 1 / |a|, which rounding leaves
    apart by u / |a| although the exact difference is next to nothing.

    All arithmetic in float16 and bfloat16 sums in float32 or better, so u is at most float32's there; the results
    themselves are stored in `dtype`, which the term's first part covers: u of `dtype` times the largest value.

    A wrong program does not hide here: a dropped term, or eps inside the root, is off by a share of the value that has
    nothing to do with u.

    Args:
        reference: see `assert_accurate`.
        exact: its results in float64.
        dtype: that of the inputs.
        products: see `assert_accurate`; its u is added to that of the factors.

    Yields:
        One number for each result: what storing it rounds; then that and `SIGMAS` s, s of the element where it is
        largest, after each of `DRAWS` draws. The random numbers are fixed.
    """
    unit = torch.finfo(dtype).eps / 2
    factors = 0.0 if products is None else torch.finfo(products).eps / 2
    stored = [unit * e.abs().max().item() if e.numel() else 0.0 for e in exact]
    squares = [torch.zeros_like(e) for e in exact]
    yield stored
    for seed in range(DRAWS):
        with _Drawn(min(unit, FLOAT32 / 2), factors, seed):
            moved = reference(torch.float64)
        squares = [q + (m.detach() - e).square() for q, m, e in zip(squares, moved, exact, strict=True)]
        largest = [(q / (seed + 1)).max().sqrt().item() if q.numel() else 0.0 for q in squares]
        yield [a + SIGMAS * b for a, b in zip(stored, largest, strict=True)]


def _distances(found: Sequence[Tensor], exact: Sequence[Tensor]) -> list[float]:
    pairs = zip(found, exact, strict=True)
    return [(f.detach().double() - e.double()).abs().max().item() if e.numel() else 0.0 for f, e in pairs]


def _softmax(x: Tensor, dim: int, **_: Any) -> Tensor:
    weights = (x - x.detach().amax(dim, keepdim=True)).exp()
    return weights / weights.sum(dim, keepdim=True)


def _normalize(x: Tensor, dim: int = 1, eps: float = 1e-12, **_: Any) -> Tensor:
    return x / torch.linalg.vector_norm(x, dim=dim, keepdim=True).clamp_min(eps)


# Several operations in one, whose gradient is a difference: it cancels exactly unless each of them rounds.
COMPOSED = {"softmax": _softmax, "normalize": _normalize}


class _Drawn(TorchFunctionMode):
    """Every operation of torch rounds at random by `unit`, forward and backward, and the factors of a product by
    `factors` before; see `rounding`."""

    def __init__(self, unit: float, factors: float, seed: int) -> None:
        super().__init__()
        self.unit, self.factors, self.generator = unit, factors, torch.Generator().manual_seed(seed)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if getattr(func, "namespace", None) == "itm_fast":  # an op: look into its reference
            op = importlib.import_module(f"itm_fast.ops.{func._schema.name.split('::')[1]}")
            with self:
                return op.reference(*args[:-1])
        if name in COMPOSED:
            with self:
                return COMPOSED[name](*args, **kwargs)
        result = func(*args, **kwargs)
        tensors = [a for a in args if isinstance(a, Tensor) and a.is_floating_point()]
        if not tensors or name in COPIES or not isinstance(result, Tensor) or not result.is_floating_point():
            return result
        if any(result.untyped_storage().data_ptr() == a.untyped_storage().data_ptr() for a in tensors):
            return result  # a view
        terms, factors = 1, 0.0
        if name in PRODUCTS:
            terms, factors = tensors[0].shape[-1], self.factors
        elif name in REDUCED:
            terms = tensors[0].numel() // max(result.numel(), 1)
        if terms > 1 or factors:
            off = terms**0.5 * self.unit + factors
            args = [self._moved(a, off, self.unit) if any(a is t for t in tensors) else a for a in args]
            result = func(*args, **kwargs)
        # Of how many results an element's gradient is the sum.
        uses = max(terms * result.numel() / max(a.numel(), 1) for a in tensors)
        return self._moved(result, self.unit, max(uses, 1.0) ** 0.5 * self.unit + factors)

    def _moved(self, x: Tensor, forward: float, backward: float) -> Tensor:
        return _Moved.apply(x, forward, backward, self.generator)


class _Moved(torch.autograd.Function):
    """Multiply by 1 +- forward at random, and the gradient by 1 +- backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: float, backward: float, generator: torch.Generator) -> Tensor:
        ctx.backward_by, ctx.generator = backward, generator
        return _at_random(x, forward, generator)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _at_random(grad, ctx.backward_by, ctx.generator), None, None, None


def _at_random(x: Tensor, by: float, generator: torch.Generator) -> Tensor:
    signs = torch.randint(0, 2, x.shape, generator=generator).to(x.device, x.dtype)
    return x * signs.mul_(2 * by).add_(1 - by)
