"""The accuracy rule of all tests: error <= 2 x error of the reference in the same dtype + a bound of rounding errors.

Errors are distances from the reference in float64. `rounding` derives the bound.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..ops._declare import DECLARED

Reference = Callable[[torch.dtype], Sequence[Tensor]]

DRAWS = 8
# Hoeffding: rounding takes a number beyond six times the mean square's root with probability 2 exp(-6^2 / 2) = 3e-8 at
# most, and the tests compare a few hundred thousand numbers.
SIGMAS = 6
CHAIN = 16  # operations in SAF's backward pass, the longest, between where its terms part and the weights they meet in
PRODUCTS = {"matmul", "__matmul__", "mm", "bmm", "mv", "dot", "linear"}
REDUCED = {"sum", "mean", "var", "norm", "vector_norm", "linalg_vector_norm", "logsumexp"}
LINEAR = {*PRODUCTS, "sum", "mean"}  # applied to absolute values, they give the sum of the absolute terms
COPIES = {"clone", "contiguous", "to", "double", "__getitem__"}  # these do not round
FLOAT32 = torch.finfo(torch.float32).eps


def assert_accurate(
    actual: Sequence[Tensor],
    reference: Reference,
    dtype: torch.dtype,
    *,
    products: torch.dtype | None = None,
    gradients: bool = False,
) -> None:
    """Assert the accuracy rule, error(actual) <= 2 x error(reference in `dtype`) + `rounding`, for every result.

    Errors are largest distances from the reference in float64.

    Args:
        actual: the results under test.
        reference: (a dtype to compute in) -> the reference's results, computed with operations of torch and of
            `itm_fast.ops` on inputs that were rounded to `dtype` first.
        dtype: the dtype of the inputs.
        products: the dtype that factors of matrix products may be rounded to first, if that is not `dtype`.
        gradients: whether the results are the gradients of one loss; see `rounding`.

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
    for term in rounding(
        reference, exact, dtype, products, gradients
    ):  # they grow, so errors that an early one allows are allowed by the last
        allowed = [2 * p + t for p, t in zip(plain, term, strict=True)]
        if all(error <= most for error, most in zip(errors, allowed, strict=True)):
            return
    for k, (error, most) in enumerate(zip(errors, allowed, strict=True)):
        assert error <= most, f"result {k} of {len(errors)}: error {error:.3g} exceeds {most:.3g}"


def rounding(
    reference: Reference,
    exact: Sequence[Tensor],
    dtype: torch.dtype,
    products: torch.dtype | None = None,
    gradients: bool = False,
) -> Iterator[list[float]]:
    """How far rounding alone may move a correct program's results from the exact ones: the accuracy rule's last term.

    Derivation. IEEE arithmetic rounds every operation: the computed v is (1 + d) times the exact one, |d| <= u, half
    the spacing of numbers at 1 (2^-53 in float64, 2^-24 in float32). To first order a result is therefore off by
    sum_k d_k df/dv_k over all operations k of the program. Roundings are as good as independent with mean zero (Higham
    and Mary, 2019), so by Hoeffding's inequality it passes lambda s, s^2 = sum_k (u df/dv_k)^2, with probability
    2 exp(-lambda^2 / 2) at most: see SIGMAS.

    A sum S of n terms x_i makes n - 1 partial sums T, one at each addition, and is off by sum_T d_T T. No partial sum
    is above A = sum_i |x_i|, in whatever order, in whatever blocks and of whatever signs the terms are, so s <=
    sqrt(n) u A. One by one, terms of one sign are off by nearly that much (sqrt(n / 3) u A where they are alike), for
    the first terms share the roundings of all later additions: n independent errors of the terms would not show it.

    s is measured, for it is the root of the mean square of what the results move by when each d_k is +u_k or -u_k at
    random. So the reference runs in float64, and after every operation each value is multiplied by 1 + u or 1 - u at
    random (Monte Carlo arithmetic; Parker, 1997), each term of a sum before likewise, and to a sum of n is added
    +- sqrt(n) u A. A is the same operation on absolute values; it is the sum itself within a norm and a
    variance.

    The backward pass is drawn likewise and on its own. With C results to which an element contributes, its gradient
    is a sum of C terms, but autograd hands over that sum S, not A. Take a partial sum T of m of the C terms, chosen at
    random: its mean square is at most (m / C) sum_i x_i^2 + (m / C)^2 S^2 (sampling without replacement). That is no
    more than sum_i x_i^2 + S^2, so s^2 <= C u^2 (sum_i x_i^2 + S^2) in any blocks, provided that the order of the
    terms has nothing to do with their signs; for terms of one sign |T| <= |S| in any order. So each term is multiplied
    by 1 +- sqrt(C) u, and so is their sum. That backward rounds independently is what shows where gradients cancel: for
    a caption of one word, whose affinity a is normalised to a / |a|, d a is the difference of two equal terms of size
    1 / |a|, which rounding leaves apart by u / |a| although the exact difference is next to nothing.

    All arithmetic in float16 and bfloat16 sums in float32 or better, so u is at most float32's there; the results
    themselves are stored in `dtype`, which the term's first part covers: u of `dtype` times the largest value.

    Gradients share what the backward pass makes on its way to them, and a right program may make it by another
    formula: sum beta d beta of SAF's weights is m . d m as well. Where one argument's gradient is a difference of such
    terms that cancel, autograd's own formula may cancel exactly, and then no draw shows what another leaves: up to the
    rounding of the terms over the chain of operations from there to the argument, CHAIN u of their size. The largest
    gradient of any argument stands for that size.

    A result is one tensor and has one allowance, that of its worst conditioned element. A mistake shows if it moves
    some element of the tensor by more: a dropped term, or eps inside the root, is off by a share of the value that has
    nothing to do with u. Where one element is so ill conditioned that its allowance exceeds that share of all the
    others, the mistake does not show: compare such elements apart, or choose inputs without them.

    Args:
        reference: see `assert_accurate`.
        exact: its results in float64.
        dtype: that of the inputs.
        products: see `assert_accurate`; its u is added to that of the factors.
        gradients: whether the results are the gradients of one loss.

    Yields:
        One number for each result: what storing it rounds; then, after each of `DRAWS` draws, that and `SIGMAS` s, s
        of the element where it is largest. The draws still to come count as zero in s: the numbers grow up to the
        last ones, which are the bound, and errors within earlier ones are within it. The random numbers are fixed.
    """
    unit = torch.finfo(dtype).eps / 2
    factors = 0.0 if products is None else torch.finfo(products).eps / 2
    stored = [unit * e.abs().max().item() if e.numel() else 0.0 for e in exact]
    if gradients:
        stored = [x + CHAIN * max(stored) for x in stored]
    squares = [torch.zeros_like(e) for e in exact]
    yield stored
    for seed in range(DRAWS):
        with _Drawn(min(unit, FLOAT32 / 2), factors, seed):
            moved = reference(torch.float64)
        squares = [q + (m.detach() - e).square() for q, m, e in zip(squares, moved, exact, strict=True)]
        largest = [(q / DRAWS).max().sqrt().item() if q.numel() else 0.0 for q in squares]
        yield [a + SIGMAS * b for a, b in zip(stored, largest, strict=True)]


def _distances(found: Sequence[Tensor], exact: Sequence[Tensor]) -> list[float]:
    pairs = zip(found, exact, strict=True)
    return [(f.detach().double() - e.double()).abs().max().item() if e.numel() else 0.0 for f, e in pairs]


def _softmax(x: Tensor, dim: int, **_: Any) -> Tensor:
    weights = (x - x.detach().amax(dim, keepdim=True)).exp()
    return weights / weights.sum(dim, keepdim=True)


def _normalize(x: Tensor, dim: int = 1, eps: float = 1e-12, **_: Any) -> Tensor:
    return x / torch.linalg.vector_norm(x, dim=dim, keepdim=True).clamp_min(eps)


def _quotient(x: Any, y: Any) -> Any:
    return x * (y.reciprocal() if isinstance(y, Tensor) else 1 / y)


# torch does these in one operation, whose gradient is a difference that may cancel exactly. Here they are several
# operations, each of which rounds. (If there is only one x, the gradients of both sides of x / sum(x) cancel.)
COMPOSED: dict[str, Callable[..., Tensor]] = {
    "softmax": _softmax,
    "normalize": _normalize,
    **dict.fromkeys(("__truediv__", "div", "true_divide", "divide"), _quotient),
}


class _Drawn(TorchFunctionMode):
    """In this mode every operation of torch rounds at random by `unit`, forward and backward, and factors of products
    are rounded at random by `factors` first; see `rounding`."""

    def __init__(self, unit: float, factors: float, seed: int) -> None:
        super().__init__()
        self.unit, self.factors, self.generator = unit, factors, torch.Generator().manual_seed(seed)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if getattr(func, "namespace", None) == "itm_fast":  # an op: run its reference, whose operations then round
            with self:
                return DECLARED[func._schema.name.split("::")[1]].reference(*args[:-1])
        if name in COMPOSED:
            with self:
                return COMPOSED[name](*args, **kwargs)
        result = func(*args, **kwargs)
        tensors = [a for a in args if isinstance(a, Tensor) and a.is_floating_point()]
        if not tensors or name in COPIES or not isinstance(result, Tensor) or not result.is_floating_point():
            return result
        if any(_is_view(result, a) for a in tensors):
            return result
        terms = 1
        factors = self.factors if name in PRODUCTS else 0.0
        if name in PRODUCTS:
            terms = tensors[0].shape[-1]
        elif name in REDUCED:
            terms = tensors[0].numel() // max(result.numel(), 1)
        # For each tensor, to how many results an element contributes: its gradient is a sum of so many terms.
        uses = [terms * result.numel() / max(a.numel(), 1) for a in tensors]
        most = max(1.0, *uses)
        if terms > 1 or factors or most > 1:
            off = factors + (self.unit if terms > 1 else 0.0)
            backward = [max(n, 1.0) ** 0.5 * self.unit for n in uses]
            moved = [self._moved(a, off, by) for a, by in zip(tensors, backward, strict=True)]
            result = func(*_replaced(args, tensors, moved), **kwargs)
        if terms > 1:
            result = result + terms**0.5 * self.unit * self._sizes(func, name, args, kwargs, result)
        return self._moved(result, self.unit, most**0.5 * self.unit + factors)

    @torch.no_grad()
    def _sizes(self, func: Any, name: str, args: Any, kwargs: Any, result: Tensor) -> Tensor:
        """The sum of the absolute terms of every sum, with a random sign."""
        if name in LINEAR:
            sizes = func(*[a.abs() if isinstance(a, Tensor) else a for a in args], **kwargs)
        else:
            sizes = torch.ones_like(result) if name == "logsumexp" else result  # a logarithm's error is absolute
        return sizes * _signs(sizes, self.generator)

    def _moved(self, x: Tensor, forward: float, backward: float) -> Tensor:
        return _Moved.apply(x, forward, backward, self.generator)


def _is_view(result: Tensor, a: Tensor) -> bool:
    """Whether the result is part of `a`; an expanded `a` is not, for its gradient is a sum."""
    return result.untyped_storage().data_ptr() == a.untyped_storage().data_ptr() and result.numel() <= a.numel()


def _replaced(args: Any, tensors: Sequence[Tensor], moved: Sequence[Tensor]) -> list[Any]:
    left = iter(moved)
    return [next(left) if any(a is t for t in tensors) else a for a in args]


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
    return x * _signs(x, generator).mul_(by).add_(1)


def _signs(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, like.shape, generator=generator).to(like.device, like.dtype).mul_(2).sub_(1)
