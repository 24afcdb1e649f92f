"""Score every global vector with every caption: its cosine with what it attends to among the caption's words.

These are SHAN's equations 10 to 12 for vectors that depend on one side only (an image's vector, not a pair's); HGAN
uses them. For one vector and one caption it equals this program:

    alpha = (scale * cosine_similarity(vector, words)).softmax(0)
    score = cosine_similarity(vector, alpha @ words)

Forward, with a vector g and a caption's words t_j:

    c_j   = g . t_j / max(|g| |t_j|, 1e-8),   alpha = softmax over the words of scale * c           (1)
    t*    = sum_j alpha_j t_j                                                                       (2)
    score = g . t* / max(|g| |t*|, 1e-8)                                                            (3)

t* need not be formed: with s_j = g . t_j from one dense product and the caption's Gram matrix G = t t^T,

    g . t* = alpha . s,     |t*|^2 = alpha^T G alpha                                                (4)

To score caption vectors with images, pass the regions as `words`: an image is a caption of R words.

Backward, with p = |t*|, n_j = |t_j| and f the gradient of the score; where max(., 1e-8) takes the 1e-8, the gradient
through these lengths is zero:

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

from .._names import Backend
from ..packing import bounds
from . import _attention, _draws
from ._declare import Floats, Integers, Positive, Result
from ._register import Op

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


_op = Op(
    "global_local_score",
    [
        Floats("vector", "I D"),
        Floats("words", "N D"),
        Integers("cu_seqlens", "T+1"),
        Positive("scale"),
    ],
    [Result("score", "I T")],
    offered=OFFERED,
    reference=reference,
    examples=[lambda size, draw: [_draws.global_vectors(size, draw)[0], *_draws.attention(size, draw)[1:]]],
)


@_op.public
def global_local_score(
    vector: Tensor, words: Tensor, cu_seqlens: Tensor, *, scale: float = 1.0, backend: Backend | None = None
) -> Tensor:
    """Cosine of every vector with what it attends to in every caption: a global-to-local score.

    To score caption vectors with images, pass the images' regions, one image after another, as `words`.

    Args:
        vector: [I, D] one global vector per image, float64, float32, float16 or bfloat16.
        words: [N, D] packed word features, same dtype and device; see `itm_fast.pack`.
        cu_seqlens: [T + 1] int32 or int64: caption t is `words[cu_seqlens[t]:cu_seqlens[t + 1]]`.
        scale: inverse temperature of the attention's softmax.
        backend: "triton", "cpu", "torch" or "reference"; None lets itm_fast choose.

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
    return _op(vector=vector, words=words, cu_seqlens=cu_seqlens, scale=scale, backend=backend)
