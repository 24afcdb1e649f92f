"""Attention of a block, contexts [B, X, D] with queries [Q, D], without forming the attended vectors.

With t2i the contexts are B images of X regions and the queries the words of captions, with i2t the contexts are
captions of X words and the queries the regions of images. Equations: `ops/_attention.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .._attention import CANCELLED, EPS, SLOPE, attention_weights


def scaled(affinity: Tensor, norm: str, scale: float, query_mask: Tensor | None) -> Tensor:
    """scale * affinity norm of [B, X, C, Q] over the queries; masked queries have affinity 0 and add nothing."""
    if norm == "softmax":
        if query_mask is not None:
            affinity = affinity.masked_fill(~query_mask, float("-inf"))
        return scale * affinity.softmax(-1)
    if norm.startswith("clipped"):
        affinity = F.leaky_relu(affinity, SLOPE)
    if norm.endswith("l2norm"):
        return affinity * (scale / (torch.linalg.vector_norm(affinity, dim=-1, keepdim=True) + EPS))
    if norm.endswith("l1norm"):
        return affinity * (scale / (affinity.abs().sum(-1, keepdim=True) + EPS))
    return scale * affinity


def attention(
    affinity: Tensor,
    sets: Sequence[tuple[int, int]],
    norm: str,
    scale: float,
    context_mask: Tensor | None,
    query_mask: Tensor | None,
    weights: str = "softmax",
    threshold: float = 0.0,
) -> Tensor:
    """Attention weights [B, X, Q] from affinities [B, X, Q]; those of masked contexts are zero.

    The queries are `sets` of (length, how many); a norm is over one set. `query_mask` [how many, length], the real
    queries, is only for a single entry of `sets`.
    """
    if norm in ("none", "clipped"):
        logits = scaled(affinity, norm, scale, None)
    else:
        parts = affinity.split([length * size for length, size in sets], 2)
        each = [scaled(x.unflatten(2, (-1, n)), norm, scale, query_mask).flatten(2) for x, (n, _) in zip(parts, sets)]
        logits = each[0] if len(each) == 1 else torch.cat(each, 2)
    if context_mask is not None:
        logits = logits.masked_fill(~context_mask[:, :, None], float("-inf"))
    return attention_weights(logits, weights, scale * threshold, dim=1)


def attended_norm(alpha: Tensor, gram: Tensor, context: Tensor) -> Tensor:
    """|P| [B, Q] from alpha^T G alpha, or from P itself where that sum cancels; where |P| = 0 its gradient is 0."""
    square = (torch.bmm(gram, alpha) * alpha).sum(1)
    poor = square < CANCELLED * gram.diagonal(dim1=1, dim2=2).amax(1)[:, None]
    if poor.any():
        poor &= alpha.any(1)  # queries that attend to nothing (weights "threshold") have P = 0, and so has the sum
        rows = list(square.unbind(0))
        for b in poor.any(1).nonzero().flatten().tolist():
            own = poor[b].nonzero().flatten()
            exact = (alpha[b][:, own].t() @ context[b]).square().sum(1)
            rows[b] = rows[b].index_copy(0, own, exact)
        square = torch.stack(rows)
    return square.clamp_min(torch.finfo(square.dtype).tiny).sqrt()
