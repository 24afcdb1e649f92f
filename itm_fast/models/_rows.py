"""A linear map, a sigmoid, a gate and cosines for rows that belong to one image, one caption or one pair each.

If the `cpu` backend scores and no gradient is recorded, they run in C++ (csrc/cpu/linear.cpp, gated_rows.cpp,
row_cosines.cpp). A row's bits then depend on neither the other rows nor the number of threads, so that a pair's score
does not either. Otherwise torch computes them, with its fastest library, except linear maps at matmul precision
"medium" on processors that multiply bfloat16 values but have no AMX: torch multiplies float32 values there. C++ takes
half as long for 4,608 rows with 1,024 inputs and outputs (Zen 4), and 1.15 times as long for 96; it takes few rows too,
so that their number does not decide how their products are rounded.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import _native
from .._backends import requested
from .._checks import FLOATS, autocast_unites, plain, work_dtype
from ..ops import _cpu_calls
from ..ops._torch._linear import linear as by_torch
from ._common import cosine, l2norm

OUTPUTS = 32  # the least for which a training step's products of bfloat16 values pay


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Rows [..., K], weight [S, K] and bias [S] -> [..., S], as torch.nn.functional.linear.

    Raises:
        ValueError: the sizes do not fit.
        TypeError: the dtypes differ.
    """
    K, S = x.shape[-1], len(weight)
    if weight.shape != (S, K) or (bias is not None and bias.shape != (S,)):
        sizes = " and ".join(str(list(t.shape)) for t in (weight, bias) if t is not None)
        raise ValueError(
            f"features of size {K} cannot be multiplied by weights {sizes}; image, words and model must have the same "
            "sizes"
        )
    given = (x, weight, *(() if bias is None else (bias,)))
    for t in given[1:]:
        if t.dtype != x.dtype and not autocast_unites(t.dtype, x.dtype, x.device):
            raise TypeError(
                f"features of {x.dtype} cannot be multiplied by weights of {t.dtype}; image, words and model must have "
                "one dtype: convert one of them with .to(dtype)"
            )
    if apart(*given):
        product = _cpu_calls.linear
    elif S >= OUTPUTS and _in_cpp(*given) and _rounded(x.dtype):
        product = _Linear.apply
    else:
        return by_torch(x, weight, bias)
    return product(x.reshape(-1, K), weight, bias).view(*x.shape[:-1], S)


class _Linear(torch.autograd.Function):
    """x [N, K], weight [S, K] and bias [S] -> x W^T + b [N, S], forward and backward in C++."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _cpu_calls.linear(x, weight, bias)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad: Tensor):
        needs = ctx.needs_input_grad
        if torch.is_grad_enabled():  # there will be second derivatives, which torch finds
            x, weight, _ = ctx.saved_tensors
            wanted = (lambda: grad @ weight, lambda: grad.T @ x, lambda: grad.sum(0))
            return tuple(of() if need else None for of, need in zip(wanted, needs, strict=True))
        found = iter(_cpu_calls.linear_backward(grad, needs, *ctx.saved_tensors))
        return tuple(next(found) if need else None for need in needs)


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + e^-x), in float32 or better; torch.sigmoid rounds the last elements of a tensor differently."""
    return (1 / (1 + (-x.to(work_dtype(x))).exp())).to(x.dtype) if apart(x) else x.sigmoid()


def gated(query: Tensor, product: Tensor, attended: Tensor, unit: bool) -> Tensor:
    """IMRAM's refined queries g q + (1 - g) tanh(o), where o and, before its sigmoid, g are product + attended[-2 D:].

    Args:
        query: [..., D]; its dimensions are those of `attended`, but one of them may be 1, or the first ones missing,
            where rows share a query.
        product: [..., 2 D] with the same dimensions: what the query adds to o and g.
        attended: [..., P] with P >= 2 D.
        unit: scale the result to unit length.

    Raises:
        ValueError: the last dimensions do not fit.

    Returns:
        [..., D], a row for each of `attended`.
    """
    D = query.shape[-1]
    if product.shape[-1] != 2 * D or attended.shape[-1] < 2 * D:
        sizes = f"{product.shape[-1]} and {attended.shape[-1]}"
        raise ValueError(f"product must be [..., {2 * D}], and attended no narrower, got {sizes}")
    if apart(query, product, attended):
        own, every = _shared(query, attended)
        refined = _cpu_calls.gated_rows(own, product.reshape(*own.shape[:2], 2 * D), every, unit)
        return refined.view(*attended.shape[:-1], D)
    candidate, gate = (product + attended[..., -2 * D :]).split(D, -1)
    gate = gate.sigmoid()
    refined = gate * query + (1 - gate) * candidate.tanh()
    return l2norm(refined) if unit else refined


def cosines(query: Tensor, attended: Tensor) -> Tensor:
    """Cosines [...] of queries [..., D], which rows may share as in `gated`, with the first D values of attended
    [..., P].

    Raises:
        ValueError: P is less than D.
    """
    if attended.shape[-1] < query.shape[-1]:
        raise ValueError(f"attended must be [..., {query.shape[-1]} or more], got {attended.shape[-1]}")
    if apart(query, attended):
        return _cpu_calls.row_cosines(*_shared(query, attended)).view(attended.shape[:-1])
    return cosine(query, attended[..., : query.shape[-1]])


def _shared(query: Tensor, attended: Tensor) -> tuple[Tensor, Tensor]:
    """query [B, Q, D] and attended [B, C, Q, P], of which C rows share a query."""
    rows = attended.shape[:-1]
    few = (*[1] * (attended.dim() - query.dim()), *query.shape[:-1])
    k = next((k for k, (a, b) in enumerate(zip(few, rows, strict=True)) if a != b), None)
    B, C, Q = (1, 1, math.prod(rows)) if k is None else (math.prod(rows[:k]), rows[k], math.prod(rows[k + 1 :]))
    return query.reshape(B, Q, query.shape[-1]), attended.reshape(B, C, Q, attended.shape[-1])


def apart(*tensors: Tensor) -> bool:
    """Whether each row is computed apart from the others: the `cpu` backend scores, and no gradient is recorded."""
    return not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors)) and _in_cpp(*tensors)


def _rounded(dtype: torch.dtype) -> bool:
    """Whether linear maps with gradients are faster in C++, by bfloat16 values: torch multiplies them with AMX only."""
    built = _native.outcome()
    return (
        dtype == torch.float32
        and _cpu_calls.bfloat16_products(dtype)
        and isinstance(built, _native.Build)
        and built.level == "avx512_bf16"
    )


def _in_cpp(*tensors: Tensor) -> bool:
    """Whether the `cpu` backend scores, and C++, which reads their memory, takes these tensors."""
    return (
        plain(*tensors)
        and not torch.is_autocast_enabled("cpu")
        and all(x.device.type == "cpu" and x.dtype == tensors[0].dtype in FLOATS for x in tensors)
        and requested() in ("auto", "cpu")
        and _native.why_not() is None
    )
