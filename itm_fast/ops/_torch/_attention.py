"""Attention of a block, contexts [B, X, D] with queries [C, Q, D], without forming the attended vectors.

With t2i the contexts are B images of X regions and the queries C captions of Q words, with i2t the other way round. All
captions of a block have the same length. Equations: `ops/_attention.py`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._attention import CANCELLED, EPS, SLOPE, attention_weights


def valid(lengths: Tensor, n: int) -> Tensor:
    """[B, n] mask of the real rows."""
    return torch.arange(n, device=lengths.device)[None, :] < lengths[:, None]


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
    context: Tensor,
    query: Tensor,
    norm: str,
    scale: float,
    context_mask: Tensor | None,
    query_mask: Tensor | None,
    weights: str = "softmax",
    threshold: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Affinities and attention weights, both [B, X, C * Q]; those of masked contexts and queries are zero."""
    B, X, D = context.shape
    C, Q, _ = query.shape
    affinity = (context.reshape(B * X, D) @ query.reshape(C * Q, D).t()).view(B, X, C, Q)
    logits = scaled(affinity, norm, scale, query_mask)
    if context_mask is not None:
        logits = logits.masked_fill(~context_mask[:, :, None, None], float("-inf"))
    alpha = attention_weights(logits.view(B, X, C * Q), weights, scale * threshold, dim=1)
    return affinity.view(B, X, C * Q), alpha


def attended_norm(alpha: Tensor, gram: Tensor, context: Tensor) -> Tensor:
    """|P| [B, C * Q] from alpha^T G alpha, or from P itself where that sum cancels; where |P| = 0 its gradient is 0."""
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
