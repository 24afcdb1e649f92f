"""Score every image with every caption by attention filtration of their similarity vectors (SGRAF's SAF, whole).

For one pair, with the global vectors `v` and `t` of its image and caption, it equals this program:

    P = l2norm(((scale * clipped_l2norm(regions @ words.T, dim=1)).softmax(0)).T @ regions)
    X = l2norm(torch.cat([linear((v - t).square(), Wg, bg)[None], linear((P - words).square(), Wl, bl)]))
    score = sigmoid(similarity_filter(X) @ we + be)

with the running statistics of evaluation: those of training are taken over one caption and all images, which no
pair sees alone.

Forward:

    s_1 ... s_L = (1) to (3) of `cross_attention_similarity`, t2i, affinity norm "clipped_l2norm"
    s_g   = (1) of `similarity_graph_score`
    z     = (1) to (4) of `similarity_filter` in evaluation over the nodes X = [s_g; s_1; ...; s_L]   (1)
    score = sigmoid(w_e . z + b_e)                                                              (2)

Nothing of it needs more than one pair: the nodes are made, weighed and dropped block by block, and only the score is
written.

Backward, with g the gradient of a pair's score:

    d a = g score (1 - score),   d w_e = sum da z,   d b_e = sum da,   d z = da w_e             (3)
    d X and the gradients of the filter's parameters follow as in (5) to (8) and (10) of `similarity_filter`   (4)
    d v, d t, d W_g, d b_g and all that follows d s_j = d X_j as in (6) to (8) of `similarity_graph_score`   (5)

Saved for backward: the inputs. Everything per pair is computed again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..packing import node_bounds
from . import _draws, _pair_score
from ._declare import Floats, Positive, Result
from ._register import Op
from .similarity_filter import reference as filtered
from .similarity_nodes import reference as make_nodes

OFFERED = ("triton", "cpu", "torch", "reference")


def reference(
    image: Tensor,
    image_global: Tensor,
    words: Tensor,
    caption_global: Tensor,
    local_weight: Tensor,
    local_bias: Tensor,
    global_weight: Tensor,
    global_bias: Tensor,
    filter_weight: Tensor,
    filter_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    score_weight: Tensor,
    score_bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    cu_seqlens: Tensor,
    region_lengths: Tensor | None,
    scale: float,
    eps: float,
) -> Tensor:
    """(1) and (2): the references of the ops that it is made of, one after the other."""
    nodes, _ = make_nodes(
        image, image_global, words, caption_global, local_weight, local_bias, global_weight, global_bias, cu_seqlens,
        region_lengths, scale,
    )  # fmt: skip
    z, _, _ = filtered(
        nodes, filter_weight, filter_bias, norm_weight, norm_bias, running_mean, running_var,
        node_bounds(cu_seqlens), False, eps,
    )
    return _pair_score.score(z, score_weight, score_bias)


def _backward(backend: str, grad: Tensor, needs: list[bool], *args) -> list[Tensor]:
    """(3) to (5)."""
    running_mean, running_var, *rest, eps = args[14:]

    def head(nodes: Tensor, bounds: Tensor, *parameters: Tensor) -> Tensor:
        running = running_mean.to(nodes.dtype), running_var.to(nodes.dtype)
        rest = *running, bounds, False, eps, backend
        return torch.ops.itm_fast.similarity_filter.default(nodes, *parameters, *rest)[0]

    return _pair_score.backward(backend, head, grad, needs, args[:14], *rest)


def _example(size: _draws.Size, draw: _draws.Draw) -> list[Tensor]:
    parts = _draws.node_inputs, _draws.filter_weights, _draws.score_weights
    return [x for part in parts for x in part(size, draw)]


_op = Op(
    "similarity_filter_score",
    [
        *_pair_score.INPUTS,
        Floats("filter_weight", "S"),
        Floats("filter_bias", "1"),
        Floats("norm_weight", "1"),
        Floats("norm_bias", "1"),
        *_pair_score.SCORE,
        Floats("running_mean", "1", fixed=True),
        Floats("running_var", "1", fixed=True),
        *_pair_score.REST,
        Positive("eps"),
    ],
    [Result("score", "I T")],
    offered=OFFERED,
    reference=reference,
    examples=[_example],
    backward=_backward,
)


@_op.public
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
    backend: str | None = None,
) -> Tensor:
    """Score all pairs as SGRAF with its attention filtration does in evaluation (SAF), from encoded inputs.

    Args:
        image: [I, R, D] region features, float64, float32, float16 or bfloat16.
        image_global: [I, D] one vector an image, same dtype and device as all tensors of floats.
        words: [N, D] packed word features, same dtype and device; see `itm_fast.pack`.
        caption_global: [T, D] one vector a caption.
        cu_seqlens: [T + 1] int32 or int64: caption t is `words[cu_seqlens[t]:cu_seqlens[t + 1]]`.
        local_weight: [S, D] of the similarity of words and what they attend to.
        local_bias: [S].
        global_weight: [S, D] of the similarity of the global vectors.
        global_bias: [S].
        filter_weight: [S] of the projection to one significance a node, as the five that follow; see
            `itm_fast.similarity_filter`.
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
        backend: "triton", "cpu", "torch" or "reference"; None lets itm_fast choose.

    Returns:
        Scores in (0, 1), [I, T]; dtype of `image` (under autocast, autocast's).

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
    return _op(
        image=image, image_global=image_global, words=words, caption_global=caption_global, local_weight=local_weight,
        local_bias=local_bias, global_weight=global_weight, global_bias=global_bias, filter_weight=filter_weight,
        filter_bias=filter_bias, norm_weight=norm_weight, norm_bias=norm_bias, running_mean=running_mean,
        running_var=running_var, score_weight=score_weight, score_bias=score_bias, cu_seqlens=cu_seqlens,
        region_lengths=region_lengths, scale=scale, eps=eps, backend=backend,
    )  # fmt: skip
