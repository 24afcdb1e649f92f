"""The similarity vector of every query and its attended vector, for every image and caption (SGRAF, section 3.2).

For one pair it equals this program (t2i; for i2t swap `regions` and `words`):

    P = l2norm(((scale * affinity_norm(regions @ words.T, dim=1)).softmax(0)).T @ regions)
    similarity = l2norm((P - words).square() @ weight.T + bias)

Forward, with alpha and P as in `ops/_attention.py`:

    u_j = P_j / (|P_j| + 1e-8)                                                                  (1)
    y_j = W (u_j - q_j)^2 + b                                                                   (2)
    s_j = y_j / (|y_j| + 1e-8)                                                                  (3)

|P_j|^2 = alpha_j^T G alpha_j with the contexts' Gram matrix G = x x^T, so |P_j| is known before P_j is formed, and
alpha can be divided by |P_j| + 1e-8 first. Then u, the difference, the square and the product with W take one pass over
D.

Backward, with n = |y_j| and p = |P_j|:

    d y = (d s - (d s . s) s (n + 1e-8) / n) / (n + 1e-8)                                       (4)
    d W += dy (u - q)^2^T,   d b += dy,   d u = 2 (u - q) W^T dy,   d q -= d u                  (5)
    d P = (d u - (d u . u) u (p + 1e-8) / p) / (p + 1e-8)                                       (6)
    d alpha, d A, d x and d q follow as in (6) and (7) of `cross_attention_score`               (7)

Saved for backward: the inputs, and in `torch`, of a call with few pairs, what autograd records. Everything else per
pair is computed again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._names import Backend, Direction, Norm
from ..packing import bounds
from . import _attention, _draws
from ._declare import Choice, Floats, Given, Integers, Positive, Result, empty
from ._kept import Recording
from ._register import Op

OFFERED = ("triton", "cpu", "torch", "reference")


def reference(
    image: Tensor,
    words: Tensor,
    weight: Tensor,
    bias: Tensor,
    cu_seqlens: Tensor,
    region_lengths: Tensor | None,
    direction: str,
    affinity_norm: str,
    scale: float,
) -> Tensor:
    """(1) to (3), pair by pair; padding regions give rows of zeros."""
    op = "cross_attention_similarity"
    edge = bounds(cu_seqlens, words.shape[0], op)
    R = image.shape[1]
    rows = []
    for row in _attention.pairs(image, words, edge, region_lengths, op):
        similar = []
        for regions, caption in row:
            query, context = (caption, regions) if direction == "t2i" else (regions, caption)
            u = _attention.l2norm(_attention.attend(query, context, affinity_norm, scale))
            s = _attention.l2norm((u - query).square() @ weight.t() + bias)
            similar.append(s if direction == "t2i" else torch.cat([s, s.new_zeros(R - len(s), s.shape[1])]))
        if similar:
            rows.append(torch.cat(similar) if direction == "t2i" else torch.stack(similar))
    if rows:
        return torch.stack(rows)
    none = empty(op, image, words, weight, bias, cu_seqlens, region_lengths, direction)
    return (image.sum() + words.sum() + weight.sum() + bias.sum()) * torch.zeros_like(none)


def _shape(size: dict[str, int], given: Given) -> tuple[int, ...]:
    return tuple(size[letter] for letter in ("INS" if given["direction"] == "t2i" else "ITRS"))


def _recorded(size: dict[str, int], direction: str | None) -> int:
    """Numbers that autograd records in batched PyTorch: some affinities, and rows of D and of S for each query."""
    rows = size["N"] if direction == "t2i" else size["T"] * size["R"]
    return size["I"] * (8 * size["R"] * size["N"] + rows * 2 * (size["D"] + size["S"]))


_op = Op(
    "cross_attention_similarity",
    [
        Floats("image", "I R D"),
        Floats("words", "N D"),
        Floats("weight", "S D"),
        Floats("bias", "S"),
        Integers("cu_seqlens", "T+1"),
        Integers("region_lengths", "I", optional=True),
        Choice("direction", _attention.DIRECTIONS, "Direction"),
        Choice("affinity_norm", _attention.NORMS, "Norm"),
        Positive("scale"),
    ],
    [Result("similarity", _shape)],
    offered=OFFERED,
    reference=reference,
    examples=[lambda size, draw: [*_draws.attention(size, draw), *_draws.linear(size, draw)]],
    keeping={"torch": Recording("cross_attention_similarity", _recorded)},
)


@_op.public
def cross_attention_similarity(
    image: Tensor,
    words: Tensor,
    cu_seqlens: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    direction: Direction = "t2i",
    affinity_norm: Norm = "clipped_l2norm",
    scale: float = 9.0,
    region_lengths: Tensor | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """Similarity vectors of every query and its attended vector: SGRAF's local alignments.

    The result has I x N x S elements, so take large sets block by block.

    Args:
        image: [I, R, D] region features, float64, float32, float16 or bfloat16.
        words: [N, D] packed word features, same dtype and device; see `itm_fast.pack`.
        cu_seqlens: [T + 1] int32 or int64: caption t is `words[cu_seqlens[t]:cu_seqlens[t + 1]]`.
        weight: [S, D] of the linear layer W of (2), the similarity's projection.
        bias: [S] of this layer.
        direction: "t2i" (words attend to regions) or "i2t" (regions attend to words).
        affinity_norm: how affinities are normalised over the queries: softmax, l2norm, clipped_l2norm, l1norm,
            clipped_l1norm, clipped or none ("clipped" is LeakyReLU with slope 0.1).
        scale: inverse temperature of the attention's softmax.
        region_lengths: [I] int32 or int64 regions of each image, from 1 to R; None means R for all.
        backend: "triton", "cpu", "torch" or "reference"; None lets itm_fast choose.

    Returns:
        t2i: [I, N, S], one vector per image and word. i2t: [I, T, R, S], one per caption and region; those of padding
        regions are zero. Dtype of `image` (under autocast, autocast's).

    Raises:
        ValueError: a shape, a length or an option is wrong.
        TypeError: a dtype is wrong.
        NotImplementedError: the backend asked for cannot run here; the message says why.

    >>> import torch, itm_fast
    >>> words, cu_seqlens = itm_fast.pack(torch.randn(3, 12, 64), [12, 5, 8])
    >>> itm_fast.cross_attention_similarity(
    ...     torch.randn(2, 36, 64), words, cu_seqlens, torch.randn(16, 64), torch.zeros(16)).shape
    torch.Size([2, 25, 16])
    """
    return _op(
        image=image, words=words, weight=weight, bias=bias, cu_seqlens=cu_seqlens, region_lengths=region_lengths,
        direction=direction, affinity_norm=affinity_norm, scale=scale, backend=backend,
    )  # fmt: skip
