"""Score every vector with every caption whose words it attends to (SHAN, equations 10 to 12, with context vectors that
depend on one side only).

For one vector and one caption it equals this program:

    alpha = (scale * cosine_similarity(vector, words)).softmax(0)
    score = cosine_similarity(vector, alpha @ words)

Forward, with a vector g and a caption's words t_j:

    c_j   = g . t_j / max(|g| |t_j|, 1e-8),   alpha = softmax over the words of scale * c           (1)
    t*    = sum_j alpha_j t_j                                                                       (2)
    score = g . t* / max(|g| |t*|, 1e-8)                                                            (3)

No t* is formed: with s_j = g . t_j from one dense product and the caption's Gram matrix G = t t^T,

    g . t* = alpha . s,     |t*|^2 = alpha^T G alpha                                                (4)

The regions of images are captions of R words: so the same op scores caption vectors with images.

Backward, with p = |t*|, n_j = |t_j|, f the gradient of the score, and terms at a clamped length left out:

    d (alpha . s) = f / (|g| p),   d p = - f score / p,   d |g| = - f score / |g|                   (5)
    d alpha = d (alpha . s) s + (d p / p) G alpha;   d c = scale * alpha (d alpha - alpha . d alpha)    (6)
    d s = d (alpha . s) alpha + d c / (|g| n),   d |g| -= sum d c c / |g|,   d n = - d c c / n      (7)
    d G = (d p / (2 p)) alpha alpha^T                                                               (8)
    d g = sum d s t + d |g| g / |g|,   d t_j = d s_j g + d n_j t_j / n_j + 2 (d G t)_j              (9)

Saved for backward: the inputs. Everything per pair is computed again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._backends import resolve
from .._checks import Arguments, autocast
from ..packing import bounds
from . import _attention
from ._op import Op, by_autograd

OFFERED = ("triton", "cpu", "torch", "reference")


def reference(vector: Tensor, words: Tensor, cu_seqlens: Tensor, scale: float) -> Tensor:
    """(1) to (3), caption by caption."""
    edge = bounds(cu_seqlens, words.shape[0], "global_local_score")
    length = torch.linalg.vector_norm(vector, dim=1)
    columns = []
    for start, stop in zip(edge, edge[1:], strict=False):
        t = words[start:stop]
        cosine = vector @ t.t() / (length[:, None] * torch.linalg.vector_norm(t, dim=1)).clamp_min(_attention.EPS)
        attended = (scale * cosine).softmax(1) @ t
        both = length * torch.linalg.vector_norm(attended, dim=1)
        columns.append((vector * attended).sum(1) / both.clamp_min(_attention.EPS))
    if columns:
        return torch.stack(columns, 1)
    return (vector.sum() + words.sum()) * vector.new_zeros(len(vector), 0)


def _implementation(backend: str):
    if backend == "reference":
        return by_autograd(reference)
    if backend == "triton":
        from ..kernels import global_local_score as kernels

        return kernels
    if backend == "cpu":
        from ._cpu import global_local_score as native

        return native
    from ._torch import global_local_score

    return global_local_score


_op = Op(
    "global_local_score",
    "Tensor vector, Tensor words, Tensor cu_seqlens, float scale",
    "Tensor",
    offered=OFFERED,
    differentiable=2,
    implementation=_implementation,
    fake=lambda vector, words, cu_seqlens, *_: vector.new_empty(vector.shape[0], cu_seqlens.shape[0] - 1),
    pairs="INE.",
)


def global_local_score(
    vector: Tensor, words: Tensor, cu_seqlens: Tensor, *, scale: float = 1.0, backend: str | None = None
) -> Tensor:
    """Cosine of every vector with what it attends to in every caption: a global-to-local score.

    Args:
        vector: [I, D] one vector an image, float64, float32, float16 or bfloat16.
        words: [N, D] packed word features, same dtype and device; see `itm_fast.pack`. Or, with caption vectors, the
            regions of the images one after another.
        cu_seqlens: [T + 1] int32 or int64: caption t is `words[cu_seqlens[t]:cu_seqlens[t + 1]]`.
        scale: inverse temperature of the attention's softmax.
        backend: one of `OFFERED`, or None to let itm_fast choose.

    Returns:
        score [I, T], dtype of `vector` (under autocast, autocast's).

    Raises:
        ValueError: a shape, a length or the scale is wrong.
        TypeError: a dtype is wrong.
        NotImplementedError: the backend asked for cannot run here; the message says why.

    >>> import torch, itm_fast
    >>> words, cu_seqlens = itm_fast.pack(torch.randn(3, 12, 64), [12, 5, 8])
    >>> itm_fast.global_local_score(torch.randn(2, 64), words, cu_seqlens).shape
    torch.Size([2, 3])
    """
    check = Arguments("global_local_score")
    check.floats(vector=(vector, "I D"), words=(words, "N D"))
    check.integers("cu_seqlens", cu_seqlens, "T+1")
    check.positive("scale", scale)
    name = resolve(check.op, backend, vector.device, vector.dtype)
    vector, words = autocast(vector, words)
    return _op(vector, words, cu_seqlens, float(scale), name)
