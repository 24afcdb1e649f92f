"""The `cpu` backend: calls the C++ kernels of csrc/cpu with an op's tensors and options in one struct (`_calls`).

C++ reads and writes wherever the struct points. So tensors are made contiguous here, and cu_seqlens and region_lengths
are checked in every call.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping, Sequence
from types import MappingProxyType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .. import _native
from .._checks import matmul_precision, work_dtype
from ..packing import bounds, region_counts
from . import _attention, _calls
from ._declare import CPU_ONLY, DECLARED, Choice, Counts, Declaration, Floats

DTYPES = {getattr(torch, name): code for code, name in enumerate(_calls.ENUMS["Dtype"])}
BFLOAT16 = {  # ops whose products may multiply bfloat16 values
    "cross_attention_score", "cross_attention_similarity", "hierarchical_alignment_score",
    "hierarchical_alignment_score_kept", "linear", "similarity_filter_score", "similarity_graph",
    "similarity_graph_head", "similarity_graph_score", "similarity_graph_score_kept", "similarity_nodes",
    "similarity_nodes_of_pairs",
}  # fmt: skip
# Gradients that C++ overwrites, in the dtype of the tensor. To all others it adds, so they begin as zeros.
WRITTEN = {
    "similarity_context": ("overall", "local"),
    "similarity_filter": ("nodes",),
    "similarity_graph": ("nodes",),
    "similarity_graph_head": ("nodes",),
}
IN_PLACE = {"similarity_graph_head"}  # ops whose gradients in `WRITTEN` take the place of their contiguous tensors
IN_FLOAT64 = {"similarity_context", "similarity_filter"}  # ops that sum gradients in float64; others in `work_dtype`
LEAVES_OUT = {"cross_attention_score"}  # ops whose backward in C++ leaves out pairs that have no gradient
TOGETHER = {"similarity_graph", "similarity_graph_head"}  # ops that sum the gradients of all parameters, or of none


def bfloat16_products(dtype: torch.dtype) -> bool:
    """Whether C++ converts factors of products to bfloat16: for bfloat16 inputs, and for float32 inputs when torch's
    matmul precision is "medium", if the processor has instructions that make this faster.

    Forward and backward round the factors of affinities too, as rounding the inputs would, so gradients are those of
    slightly other attention weights.
    """
    allowed = dtype == torch.bfloat16 or (dtype == torch.float32 and matmul_precision() == "medium")
    return allowed and _native.bfloat16_products()[0]


class Calls:
    """The calls of an op's two C++ functions, `<op>` and `<op>_backward`.

    Args:
        op: its declaration.
        said: the op's name in messages, if it is not `op.name`.
        more: option -> values that C++ takes in addition to the declared choices.
    """

    def __init__(
        self, op: Declaration, said: str | None = None, more: Mapping[str, tuple[str, ...]] = MappingProxyType({})
    ) -> None:
        self.op, self.said, self.struct = op, said or op.name, _calls.struct(op)
        self.bfloat16, self.leaves_out = op.name in BFLOAT16, op.name in LEAVES_OUT
        self.sizes = [letter for letter in _calls.SIZES if letter in op.places]
        self.packed = next((letter for letter in "NM" if letter in op.places), "")  # the rows that cu_seqlens bounds
        # Positions of the arguments that are converted before the call.
        self.no_results = [None] * len(op.written)
        self.written = [name in WRITTEN.get(op.name, ()) for name in op.names[: op.differentiable]]
        rows = list(enumerate(op.arguments))
        self.floats = [k for k, a in rows if isinstance(a, Floats)]
        self.fixed = [k for k, a in rows if isinstance(a, Floats) and a.fixed]
        self.bounds = [k for k, a in rows if a.name == "cu_seqlens"]
        self.regions = [k for k, a in rows if a.name == "region_lengths"]
        self.counts = [k for k, a in rows if isinstance(a, Counts)]
        self.codes = [
            (k, {value: _calls.ENUMS[a.enum].index(value) for value in (*a.choices, *more.get(a.name, ()))})
            for k, a in rows
            if isinstance(a, Choice)
        ]

    def forward(self, *args: Any) -> Any:
        size = self.op.size(args)
        results = self.op.empty(args, "cpu", size)
        written = [results] if isinstance(results, Tensor) else results
        self._call(self.op.name, args, size, [*written, *self.no_results[len(written) :]])
        return results

    def forward_trained(self, *args: Any) -> tuple[Tensor, Tensor]:
        """The result, and the op's `trained`, which backward takes as `results`."""
        results = self.op.empty_trained(args, "cpu")
        self._call(self.op.name, args, self.op.size(args), results)
        return results

    def forward_sum(self, terms: Sequence[Sequence[Any]]) -> Tensor:
        """The sum of the results of several calls, whose arguments differ in options only, by `<op>_sum`."""
        size = self.op.size(terms[0])
        result = self.op.empty(terms[0], "cpu", size)
        assert isinstance(result, Tensor)
        filled = [self._filled(args, size, [result, *self.no_results[1:]], ()) for args in terms]
        calls = (self.struct * (len(terms) + 1))(*(call for call, _ in filled))  # the last one, of zeros, ends them
        _native.call(f"{self.op.name}_sum", calls)
        return result

    def backward(
        self, grad: Tensor, needs: Sequence[bool], *args: Any, results: Sequence[Tensor] | None = None
    ) -> list[Tensor]:
        op, work = self.op, work_dtype(args[0])
        # Here, not in `_filled`, as with IN_PLACE these are what C++ writes and the caller gets.
        args = (*(x.contiguous() if w else x for x, w in zip(args, self.written)), *args[op.differentiable :])
        sums = torch.float64 if op.name in IN_FLOAT64 else work
        made = needs
        if op.name in TOGETHER and any(need and not written for need, written in zip(needs, self.written)):
            made = [need or not written for need, written in zip(needs, self.written)]
        gradients = [
            None if not make else self._written(x) if written else torch.zeros(x.shape, dtype=sums, device="cpu")
            for x, make, written in zip(args, made, self.written)
        ]
        grad = (grad.to(work) if op.pairs else grad).contiguous()
        known = [*self.no_results, *(results or ())][len(results or ()) :]
        self._call(f"{op.name}_backward", args, op.size(args), known, [grad, *gradients])
        return [d for d, need in zip(gradients, needs) if need]  # type: ignore[misc]

    def _written(self, x: Tensor) -> Tensor:
        """Where C++ writes the gradient of x."""
        return x if self.op.name in IN_PLACE else x.new_empty(x.shape)

    def _call(
        self,
        function: str,
        args: Sequence[Any],
        size: dict[str, int],
        results: Sequence[Tensor | None],
        gradients: Sequence[Tensor | None] = (),
    ) -> None:
        call, _kept = self._filled(args, size, results, gradients)
        _native.call(function, ctypes.byref(call))

    def _filled(
        self,
        args: Sequence[Any],
        size: dict[str, int],
        results: Sequence[Tensor | None],
        gradients: Sequence[Tensor | None],
    ) -> tuple[ctypes.Structure, list[Tensor]]:
        """The struct of a call, and the tensors that it points to, which the caller keeps until C++ has returned."""
        op, values = self.op, list(args)
        for k in self.floats:
            if values[k] is not None:
                values[k] = values[k].contiguous()
        for k in self.fixed:
            values[k] = values[k].to(torch.float64)
        for k in self.bounds:
            values[k] = _integers(bounds(args[k], size[self.packed], self.said))
            if len(values[k]) != size["T"] + 1:
                raise ValueError(f"{self.said}: cu_seqlens must be [T+1] with T = {size['T']}, got [{len(values[k])}]")
        for k in self.regions:
            if args[k] is not None:
                values[k] = _integers(region_counts(args[k], args[0], self.said))
        for k in self.counts:
            values[k] = _integers(args[k])
        for k, codes in self.codes:
            if args[k] not in codes:
                raise ValueError(f"{self.said}: {op.names[k]} must be one of {', '.join(codes)}, got {args[k]!r}")
            values[k] = codes[args[k]]
        if not gradients and op.backward is None:
            gradients = [None] * (1 + op.differentiable)
        _same_structs()
        values += [None if x is None else x.contiguous() for x in results]
        values += gradients
        given = [x for x in values if isinstance(x, Tensor)]
        assert all(x.is_cpu and x.is_contiguous() for x in given), f"{self.said}: tensors must be in host memory"
        call = self.struct(
            *[x.data_ptr() if isinstance(x, Tensor) else x for x in values],
            DTYPES[args[0].dtype],
            *[size[letter] for letter in self.sizes],
            self.bfloat16 and bfloat16_products(args[0].dtype),
            torch.get_num_threads(),
        )
        return call, given


def _integers(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device="cpu")


@functools.cache
def _same_structs() -> None:
    """Raise a RuntimeError where the library was compiled with other structs than these."""
    _native.call("itm_calls", ctypes.c_char_p(_calls.digest().encode()))


@functools.cache
def implementation(name: str) -> Any:
    """An op's forward and backward pass in C++."""
    if name != "global_local_score":
        return Calls(DECLARED.get(name) or CPU_ONLY[name], said=name.removesuffix("_kept"))
    # Direction i2t with images of one region, the vector, which attends to words; affinities are cosines.
    calls = Calls(DECLARED["cross_attention_score"], said=name, more={"affinity_norm": ("cosine",)})

    def arguments(vector: Tensor, words: Tensor, cu_seqlens: Tensor, scale: float) -> tuple[Any, ...]:
        return vector[:, None], words, cu_seqlens, None, "i2t", "cosine", scale, "sum", 1.0, *_attention.DEFAULT

    def forward(*args: Any) -> Tensor:
        return calls.forward(*arguments(*args))

    def backward(grad: Tensor, needs: Sequence[bool], vector: Tensor, *rest: Any) -> list[Tensor]:
        found = calls.backward(grad, needs, *arguments(vector, *rest))
        return [found[0].view(vector.shape), *found[1:]] if needs[0] else found

    return SimpleNamespace(forward=forward, backward=backward, leaves_out=calls.leaves_out)


def score_sum(
    image: Tensor,
    words: Tensor,
    cu_seqlens: Tensor,
    region_lengths: Tensor | None,
    terms: Sequence[Mapping[str, Any]],
) -> Tensor:
    """The sum over the terms of `cross_attention_score` with a term's options, from one pass over the affinities.

    Args:
        image: [I, R, D], as the other tensors in host memory.
        words: [N, D].
        cu_seqlens: [T + 1].
        region_lengths: [I] or None.
        terms: all options of the op in each, with one direction.

    Raises:
        ValueError, TypeError: as `cross_attention_score`.
    """
    op = DECLARED["cross_attention_score"]
    tensors: dict[str, Any] = {
        "image": image,
        "words": words,
        "cu_seqlens": cu_seqlens,
        "region_lengths": region_lengths,
    }
    given = [tensors | dict(term) for term in terms]
    for one in given:
        op.check(one)
    return implementation(op.name).forward_sum([op.convert(one) for one in given])


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [N, K], weight [S, K] and bias [S] -> x W^T + b [N, S]: a row's bits depend on neither the rows beside it nor
    the number of threads."""
    return implementation(_calls.LINEAR.name).forward(x, weight, bias)


def linear_backward(
    grad: Tensor, needs: Sequence[bool], x: Tensor, weight: Tensor, bias: Tensor | None
) -> list[Tensor]:
    """The gradients of x, weight and bias that `needs` marks, from that of `linear`'s result."""
    return implementation(_calls.LINEAR.name).backward(grad, needs, x, weight, bias)


def gated_rows(queries: Tensor, products: Tensor, attended: Tensor, unit: bool) -> Tensor:
    """IMRAM's gate (`models._rows.gated`): queries [B, Q, D], products [B, Q, 2 D], attended [B, C, Q, P]
    -> [B, C, Q, D]."""
    return implementation(_calls.GATED_ROWS.name).forward(queries, products, attended, unit)


def row_cosines(queries: Tensor, attended: Tensor) -> Tensor:
    """Cosines [B, C, Q] of queries [B, Q, D] with the first D values of attended [B, C, Q, P]."""
    return implementation(_calls.ROW_COSINES.name).forward(queries, attended)


def score(op: Declaration, **given: Any) -> Tensor:
    """The scores [I, T] of a declaration that is C++'s only, from arguments given by name.

    Raises:
        ValueError: a shape or an option is wrong.
        TypeError: a dtype is wrong.
    """
    op.check(given)
    return implementation(op.name).forward(*op.convert(given))
