"""Score every image with every caption: SGRAF's two pair scorers, from encoded images and captions to the score.

For one pair, with the global vectors `v` and `t` of its image and caption, a scorer equals this program:

    P = l2norm(((scale * clipped_l2norm(regions @ words.T, dim=1)).softmax(0)).T @ regions)
    X = l2norm(torch.cat([linear((v - t).square(), Wg, bg)[None], linear((P - words).square(), Wl, bl)]))
    score = sigmoid(head(X) @ we + be)

The head turns the nodes X into one vector. In `similarity_graph_score` (SGR) it is `similarity_graph`; in
`similarity_filter_score` (SAF) it is `similarity_filter` in evaluation, with running statistics. In training SAF's
statistics are over one caption with all images, so its score is not a function of one pair.

Forward:

    X     = (1) and (2) of `similarity_nodes`                            [L + 1, S]             (1)
    z     = node 0 of (1) and (2) of `similarity_graph`, or (1) to (4) of `similarity_filter`   (2)
    score = sigmoid(a),   a = w_e . z + b_e                                                     (3)

With `output="logit"` the result is a, which no sigmoid rounds to 0 or 1: losses that take logits need it.

Each pair is computed on its own. So nodes are computed and go through the head block by block, and only scores are
written to memory.

Backward, with g the gradient of a pair's result:

    d a = g score (1 - score), or g for the logit                                               (4)
    d w_e = sum da z,   d b_e = sum da,   d z = da w_e
    d X and the gradients of the head's parameters follow as in (4) to (7) of `similarity_graph`,
    or as in (5) to (8) and (10) of `similarity_filter`                                         (5)
    all other gradients follow from d X as in the backward pass of `similarity_nodes`           (6)

Saved for backward: the inputs, and by (2) with a graph in the cpu backend the nodes of the first images, as many as
an eighth of the scratch memory holds. Everything else per pair is computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from .._backends import autocast_dtype
from .._checks import work_dtype
from .._names import Backend, Output
from .._workspace import current_gib, scratch_bytes, workspace
from ..packing import kept, node_bounds, spans
from . import _attention, _draws
from ._cpu_calls import implementation
from ._declare import Argument, Choice, Counts, Floats, Given, Integers, Positive, Result, cpu_only
from ._register import Op, refuse_second
from .similarity_filter import reference as filtered
from .similarity_graph import PARAMETERS, refuse
from .similarity_graph import reference as reasoned
from .similarity_nodes import INPUTS, OF_PAIRS, REST
from .similarity_nodes import reference as make_nodes

OFFERED = ("triton", "cuda", "cpu", "torch", "reference")
SCORE = Floats("score_weight", "S"), Floats("score_bias", "1")
OUTPUT = (Choice("output", _attention.OUTPUTS, "Output"),)
CPU_NODES = 192 << 20  # bytes of the nodes and of their gradients, of the pairs that the `cpu` backend takes at a time
MOST_KEPT = 96 << 20  # bytes of the nodes that `cpu` keeps for the backward pass; at most 1/8 of the scratch memory
FEW = 2  # `cpu` leaves out pairs without a gradient where at most one in 2 has one


@dataclass(frozen=True)
class Head:
    """An op that turns a pair's nodes into one vector z [S], and the arguments that a scorer passes to it.

    Attributes:
        op: its name.
        reference: its reference.
        vectors: (run, nodes, bounds, parameters, statistics, options) -> z [I, T, S], where `run` is the op or its
            reference.
        draw: makes an example's parameters and statistics.
        parameters: its differentiable arguments.
        statistics: its other tensors.
        options: its arguments that are not tensors.
        refuse: as in `Declaration`.
    """

    op: str
    reference: Callable[..., Any]
    vectors: Callable[..., Tensor]
    draw: _draws.Example
    parameters: tuple[Argument, ...]
    statistics: tuple[Argument, ...] = ()
    options: tuple[Argument, ...] = ()
    refuse: Callable[[dict[str, int], Given], str | None] | None = None

    @property
    def groups(self) -> tuple[tuple[Argument, ...], ...]:
        """The scorer's arguments by group, in the order of the registered op."""
        return INPUTS, self.parameters, SCORE, self.statistics, REST, self.options, OUTPUT

    def split(self, args: Sequence[Any]) -> list[list[Any]]:
        """The values of a call's arguments, a list for each group."""
        values = iter(args)
        return [list(islice(values, len(group))) for group in self.groups]


def _graph(run: Callable[..., Any], nodes: Tensor, bounds: Tensor, parameters, statistics, options) -> Tensor:
    return run(nodes, *parameters, bounds)


def _filter(run: Callable[..., Any], nodes: Tensor, bounds: Tensor, parameters, statistics, options) -> Tensor:
    return run(nodes, *parameters, *(x.to(nodes.dtype) for x in statistics), bounds, False, *options)[0]


GRAPH = Head("similarity_graph", reasoned, _graph, _draws.graph_weights, PARAMETERS, refuse=refuse)
FILTER = Head(
    "similarity_filter",
    filtered,
    _filter,
    _draws.filter_weights,
    (Floats("filter_weight", "S"), Floats("filter_bias", "1"), Floats("norm_weight", "1"), Floats("norm_bias", "1")),
    (Floats("running_mean", "1", fixed=True), Floats("running_var", "1", fixed=True)),
    (Positive("eps"),),
)


def _result(output: str, z: Tensor, score_weight: Tensor, score_bias: Tensor) -> Tensor:
    """(3): z [I, T, S] -> [I, T]."""
    logit = z @ score_weight + score_bias
    return logit if output == "logit" else logit.sigmoid()


def reference(head: Head, *args: Any) -> Tensor:
    """(1) to (3): the references of `similarity_nodes` and of the head, then the score."""
    inputs, parameters, score, statistics, rest, options, (output,) = head.split(args)
    nodes, _ = make_nodes(*inputs, *rest)
    z = head.vectors(head.reference, nodes, node_bounds(rest[0]), parameters, statistics, options)
    return _result(output, z, *score)


class _Part(NamedTuple):
    """Some pairs, as images [I] that are all paired with captions [T], in the backward pass.

    Attributes:
        images: where the gradients of their image and image_global belong.
        nodes: [I, M, S], computed again.
        bounds: [T + 1] of the captions' nodes.
        grad: [I, T], the gradient of their results.
        back: d_nodes -> the gradients of the inputs that need one.
    """

    images: slice
    nodes: Tensor
    bounds: Tensor
    grad: Tensor
    back: Callable[[Tensor], list[Tensor]]


def _some_images(
    backend: str,
    grad: Tensor,
    needs: Sequence[bool],
    inputs: Sequence[Tensor],
    rest: Sequence[Any],
    most: int,
    held: Sequence[Tensor],
) -> Iterator[_Part]:
    """All pairs: as many images at a time as have at most `most` nodes, one at the least; twice as many of those whose
    nodes are held."""
    cu_seqlens, region_lengths, scale = rest
    size, known = max(1, most // max(1, len(inputs[2]) + len(inputs[3]))), len(held[0]) if held else 0
    later = (slice(known + at.start, known + at.stop) for at in spans(len(grad) - known, size))
    for images in (*spans(known, 2 * size), *later):
        part: list[Any] = [inputs[0][images], inputs[1][images], *inputs[2:]]
        part += [cu_seqlens, None if region_lengths is None else region_lengths[images], scale]
        if images.start < known:
            nodes, saved = (x[images] for x in held)
        else:
            nodes, saved = torch.ops.itm_fast.similarity_nodes.default(*part, backend)

        def back(d_nodes, part=part, results=(nodes, saved)):
            return torch.ops.itm_fast.similarity_nodes_backward.default(d_nodes, needs, *part, list(results), backend)

        yield _Part(images, nodes, node_bounds(cu_seqlens), grad[images], back)


def _few_pairs(
    grad: Tensor, needs: Sequence[bool], inputs: Sequence[Tensor], rest: Sequence[Any], most: int
) -> Iterator[_Part]:
    """The pairs that have a gradient, in C++, as one image with as many captions: at most `most` nodes at a time."""
    run, all_images, all_captions = implementation(OF_PAIRS.name), *grad.nonzero(as_tuple=True)
    edge = torch.nn.functional.pad((rest[0].diff().long() + 1)[all_captions].cumsum(0), (1, 0))
    start = 0
    while start < len(all_images):
        stop = max(start + 1, int(torch.searchsorted(edge, edge[start] + most, right=True)) - 1)
        image, caption, bounds = all_images[start:stop], all_captions[start:stop], edge[start : stop + 1] - edge[start]
        args = *inputs, *rest, image, caption, bounds
        nodes, saved = run.forward(*args)

        def back(d_nodes, args=args, results=(nodes, saved)):
            return run.backward(d_nodes[0], needs, *args, results=results)

        yield _Part(slice(None), nodes[None], bounds, grad[image, caption][None], back)
        start = stop


def _backward(
    head: Head, backend: str, grad: Tensor, needs: Sequence[bool], *args: Any, held: list[Tensor] | None = None
) -> list[Tensor]:
    """(4) to (6) by the backward passes of `similarity_nodes` and of the head in `backend`, some pairs at a time.

    The nodes of these pairs are computed again first, unless they are in `held`: nodes and `inverse` of the first
    images. The list is emptied if they are of no use.
    """
    inputs, parameters, score, statistics, rest, options, (output,) = head.split(args)
    n, work = len(inputs), work_dtype(grad)
    # Triton's kernels multiply what the inputs' dtype holds; the C++ ones widen all they read.
    made = grad.dtype if backend == "triton" else work
    tensors = [x.detach().to(made) for x in (*inputs, *parameters, *score)]
    total = [torch.zeros_like(x, dtype=work) if need else None for x, need in zip(tensors, needs, strict=True)]
    inputs, D, S = tensors[:n], tensors[0].shape[2], len(tensors[4])
    grad = grad.to(made)
    # The nodes and their gradients take half of the scratch, and the ops that run on them the other.
    room, wanted = scratch_bytes(grad.device) // 2, needs[:n]
    if backend == "cpu":
        room = min(room, CPU_NODES)
    if backend == "cpu" and grad.count_nonzero() * FEW <= grad.numel():
        if held:
            held.clear()
        parts = _few_pairs(grad, wanted, inputs, rest, room // ((2 * S + D) * made.itemsize or 1))
    else:
        parts = _some_images(backend, grad, wanted, inputs, rest, room // (2 * S * made.itemsize or 1), held or ())
    with workspace(current_gib() / 2):
        for part in parts:
            of_head = [any(wanted), *needs[n:]]
            found = _through_head(head, backend, part, of_head, tensors[n:], statistics, options, output)
            d_inputs = part.back(found.pop(0)) if any(wanted) else []
            added = iter([*d_inputs, *found])
            for k, whole in enumerate(total):
                if whole is not None:
                    (whole[part.images] if k < 2 else whole).add_(next(added))
    return [x for x in total if x is not None]


def _through_head(
    head: Head, backend: str, part: _Part, needs: Sequence[bool], tensors, statistics, options, output: str
) -> list[Tensor]:
    """(4) and (5): the gradients of the nodes, of the head's parameters and of the score's that `needs` marks."""
    if backend == "cpu" and head is GRAPH:
        run = implementation(GRAPH_HEAD.name)
        return run.backward(part.grad, needs, part.nodes, *tensors, part.bounds, output)
    op = partial(getattr(torch.ops.itm_fast, head.op).default, backend=backend)
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_(need) for x, need in zip((part.nodes, *tensors), needs, strict=True)]
        z = head.vectors(op, leaves[0], part.bounds, leaves[1:-2], statistics, options)
        result = _result(output, z, *leaves[-2:])
    return list(torch.autograd.grad(result, [x for x in leaves if x.requires_grad], part.grad))


def _too_large(name: str, backend: str, size: dict[str, int], given: Given) -> str | None:
    """Why the CUDA kernels cannot take a call's arguments, one sentence; None if they can, and for other backends."""
    problem, edge = _attention.too_large(backend, size, given), given["cu_seqlens"]
    if problem or backend != "cuda" or edge.device.type == "cpu" or torch.compiler.is_compiling() or is_fake(edge):
        return problem
    from ._cuda.similarity_score import why_not

    capability, words = torch.cuda.get_device_capability(edge.device), kept(edge, "longest", _attention.longest)
    return why_not(name, autocast_dtype(given["image"].dtype, edge.device), size, words, capability)


def _op(name: str, head: Head, keeping: Callable[..., Tensor] | None = None) -> Op:
    """Declare the pair scorer with a head; `keeping`: see `Op`."""
    parts = _draws.node_inputs, head.draw, _draws.score_weights
    return Op(
        name,
        [argument for group in head.groups for argument in group],
        [Result("score", "I T")],
        stem="similarity_score",
        offered=OFFERED,
        reference=partial(reference, head),
        examples=[lambda size, draw: [x for part in parts for x in part(size, draw)]],
        refuse=head.refuse,
        too_large=partial(_too_large, name),
        backward=partial(_backward, head),
        keeping=keeping,
    )


def _kept_rows(size: dict[str, int], given: Given) -> tuple[int, ...]:
    return given["kept"][0], size["N"] + size["T"]


def _kept_nodes(size: dict[str, int], given: Given) -> tuple[int, ...]:
    return (*_kept_rows(size, given), size["S"])


# The backward pass of (2), with the graph as head, and of (3): from nodes on.
GRAPH_HEAD = cpu_only(
    "similarity_graph_head",
    [Floats("nodes", "I M S"), *PARAMETERS, *SCORE, Integers("cu_seqlens", "T+1"), *OUTPUT],
    [Result("score", "I T")],
)
# Forward, which keeps the nodes of the first `kept[0]` images and what their backward pass needs beside them.
KEPT = cpu_only(
    "similarity_graph_score_kept",
    [*(argument for group in GRAPH.groups for argument in group), Counts("kept")],
    [Result("score", "I T"), Result("nodes", _kept_nodes, wide=True), Result("inverse", _kept_rows, wide=True)],
    backward="torch",
)


class _Keeping(torch.autograd.Function):
    """`similarity_graph_score` in C++ where a gradient may be asked for: some images' nodes are kept for backward."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        image, words, caption_global, weight = args[0], args[2], args[3], args[4]
        row = (len(words) + len(caption_global)) * (len(weight) + 1) * work_dtype(image).itemsize
        room = min(MOST_KEPT, scratch_bytes(image.device) // 8)
        images = min(len(image), room // (row or 1))
        score, *ctx.held = implementation(KEPT.name).forward(*args, [images])
        ctx.scratch, ctx.is_tensor = current_gib(), [isinstance(a, Tensor) for a in args]
        ctx.save_for_backward(*(a for a in args if isinstance(a, Tensor)))
        ctx.rest = [a for a in args if not isinstance(a, Tensor)]
        return score

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        refuse_second(_graph_op.name)
        tensors, rest = iter(ctx.saved_tensors), iter(ctx.rest)
        args = [next(tensors) if t else next(rest) for t in ctx.is_tensor]
        needs = ctx.needs_input_grad[: _graph_op.differentiable]
        with workspace(ctx.scratch * 7 / 8), torch.autocast("cpu", enabled=False):
            held, ctx.held = ctx.held, []  # freed as soon as they are of no use; a second backward pass does without
            found = iter(_backward(GRAPH, "cpu", grads[0], needs, *args, held=held))
        return (*(next(found).to(x.dtype) if n else None for x, n in zip(args, ctx.needs_input_grad)),)


_graph_op = _op("similarity_graph_score", GRAPH, keeping=_Keeping.apply)
_filter_op = _op("similarity_filter_score", FILTER)


@_graph_op.public
def similarity_graph_score(
    image: Tensor,
    image_global: Tensor,
    words: Tensor,
    caption_global: Tensor,
    cu_seqlens: Tensor,
    local_weight: Tensor,
    local_bias: Tensor,
    global_weight: Tensor,
    global_bias: Tensor,
    query_weight: Tensor,
    query_bias: Tensor,
    key_weight: Tensor,
    key_bias: Tensor,
    value_weight: Tensor,
    value_bias: Tensor,
    score_weight: Tensor,
    score_bias: Tensor,
    *,
    scale: float = 9.0,
    region_lengths: Tensor | None = None,
    output: Output = "score",
    backend: Backend | None = None,
) -> Tensor:
    """Score all pairs as SGRAF with its graph reasoning does (SGR), from encoded images and captions.

    The parameters of the graph are those of `itm_fast.similarity_graph`.

    Args:
        image: [I, R, D] region features, float64, float32, float16 or bfloat16.
        image_global: [I, D] one global vector per image. All floating-point tensors have one dtype and device.
        words: [N, D] packed word features, same dtype and device; see `itm_fast.pack`.
        caption_global: [T, D] one global vector per caption.
        cu_seqlens: [T + 1] int32 or int64: caption t is `words[cu_seqlens[t]:cu_seqlens[t + 1]]`.
        local_weight: [S, D] of the linear layer W_l, for the similarity of words and what they attend to.
        local_bias: [S].
        global_weight: [S, D] of the linear layer W_g, for the similarity of the global vectors.
        global_bias: [S].
        query_weight: [K, S, S], one matrix per step, like the five parameters that follow.
        query_bias: [K, S].
        key_weight: [K, S, S].
        key_bias: [K, S]. It has no effect on the result, and its gradient is zero.
        value_weight: [K, S, S].
        value_bias: [K, S].
        score_weight: [S] of the projection to the score.
        score_bias: [1].
        scale: inverse temperature of the attention's softmax.
        region_lengths: [I] int32 or int64 regions of each image, from 1 to R; None means R for all.
        output: "score", or "logit" for the number before the sigmoid.
        backend: "triton", "cuda", "cpu", "torch" or "reference"; None lets itm_fast choose.

    Returns:
        Scores in (0, 1), or logits, [I, T]; dtype of `image` (under autocast, autocast's).

    Raises:
        ValueError: a shape, a length or an option is wrong, or K is 0.
        TypeError: a dtype is wrong.
        NotImplementedError: the backend asked for cannot run here; the message says why.

    >>> import torch, itm_fast
    >>> D, S, K = 64, 16, 3
    >>> words, cu_seqlens = itm_fast.pack(torch.randn(3, 12, D), [12, 5, 8])
    >>> similarity = [torch.randn(S, D), torch.zeros(S)] * 2
    >>> graph = [torch.randn(K, S, S), torch.zeros(K, S)] * 3
    >>> itm_fast.similarity_graph_score(
    ...     torch.randn(2, 36, D), torch.randn(2, D), words, torch.randn(3, D), cu_seqlens,
    ...     *similarity, *graph, torch.randn(S), torch.zeros(1)).shape
    torch.Size([2, 3])
    """
    return _graph_op(
        image=image, image_global=image_global, words=words, caption_global=caption_global, local_weight=local_weight,
        local_bias=local_bias, global_weight=global_weight, global_bias=global_bias, query_weight=query_weight,
        query_bias=query_bias, key_weight=key_weight, key_bias=key_bias, value_weight=value_weight,
        value_bias=value_bias, score_weight=score_weight, score_bias=score_bias, cu_seqlens=cu_seqlens,
        region_lengths=region_lengths, scale=scale, output=output, backend=backend,
    )  # fmt: skip


@_filter_op.public
def similarity_filter_score(
    image: Tensor,
    image_global: Tensor,
    words: Tensor,
    caption_global: Tensor,
    cu_seqlens: Tensor,
    local_weight: Tensor,
    local_bias: Tensor,
    global_weight: Tensor,
    global_bias: Tensor,
    filter_weight: Tensor,
    filter_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    score_weight: Tensor,
    score_bias: Tensor,
    *,
    scale: float = 9.0,
    eps: float = 1e-5,
    region_lengths: Tensor | None = None,
    output: Output = "score",
    backend: Backend | None = None,
) -> Tensor:
    """Score all pairs as SGRAF with its attention filtration does in evaluation (SAF), from encoded inputs.

    Args:
        image: [I, R, D] region features, float64, float32, float16 or bfloat16.
        image_global: [I, D] one global vector per image. All floating-point tensors have one dtype and device.
        words: [N, D] packed word features, same dtype and device; see `itm_fast.pack`.
        caption_global: [T, D] one global vector per caption.
        cu_seqlens: [T + 1] int32 or int64: caption t is `words[cu_seqlens[t]:cu_seqlens[t + 1]]`.
        local_weight: [S, D] of the linear layer W_l, for the similarity of words and what they attend to.
        local_bias: [S].
        global_weight: [S, D] of the linear layer W_g, for the similarity of the global vectors.
        global_bias: [S].
        filter_weight: [S]. This and the five that follow are `weight` to `running_var` of `itm_fast.similarity_filter`.
        filter_bias: [1].
        norm_weight: [1] BatchNorm's scale.
        norm_bias: [1] BatchNorm's shift.
        running_mean: [1], used in evaluation.
        running_var: [1], used in evaluation.
        score_weight: [S] of the projection to the score.
        score_bias: [1].
        scale: inverse temperature of the attention's softmax.
        eps: BatchNorm's.
        region_lengths: [I] int32 or int64 regions of each image, from 1 to R; None means R for all.
        output: "score", or "logit" for the number before the sigmoid.
        backend: "triton", "cuda", "cpu", "torch" or "reference"; None lets itm_fast choose.

    Returns:
        Scores in (0, 1), or logits, [I, T]; dtype of `image` (under autocast, autocast's).

    Raises:
        ValueError: a shape, a length or an option is wrong.
        TypeError: a dtype is wrong.
        NotImplementedError: the backend asked for cannot run here; the message says why.

    >>> import torch, itm_fast
    >>> D, S, one = 64, 16, torch.ones(1)
    >>> words, cu_seqlens = itm_fast.pack(torch.randn(3, 12, D), [12, 5, 8])
    >>> similarity = [torch.randn(S, D), torch.zeros(S)] * 2
    >>> filtration = [torch.randn(S), 0 * one, one, 0 * one, 0 * one, one]
    >>> itm_fast.similarity_filter_score(
    ...     torch.randn(2, 36, D), torch.randn(2, D), words, torch.randn(3, D), cu_seqlens,
    ...     *similarity, *filtration, torch.randn(S), 0 * one).shape
    torch.Size([2, 3])
    """
    return _filter_op(
        image=image, image_global=image_global, words=words, caption_global=caption_global, local_weight=local_weight,
        local_bias=local_bias, global_weight=global_weight, global_bias=global_bias, filter_weight=filter_weight,
        filter_bias=filter_bias, norm_weight=norm_weight, norm_bias=norm_bias, running_mean=running_mean,
        running_var=running_var, score_weight=score_weight, score_bias=score_bias, cu_seqlens=cu_seqlens,
        region_lengths=region_lengths, scale=scale, eps=eps, output=output, backend=backend,
    )  # fmt: skip
