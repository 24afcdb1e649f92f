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

Saved for backward: the inputs, and by (2) with a graph in the cpu backend, in float32 or float64, the nodes of the
first images, as many as fit in 232 MiB and in a quarter of the scratch memory, if in the last backward pass with the
same tensor `local_weight` more than half of the pairs had a gradient: hardest negatives leave no use for them.
In `torch`, of a call with few pairs, what autograd records.
Everything else per pair is computed again: `cpu` gets the same bits. With `triton`, where at most one pair in 8 has a
gradient, their nodes come from batched PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .._backends import autocast_dtype
from .._checks import traced
from .._names import Backend, Output
from ..packing import kept, node_bounds
from . import _attention, _draws
from ._declare import Given, Result
from ._kept import Recording
from ._register import Op
from ._score_backward import KEEPING, backward
from ._score_heads import FILTER, GRAPH, Head, scored
from .similarity_nodes import reference as make_nodes

OFFERED = ("triton", "cuda", "cpu", "torch", "reference")


def reference(head: Head, *args: Any) -> Tensor:
    """(1) to (3): the references of `similarity_nodes` and of the head, then the score."""
    inputs, parameters, score, statistics, rest, options, (output,) = head.split(args)
    nodes, _ = make_nodes(*inputs, *rest)
    z = head.vectors(head.reference, nodes, node_bounds(rest[0]), parameters, statistics, options)
    return scored(output, z, *score)


def _too_large(name: str, backend: str, size: dict[str, int], given: Given) -> str | None:
    """Why the CUDA kernels cannot take a call's arguments, one sentence; None if they can, and for other backends."""
    problem, edge = _attention.too_large(backend, size, given), given["cu_seqlens"]
    if problem or backend != "cuda" or edge.device.type == "cpu" or traced(edge):
        return problem
    from ._cuda.similarity_score import why_not

    capability, words = torch.cuda.get_device_capability(edge.device), kept(edge, "longest", _attention.longest)
    return why_not(name, autocast_dtype(given["image"].dtype, edge.device), size, words, capability)


def _recorded(size: dict[str, int], _: str | None) -> int:
    """Numbers that autograd records in batched PyTorch: of each pair, some rows of D and, of each step, of S."""
    D, S, nodes = size["D"], size["S"], size["N"] + size["T"]
    return size["I"] * nodes * (2 * D + 5 * size["R"] + 4 * (1 + size.get("K", 1)) * S)


def _op(name: str, head: Head, **keeping: Callable[..., Tensor]) -> Op:
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
        backward=partial(backward, head),
        keeping={"torch": Recording(name, _recorded), **keeping},
    )


_graph_op = _op("similarity_graph_score", GRAPH, cpu=KEEPING)
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
