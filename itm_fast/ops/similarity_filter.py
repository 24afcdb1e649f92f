"""Attention filtration over the nodes of every pair (SGRAF's SAF, equations 8 and 9).

For one pair with nodes X [L + 1, S] it equals this program (eval mode):

    beta = l1norm(sigmoid(((X @ w + b) - running_mean) / (running_var + eps).sqrt() * gamma + delta))
    result = l2norm(beta @ X)

Forward, for node p of a pair. w, b are `weight`, `bias`; gamma, delta are `norm_weight`, `norm_bias`, the scale and
shift of SAF's BatchNorm:

    a_p = w . x_p + b                                                                           (1)
    g_p = sigmoid(gamma (a_p - mean) / sqrt(var + eps) + delta)                                 (2)
    beta_p = g_p / (sum_p |g_p| + 1e-8)                                                         (3)
    m = sum_p beta_p x_p,   z = m / (|m| + 1e-8)                                                (4)

In evaluation mean and var are the running statistics, and (1) and (2) fold into one product. In training they are taken
over one caption's nodes in all images (var biased), because the published loop calls BatchNorm once per caption.

Backward, with n = |m|, B = sum g, h_p the argument of the sigmoid in (2), a^_p the normalised a_p of (7), and
c = I (L + 1) the number of values in a caption's mean:

    d m = (d z - (d z . z) z (n + 1e-8) / n) / (n + 1e-8),   d beta_p = d m . x_p                (5)
    d g_p = (d beta_p - sum_p beta_p d beta_p) / (B + 1e-8),   d h_p = g_p (1 - g_p) d g_p       (6)
    a^_p = (a_p - mean) / sqrt(var + eps),   d gamma = sum a^ dh,   d delta = sum dh             (7)
    d a = gamma dh / sqrt(var + eps)                  (eval)                                    (8)
    d a = gamma (dh - mean(dh) - a^ mean(a^ dh)) / sqrt(var + eps)   (training, means over c)   (9)
    d w = sum d a_p x_p,   d b = sum d a_p,   d x_p = beta_p d m + d a_p w                       (10)

Saved for backward: the inputs. Everything per pair is computed again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import work_dtype
from .._names import Backend
from ..packing import bounds
from . import _attention, _draws
from ._declare import Flag, Floats, Given, Integers, Positive, Result
from ._register import Op

OFFERED = ("triton", "cpu", "torch", "reference")


def reference(
    nodes: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    cu_seqlens: Tensor,
    training: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(1) to (4), caption by caption."""
    edge = bounds(cu_seqlens, nodes.shape[1], "similarity_filter")
    result, means, variances = [], [], []
    for start, stop in zip(edge, edge[1:], strict=False):
        X = nodes[:, start:stop]
        a = X @ weight + bias
        mean, var = (a.mean(), a.var(unbiased=False)) if training else (running_mean.to(a), running_var.to(a))
        g = ((a - mean) / (var + eps).sqrt() * norm_weight + norm_bias).sigmoid()
        beta = g / (g.abs().sum(1, keepdim=True) + _attention.EPS)
        result.append(_attention.l2norm((beta[:, :, None] * X).sum(1)))
        if training:
            means.append(mean.detach().to(work_dtype(nodes)))
            variances.append(var.detach().to(work_dtype(nodes)))
    none = nodes.new_empty(0, dtype=work_dtype(nodes))
    z = torch.stack(result, 1) if result else _no_captions(nodes, weight, bias, norm_weight, norm_bias)
    return z, torch.stack(means) if means else none, torch.stack(variances) if variances else none.clone()


def _no_captions(nodes: Tensor, *parameters: Tensor) -> Tensor:
    return (nodes.sum() + sum(p.sum() for p in parameters)) * nodes.new_zeros(nodes.shape[0], 0, nodes.shape[2])


def _refuse(size: dict[str, int], given: Given) -> str | None:
    if given["training"] and not size["I"]:
        return "statistics in training need at least one image, got nodes with I = 0"
    return None


def _of_captions(size: dict[str, int], given: Given) -> tuple[int, ...]:
    return (size["T"] if given["training"] else 0,)


_op = Op(
    "similarity_filter",
    [
        Floats("nodes", "I M S"),
        Floats("weight", "S"),
        Floats("bias", "1"),
        Floats("norm_weight", "1"),
        Floats("norm_bias", "1"),
        Floats("running_mean", "1", fixed=True),
        Floats("running_var", "1", fixed=True),
        Integers("cu_seqlens", "T+1"),
        Flag("training"),
        Positive("eps"),
    ],
    [Result("z", "I T S"), Result("mean", _of_captions, wide=True), Result("var", _of_captions, wide=True)],
    offered=OFFERED,
    reference=reference,
    examples=[lambda size, draw: [*_draws.nodes(size, draw), *_draws.filter_weights(size, draw)]],
    refuse=_refuse,
)


@_op.public
def similarity_filter(
    nodes: Tensor,
    cu_seqlens: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    *,
    training: bool = False,
    eps: float = 1e-5,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weigh each pair's similarity vectors by significance and add them up: SGRAF's SAF.

    Running statistics are only read: `itm_fast.models.sgraf.AttentionFiltration` updates them.

    Args:
        nodes: [I, M, S] packed nodes: those of image i and caption t are `nodes[i, cu_seqlens[t]:cu_seqlens[t + 1]]`.
            float64, float32, float16 or bfloat16.
        cu_seqlens: [T + 1] int32 or int64 bounds of the captions' nodes, the last one M.
        weight: [S] of the linear layer that gives each node's significance, before BatchNorm and sigmoid.
        bias: [1] of this layer.
        norm_weight: [1] BatchNorm's scale.
        norm_bias: [1] BatchNorm's shift.
        running_mean: [1], used in evaluation.
        running_var: [1], used in evaluation.
        training: take the statistics of one caption at a time, over all images and its nodes.
        eps: BatchNorm's.
        backend: "triton", "cpu", "torch" or "reference"; None lets itm_fast choose.

    Returns:
        z: [I, T, S], dtype of `nodes` (under autocast, autocast's).
        mean, var: [T], in training each caption's mean and biased variance, float32 (float64 for float64 nodes),
            without gradient; empty in evaluation.

    Raises:
        ValueError: a shape or length is wrong.
        TypeError: a dtype is wrong.
        NotImplementedError: the backend asked for cannot run here; the message says why.

    >>> import torch, itm_fast
    >>> nodes, cu_seqlens, one = torch.rand(4, 11, 16), torch.tensor([0, 6, 11]), torch.ones(1)
    >>> z, mean, var = itm_fast.similarity_filter(
    ...     nodes, cu_seqlens, torch.randn(16), 0 * one, one, 0 * one, 0 * one, one, training=True)
    >>> z.shape, mean.shape
    (torch.Size([4, 2, 16]), torch.Size([2]))
    """
    return _op(
        nodes=nodes, weight=weight, bias=bias, norm_weight=norm_weight, norm_bias=norm_bias, running_mean=running_mean,
        running_var=running_var, cu_seqlens=cu_seqlens, training=training, eps=eps, backend=backend,
    )  # fmt: skip
