"""The nodes of every pair's similarity graph: its global similarity vector, then one of every word (SGRAF, 3.2).

For one pair it equals this program:

    P     = l2norm(((scale * l2norm(leaky_relu(regions @ words.T, 0.1), dim=1)).softmax(0)).T @ regions)
    nodes = l2norm(cat([((v - t).square() @ W_g.T + b_g)[None], (P - words).square() @ W_l.T + b_l]))

Forward, with the global vectors v of the image and t of the caption, and the local similarity vectors s_j of
`cross_attention_similarity` (t2i, affinity norm "clipped_l2norm"):

    y_g = W_g (v - t)^2 + b_g,    s_g = y_g / (|y_g| + 1e-8)                                       (1)
    X   = [s_g; s_1; ...; s_L]                                           [L + 1, S]                (2)

Backward: (4) to (7) of `cross_attention_similarity` for s_j. For s_g (4) and (5) hold with u = v and q = t, and
d v = d u.

Saved for backward: the inputs, the nodes, and in the backends cpu and torch `inverse` = 1 / (|y| + 1e-8) of each node.
From these y = node / inverse, so backward does not repeat the most expensive product, that of (2) in
`cross_attention_similarity`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._names import Backend
from ..packing import bounds, node_bounds, region_counts
from . import _attention, _draws
from ._declare import Floats, Given, Integers, Positive, Result, cpu_only
from ._register import Op
from .cross_attention_similarity import reference as similarity

OFFERED = ("triton", "cpu", "torch", "reference")
# The arguments with a gradient, and the others: those of the pair scorers around a head too (`similarity_score`).
INPUTS = (
    Floats("image", "I R D"),
    Floats("image_global", "I D"),
    Floats("words", "N D"),
    Floats("caption_global", "T D"),
    Floats("local_weight", "S D"),
    Floats("local_bias", "S"),
    Floats("global_weight", "S D"),
    Floats("global_bias", "S"),
)
REST = Integers("cu_seqlens", "T+1"), Integers("region_lengths", "I", optional=True), Positive("scale")


def reference(
    image: Tensor,
    image_global: Tensor,
    words: Tensor,
    caption_global: Tensor,
    local_weight: Tensor,
    local_bias: Tensor,
    global_weight: Tensor,
    global_bias: Tensor,
    cu_seqlens: Tensor,
    region_lengths: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """(1) and (2): the nodes [I, N + T, S] of all pairs, and an empty `inverse`."""
    edge = bounds(cu_seqlens, words.shape[0], "similarity_nodes")
    region_counts(region_lengths, image, "similarity_nodes")
    local = similarity(
        image, words, local_weight, local_bias, cu_seqlens, region_lengths, "t2i", "clipped_l2norm", scale
    )
    overall = _attention.l2norm((image_global[:, None] - caption_global).square() @ global_weight.t() + global_bias)
    T = len(edge) - 1
    order = [row for t in range(T) for row in (t, *range(T + edge[t], T + edge[t + 1]))]
    nodes = torch.cat([overall, local], 1)[:, torch.tensor(order, dtype=torch.int64, device=image.device)]
    return nodes, image.new_empty(0)


def _kept(size: dict[str, int], given: Given) -> tuple[int, ...]:
    return (size["I"], size["N"] + size["T"]) if given["backend"] in ("cpu", "torch") else (0,)


def _rows(size: dict[str, int], given: Given) -> tuple[int, ...]:
    return (int(given["pair_bounds"][-1]),)


def _pair_nodes(size: dict[str, int], given: Given) -> tuple[int, ...]:
    return (*_rows(size, given), size["S"])


# The nodes of B pairs of an image and a caption, pair after pair, with bounds `pair_bounds`; sorted by image.
OF_PAIRS = cpu_only(
    "similarity_nodes_of_pairs",
    [
        *INPUTS,
        *REST,
        *(Integers(f"pair_{name}", shape) for name, shape in (("image", "B"), ("caption", "B"), ("bounds", "B+1"))),
    ],
    [Result("nodes", _pair_nodes), Result("inverse", _rows, wide=True)],
)
_op = Op(
    "similarity_nodes",
    [*INPUTS, *REST],
    [Result("nodes", "I N+T S"), Result("inverse", _kept, wide=True)],
    offered=OFFERED,
    reference=reference,
    examples=[_draws.node_inputs],
    keeps=True,
)


@_op.public
def similarity_nodes(
    image: Tensor,
    image_global: Tensor,
    words: Tensor,
    caption_global: Tensor,
    cu_seqlens: Tensor,
    local_weight: Tensor,
    local_bias: Tensor,
    global_weight: Tensor,
    global_bias: Tensor,
    *,
    scale: float = 9.0,
    region_lengths: Tensor | None = None,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the input of SGR and SAF: for every pair its global similarity vector, then one of each word.

    The result has I x (N + T) x S elements: take large sets block by block, or use the pair scorers
    `itm_fast.similarity_graph_score` and `itm_fast.similarity_filter_score`, which never store it.

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
        scale: inverse temperature of the attention's softmax.
        region_lengths: [I] int32 or int64 regions of each image, from 1 to R; None means R for all.
        backend: "triton", "cpu", "torch" or "reference"; None lets itm_fast choose.

    Returns:
        nodes: [I, N + T, S], dtype of `image` (under autocast, autocast's).
        bounds: [T + 1], dtype of `cu_seqlens`: the nodes of image i and caption t are
            `nodes[i, bounds[t]:bounds[t + 1]]`. `itm_fast.similarity_graph` and `itm_fast.similarity_filter` take both.

    Raises:
        ValueError: a shape, a length or an option is wrong.
        TypeError: a dtype is wrong.
        NotImplementedError: the backend asked for cannot run here; the message says why.

    >>> import torch, itm_fast
    >>> D, S = 64, 16
    >>> words, cu_seqlens = itm_fast.pack(torch.randn(3, 12, D), [12, 5, 8])
    >>> nodes, bounds = itm_fast.similarity_nodes(
    ...     torch.randn(2, 36, D), torch.randn(2, D), words, torch.randn(3, D), cu_seqlens,
    ...     *[torch.randn(S, D), torch.zeros(S)] * 2)
    >>> nodes.shape, bounds.tolist()
    (torch.Size([2, 28, 16]), [0, 13, 19, 28])
    """
    nodes, _ = _op(
        image=image, image_global=image_global, words=words, caption_global=caption_global, local_weight=local_weight,
        local_bias=local_bias, global_weight=global_weight, global_bias=global_bias, cu_seqlens=cu_seqlens,
        region_lengths=region_lengths, scale=scale, backend=backend,
    )  # fmt: skip
    return nodes, node_bounds(cu_seqlens)
