"""The best vectorised PyTorch a user would write without this library: padded captions, masks, no loop over captions.

The second baseline beside the papers' loops, and what torch.compile is given.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-8


def attention(context: Tensor, query: Tensor, real_context: Tensor, real_query: Tensor, scale: float):
    """Affinities and weights [B, X, C, Q] of contexts [B, X, D] by queries [C, Q, D]; masks [B, X] and [C, Q]."""
    affinity = torch.einsum("bxd,cqd->bxcq", context, query)
    clipped = F.leaky_relu(affinity, 0.1) * real_query
    logits = scale * clipped / (clipped.norm(dim=-1, keepdim=True) + EPS)
    return affinity, logits.masked_fill(~real_context[:, :, None, None], float("-inf")).softmax(1)


def scan(image: Tensor, caption: Tensor, lengths: Tensor, direction: str, scale: float, pool_scale: float) -> Tensor:
    """SCAN with clipped_l2norm and LogSumExp: image [I, R, D], caption [T, W, D] -> [I, T]."""
    words = torch.arange(caption.shape[1], device=caption.device) < lengths[:, None]
    regions = words.new_ones(image.shape[:2])
    caption = caption * words[:, :, None]
    t2i = direction == "t2i"
    context, query = (image, caption) if t2i else (caption, image)
    masks = (regions, words) if t2i else (words, regions)
    affinity, alpha = attention(context, query, *masks, scale)
    dot = (alpha * affinity).sum(1)
    squared = (torch.einsum("bxy,bycq->bxcq", context @ context.transpose(1, 2), alpha) * alpha).sum(1)
    cosine = dot / (query.norm(dim=-1) * squared.clamp_min(1e-30).sqrt()).clamp_min(EPS)
    pooled = (pool_scale * cosine).masked_fill(~masks[1], float("-inf")).logsumexp(-1) / pool_scale
    return pooled if t2i else pooled.t()


def sgraf(
    weights: dict[str, Tensor],
    image: Tensor,
    caption: Tensor,
    lengths: Tensor,
    image_global: Tensor,
    caption_global: Tensor,
    *,
    training: bool = False,
) -> Tensor:
    """SGR or SAF, by the keys of the published `EncoderSimilarity`'s state dict -> [I, T].

    In training SAF's BatchNorm takes the statistics of each caption; it does not track them, a few numbers per caption.
    """
    words = torch.arange(caption.shape[1], device=caption.device) < lengths[:, None]
    caption = caption * words[:, :, None]
    _, alpha = attention(image, caption, words.new_ones(image.shape[:2]), words, 9.0)
    attended = torch.einsum("irtw,ird->itwd", alpha, image)
    attended = attended / (attended.norm(dim=-1, keepdim=True) + EPS)
    local = _l2(_linear(weights, "sim_tranloc_w", (attended - caption).square()))
    overall = _l2(_linear(weights, "sim_tranglo_w", (image_global[:, None] - caption_global).square()))
    nodes = torch.cat([overall[:, :, None], local], 2)
    real = torch.cat([words.new_ones(len(words), 1), words], 1)
    if "SGR_module.0.graph_query_w.weight" in weights:
        for k in range(3):
            name = f"SGR_module.{k}"
            query, key = (_linear(weights, f"{name}.graph_{x}_w", nodes) for x in ("query", "key"))
            edge = (query @ key.transpose(-1, -2)).masked_fill(~real[:, None], float("-inf")).softmax(-1)
            nodes = _linear(weights, f"{name}.sim_graph_w", edge @ nodes).relu()
        z = nodes[:, :, 0]
    else:
        a = _linear(weights, "SAF_module.attn_sim_w", nodes)[..., 0]
        if training:
            count = len(image) * (lengths + 1)
            mean = ((a * real).sum((0, 2)) / count)[:, None]
            var = (((a - mean) * real).square().sum((0, 2)) / count)[:, None]
        else:
            mean, var = weights["SAF_module.bn.running_mean"], weights["SAF_module.bn.running_var"]
        a = (a - mean) * (var + 1e-5).rsqrt() * weights["SAF_module.bn.weight"] + weights["SAF_module.bn.bias"]
        gate = a.sigmoid() * real
        z = _l2(((gate / (gate.sum(-1, keepdim=True) + EPS))[..., None] * nodes).sum(2))
    return _linear(weights, "sim_eval_w", z)[..., 0].sigmoid()


def _linear(weights: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])


def _l2(x: Tensor) -> Tensor:
    return x / (x.norm(dim=-1, keepdim=True) + EPS)
