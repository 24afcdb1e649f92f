"""Score every image with every caption by alignment in three steps: local, global to local, global (SHAN, section 3).

For one pair and direction "t2i" (only words attend, to regions) it equals this program:

    beta = (scale * region_keys @ word_keys.T).softmax(0).T;  attended = beta @ regions
    g = (word_gate[:, 1] + beta @ region_gate[:, 1]).sigmoid();  fused = g * words + (1 - g) * attended
    context = (fused @ caption_pool).softmax(0) @ fused
    found = cosine_similarity(context, regions).softmax(0) @ regions
    score = (cosine_similarity(words, attended).mean() + cosine_similarity(context, found, dim=0)
             + cosine_similarity(regions.mean(0), context + found, dim=0))

Forward, with regions v_i, words t_j, their keys k_i and k_j, and cos(a, b) = a . b / max(|a| |b|, 1e-8):

    A_ij = k_i . k_j,   alpha_i = softmax_j(scale A_ij),   beta_j = softmax_i(scale A_ij)                    (1)
    t*_i = sum_j alpha_ij t_j,   r_i = cos(v_i, t*_i);   v*_j = sum_i beta_ij v_i,   r_j = cos(t_j, v*_j)    (2)
    g_i  = sigmoid(a_i + sum_j alpha_ij a_j),   g_j = sigmoid(b_j + sum_i beta_ij b_i)                       (3)
    v^_i = g_i v_i + (1 - g_i) t*_i,   v_c = sum_i softmax_i(m . v^_i) v^_i;   t_c from t^_j, n alike        (4)
    t*_c = sum_j softmax_j(cos(v_c, t_j)) t_j,   v*_c = sum_i softmax_i(cos(t_c, v_i)) v_i                   (5)
    v_g  = v_c + t*_c,   t_g = t_c + v*_c                                                                    (6)
    score = mu (mean or sum) r_i + (1 - mu) (mean or sum) r_j
            + nu cos(v_c, t*_c) + (1 - nu) cos(t_c, v*_c) + cos(v_g, t_g)                                    (7)

with direction "both". Here m = image_pool, n = caption_pool, mu = local_mix, nu = global_mix; t^_j = g_j t_j +
(1 - g_j) v*_j and t_c = sum_j softmax_j(n . t^_j) t^_j are the same for the caption, and gamma_i = softmax_i(m . v^_i).
With "t2i" only r_j and t_c exist, with weight 1, and v_g is the mean of the regions; with "i2t" the other way round.

SHAN's gate of a vector x and of y, what x attends to, is sigmoid(W_x x + W_y y + b). The caller applies these linear
maps to regions and words before the op, and W_y sum_j alpha_ij t_j = sum_j alpha_ij (W_y t_j) gives (3). With the
regions' gate (W, b) and the words' gate (W', b'), which may be one:

    image_gate = (a_i, b_i),  a_i = W_x v_i + b,  b_i = W'_y v_i;   word_gate = (a_j, b_j),  a_j = W_y t_j,
    b_j = W'_x t_j + b'

With a scalar gate every vector above is a combination of rows of V = [v_i] and T = [t_j], x = V^T p + T^T q, and

    x . v_i = (G p + C q)_i,   x . t_j = (C^T p + H q)_j,   G = V V^T,  H = T T^T,  C = V T^T                (8)
    v_c: p_i = gamma_i g_i,  q_j = sum_i gamma_i (1 - g_i) alpha_ij;   t_c the other way round               (9)

so all products and norms follow from G, H, C, A and a few numbers per row, and no vector [D] of a pair is formed. With
a vector gate the vectors are formed, block by block.

Backward: the chain rule through (7) to (1). For a product y = x_1 . x_2 of two such combinations, with coefficients c_1
and c_2 of the rows Z = [V; T], and K = Z Z^T,

    d c_1 = dy K c_2,   d c_2 = dy K c_1,   d K = dy c_1 c_2^T,   d Z = (d K + d K^T) Z                     (10)
    d A = scale (alpha (d alpha - sum_j alpha d alpha) + beta (d beta - sum_i beta d beta)),
    d k_i = sum_j d A_ij k_j,   d k_j = sum_i d A_ij k_i                                                    (11)

With a vector gate the chain rule goes through the vectors themselves, which are formed again; (11) holds too.

Saved for backward: the inputs, and in the `cpu` backend A and, with scalar gates, C of all pairs, where these take
about an eighth of the workspace at most. Everything else per pair is computed again.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .._names import Backend
from .._triton import REGIONS
from ..packing import bounds, region_counts
from . import _attention, _draws
from ._alignment_backward import KEEPING, backward
from ._declare import Choice, Floats, Given, Integers, Positive, Result, Share, cpu_only
from ._register import Op

OFFERED = ("triton", "cpu", "torch", "reference")


def _cosine(x: Tensor, y: Tensor) -> Tensor:
    norms = torch.linalg.vector_norm(x, dim=-1) * torch.linalg.vector_norm(y, dim=-1)
    return (x * y).sum(-1) / norms.clamp_min(_attention.EPS)


def _aligned(
    local: Tensor, attended: Tensor, gate: Tensor, weight: Tensor, others: Tensor, pool: str
) -> tuple[Tensor, Tensor, Tensor]:
    """One modality's pooled cosines r, its context vector's cosine with what it attends to (5), and their sum (6)."""
    r = _cosine(local, attended)
    g = gate.sigmoid()
    fused = g * local + (1 - g) * attended
    context = (fused @ weight).softmax(0) @ fused
    found = _cosine(context, others).softmax(0) @ others
    return r.mean() if pool == "mean" else r.sum(), _cosine(context, found), context + found


def reference(
    image: Tensor,
    image_key: Tensor,
    image_gate: Tensor,
    words: Tensor,
    word_key: Tensor,
    word_gate: Tensor,
    image_pool: Tensor,
    caption_pool: Tensor,
    cu_seqlens: Tensor,
    region_lengths: Tensor | None,
    direction: str,
    scale: float,
    pool: str,
    local_mix: float,
    global_mix: float,
) -> Tensor:
    """(1) to (7), pair by pair."""
    op = "hierarchical_alignment_score"
    edge = bounds(cu_seqlens, words.shape[0], op)
    rows = []
    for i, n in enumerate(region_counts(region_lengths, image, op)):
        V, key, own = image[i, :n], image_key[i, :n], image_gate[i, :n]
        for start, stop in zip(edge, edge[1:], strict=False):
            T, other = words[start:stop], word_gate[start:stop]
            affinity = scale * (key @ word_key[start:stop].t())
            local, overall = [], []
            image_global, caption_global = V.mean(0), T.mean(0)
            if direction != "t2i":
                alpha = affinity.softmax(1)
                r, whole, image_global = _aligned(
                    V, alpha @ T, own[:, 0] + alpha @ other[:, 0], image_pool, T, pool
                )  # fmt: skip
                local.append(r)
                overall.append(whole)
            if direction != "i2t":
                beta = affinity.softmax(0).t()
                r, whole, caption_global = _aligned(
                    T, beta @ V, other[:, 1] + beta @ own[:, 1], caption_pool, V, pool
                )  # fmt: skip
                local.append(r)
                overall.append(whole)
            score = _cosine(image_global, caption_global)
            for found, mix in ((local, local_mix), (overall, global_mix)):
                score = score + (found[0] if len(found) == 1 else mix * found[0] + (1 - mix) * found[1])
            rows.append(score)
    shape = image.shape[0], len(edge) - 1
    inputs = image, image_key, image_gate, words, word_key, word_gate, image_pool, caption_pool
    return torch.stack(rows).view(shape) if rows else sum(x.sum() for x in inputs) * image.new_zeros(shape)


def _example(size: _draws.Size, draw: _draws.Draw, gates: int = 1) -> list[Tensor]:
    image, words, cu_seqlens = _draws.attention(size, draw)
    rows = [[_draws.unit(draw, *n, size.dim), draw(*n, 2, gates)] for n in (image.shape[:2], words.shape[:1])]
    return [image, *rows[0], words, *rows[1], cu_seqlens, 3 * draw(size.dim), 3 * draw(size.dim)]


def _example_of_vectors(size: _draws.Size, draw: _draws.Draw) -> list[Tensor]:
    """Vector gates, and a caption of 40 words: more than the kernel that forms no vectors takes."""
    return _example(size._replace(lengths=(*size.lengths, 40)), draw, size.dim)


def _too_large(backend: str, size: dict[str, int], given: Given) -> str | None:
    R = size["R"]
    return f"image has {R} regions, and its kernels take at most {REGIONS}" if R > REGIONS else None


_ARGUMENTS = [
    Floats("image", "I R D"),
    Floats("image_key", "I R P"),
    Floats("image_gate", "I R 2 K=1|D"),
    Floats("words", "N D"),
    Floats("word_key", "N P"),
    Floats("word_gate", "N 2 K"),
    Floats("image_pool", "D"),
    Floats("caption_pool", "D"),
    Integers("cu_seqlens", "T+1"),
    Integers("region_lengths", "I", optional=True),
    Choice("direction", (*_attention.DIRECTIONS, "both"), "Direction"),
    Positive("scale"),
    Choice("pool", ("mean", "sum"), "Pool"),
    Share("local_mix"),
    Share("global_mix"),
]


def _products(size: dict[str, int], given: Given) -> tuple[int, ...]:
    """Of A, with scalar gates of C in (8) and of which pairs had their vectors formed; and a vector's room that C++ may
    read."""
    each = size["I"] * size["R"] * size["N"]
    return (each + 16 if size["K"] > 1 else 2 * each + size["I"] * size["T"] + 16,)


# Forward, which keeps what its backward pass takes, and that pass.
cpu_only(
    "hierarchical_alignment_score_kept", _ARGUMENTS, [Result("score", "I T"), Result("products", _products, wide=True)]
)
_op = Op(
    "hierarchical_alignment_score",
    _ARGUMENTS,
    [Result("score", "I T")],
    offered=OFFERED,
    reference=reference,
    examples=[_example, _example_of_vectors],
    too_large=_too_large,
    keeping={"cpu": KEEPING},
    backward=backward,
)


@_op.public
def hierarchical_alignment_score(
    image: Tensor,
    image_key: Tensor,
    image_gate: Tensor,
    words: Tensor,
    word_key: Tensor,
    word_gate: Tensor,
    cu_seqlens: Tensor,
    image_pool: Tensor,
    caption_pool: Tensor,
    *,
    direction: Literal["t2i", "i2t", "both"] = "both",
    scale: float = 15.0,
    pool: Literal["mean", "sum"] = "mean",
    local_mix: float = 0.3,
    global_mix: float = 0.5,
    region_lengths: Tensor | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """Score all pairs by local-to-local, global-to-local and global-to-global alignment: SHAN's pair score.

    Args:
        image: [I, R, D] region features, float64, float32, float16 or bfloat16.
        image_key: [I, R, P] projected regions, whose dot products with `word_key` are the affinities. All
            floating-point tensors have one dtype and device.
        image_gate: [I, R, 2, K] the regions' terms of the gates before the sigmoid; K is 1 (one gate per vector) or D
            (one gate per feature). `image_gate[:, :, 0]`: the region's term of its own gate, bias included.
            `image_gate[:, :, 1]`: its term of the gate of every word that attends to it.
        words: [N, D] packed word features, same dtype and device; see `itm_fast.pack`.
        word_key: [N, P] projected words.
        word_gate: [N, 2, K] the words' terms of the gates. `word_gate[:, 0]`: the word's term of the gate of every
            region that attends to it. `word_gate[:, 1]`: its term of its own gate, bias included.
        cu_seqlens: [T + 1] int32 or int64: caption t is `words[cu_seqlens[t]:cu_seqlens[t + 1]]`.
        image_pool: [D] the linear layer that gives the pooling weights of the fused regions, softmax(fused @
            image_pool); not used by "t2i".
        caption_pool: [D] the same for the fused words; not used by "i2t".
        direction: "t2i" (words attend to regions; SHAN-T2I), "i2t" (SHAN-I2T) or "both" (SHAN-full).
        scale: inverse temperature of the attention's softmax.
        pool: "mean" or "sum" of the local cosines.
        local_mix: weight of the regions' cosines in the local term, from 0 to 1; only used by "both".
        global_mix: weight of the image's context vector in the global-to-local term, from 0 to 1; only used by "both".
        region_lengths: [I] int32 or int64 regions of each image, from 1 to R; None means R for all.
        backend: "triton", "cpu", "torch" or "reference"; None lets itm_fast choose.

    Returns:
        score [I, T], dtype of `image` (under autocast, autocast's).

    Raises:
        ValueError: a shape, a length or an option is wrong.
        TypeError: a dtype is wrong.
        NotImplementedError: the backend asked for cannot run here; the message says why.

    >>> import torch, itm_fast
    >>> D, P = 64, 32
    >>> words, cu_seqlens = itm_fast.pack(torch.randn(3, 12, D), [12, 5, 8])
    >>> itm_fast.hierarchical_alignment_score(
    ...     torch.randn(2, 36, D), torch.randn(2, 36, P), torch.randn(2, 36, 2, 1),
    ...     words, torch.randn(25, P), torch.randn(25, 2, 1), cu_seqlens, torch.randn(D), torch.randn(D)).shape
    torch.Size([2, 3])
    """
    return _op(
        image=image, image_key=image_key, image_gate=image_gate, words=words, word_key=word_key, word_gate=word_gate,
        image_pool=image_pool, caption_pool=caption_pool, cu_seqlens=cu_seqlens, region_lengths=region_lengths,
        direction=direction, scale=scale, pool=pool, local_mix=local_mix, global_mix=global_mix, backend=backend,
    )  # fmt: skip
