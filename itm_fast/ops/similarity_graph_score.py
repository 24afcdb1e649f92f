"""Score every image with every caption by reasoning over the graph of their similarity vectors (SGRAF's SGR, whole).

For one pair, with the global vectors `v` and `t` of its image and caption, it equals this program:

    P = l2norm(((scale * clipped_l2norm(regions @ words.T, dim=1)).softmax(0)).T @ regions)
    X = l2norm(torch.cat([linear((v - t).square(), Wg, bg)[None], linear((P - words).square(), Wl, bl)]))
    score = sigmoid(similarity_graph(X) @ we + be)

Forward:

    s_1 ... s_L = (1) to (3) of `cross_attention_similarity`, t2i, affinity norm "clipped_l2norm"
    y_g   = W_g (v - t)^2 + b_g,   s_g = y_g / (|y_g| + 1e-8)                                   (1)
    z     = node 0 of (1) and (2) of `similarity_graph` over the nodes X = [s_g; s_1; ...; s_L]   (2)
    score = sigmoid(w_e . z + b_e)                                                              (3)

Nothing of (1) to (3) needs more than one pair: the nodes are made, reasoned over and dropped block by block, and only
the score is written.

Backward, with e = v - t and g the gradient of a pair's score:

    d a = g score (1 - score),   d w_e = sum da z,   d b_e = sum da,   d z = da w_e             (4)
    d X and the gradients of the graph's parameters follow as in (4) to (7) of `similarity_graph`   (5)
    d y_g from d s_g = d X_0, and d s_j = d X_j onwards, as in (4) to (7) of `cross_attention_similarity`   (6)
    d W_g = sum dy_g (e^2)^T,   d b_g = sum dy_g,   d e = 2 e W_g^T dy_g                        (7)
    d v = sum over captions d e,   d t = - sum over images d e                                  (8)

Saved for backward: the inputs. Everything per pair is computed again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..packing import node_bounds
from . import _draws, _pair_score
from ._declare import Result
from ._register import Op
from .similarity_graph import PARAMETERS, refuse
from .similarity_graph import reference as graph
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
    query_weight: Tensor,
    query_bias: Tensor,
    key_weight: Tensor,
    key_bias: Tensor,
    value_weight: Tensor,
    value_bias: Tensor,
    score_weight: Tensor,
    score_bias: Tensor,
    cu_seqlens: Tensor,
    region_lengths: Tensor | None,
    scale: float,
) -> Tensor:
    """(1) to (3): the references of the ops that it is made of, one after the other."""
    nodes, _ = make_nodes(
        image, image_global, words, caption_global, local_weight, local_bias, global_weight, global_bias, cu_seqlens,
        region_lengths, scale,
    )  # fmt: skip
    z = graph(nodes, query_weight, query_bias, key_weight, key_bias, value_weight, value_bias, node_bounds(cu_seqlens))
    return _pair_score.score(z, score_weight, score_bias)


def _backward(backend: str, grad: Tensor, needs: list[bool], *args) -> list[Tensor]:
    """(4) to (8)."""

    def head(nodes: Tensor, bounds: Tensor, *parameters: Tensor) -> Tensor:
        return torch.ops.itm_fast.similarity_graph.default(nodes, *parameters, bounds, backend)

    return _pair_score.backward(backend, head, grad, needs, args[:16], *args[16:])


def _example(size: _draws.Size, draw: _draws.Draw) -> list[Tensor]:
    parts = _draws.node_inputs, _draws.graph_weights, _draws.score_weights
    return [x for part in parts for x in part(size, draw)]


_op = Op(
    "similarity_graph_score",
    [*_pair_score.INPUTS, *PARAMETERS, *_pair_score.SCORE, *_pair_score.REST],
    [Result("score", "I T")],
    offered=OFFERED,
    reference=reference,
    examples=[_example],
    refuse=refuse,
    backward=_backward,
)


@_op.public
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
    backend: str | None = None,
) -> Tensor:
    """Score all pairs as SGRAF with its graph reasoning does (SGR), from encoded images and captions.

    The parameters of the graph are those of `itm_fast.similarity_graph`.

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
        query_weight: [K, S, S], one matrix a step, as the five that follow.
        query_bias: [K, S].
        key_weight: [K, S, S].
        key_bias: [K, S]. It has no effect on the result, and its gradient is zero.
        value_weight: [K, S, S].
        value_bias: [K, S].
        score_weight: [S] of the projection to the score.
        score_bias: [1].
        scale: inverse temperature of the attention's softmax.
        region_lengths: [I] int32 or int64 regions of each image, from 1 to R; None means R for all.
        backend: "triton", "cpu", "torch" or "reference"; None lets itm_fast choose.

    Returns:
        Scores in (0, 1), [I, T]; dtype of `image` (under autocast, autocast's).

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
    return _op(
        image=image, image_global=image_global, words=words, caption_global=caption_global, local_weight=local_weight,
        local_bias=local_bias, global_weight=global_weight, global_bias=global_bias, query_weight=query_weight,
        query_bias=query_bias, key_weight=key_weight, key_bias=key_bias, value_weight=value_weight,
        value_bias=value_bias, score_weight=score_weight, score_bias=score_bias, cu_seqlens=cu_seqlens,
        region_lengths=region_lengths, scale=scale, backend=backend,
    )  # fmt: skip
