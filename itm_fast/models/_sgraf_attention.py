"""What SGR and SAF attend to in one image and one caption (SGRAF, equations 3 to 9)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..nn import Attention
from ..ops._attention import affinity_norm, l2norm


def similarity_attention(scorer: Any, smooth: float, image: Tensor, words: Tensor) -> Attention:
    """Attention of SGRAF's `EncoderSimilarity` in evaluation mode.

    Args:
        scorer: the pair scorer.
        smooth: inverse temperature of words attending to regions.
        image: [R, D], unit rows.
        words: [W, D], unit rows.
    """
    regions = pair_attention(words, image, smooth)  # [W, R]
    local = l2norm(scorer.sim_tranloc_w((l2norm(regions @ image) - words).square()))
    cu_seqlens = torch.tensor([0, len(words)], dtype=torch.int32, device=words.device)
    (_, image_global), (caption_global,) = scorer.image_state(image[None]), scorer.caption_state(words, cu_seqlens)
    overall = l2norm(scorer.sim_tranglo_w((image_global - caption_global).square()))
    nodes = torch.cat([overall, local])  # [1 + W, S]
    weights = {"regions": regions}
    if scorer.module_name == "SAF":
        saf = scorer.SAF_module
        gate = saf.bn(saf.attn_sim_w(nodes)).sigmoid().squeeze(1)
        weights["nodes"] = gate / (gate.sum() + 1e-8)
        logit = scorer.sim_eval_w(l2norm(weights["nodes"] @ nodes))
    else:
        logit, edges = graph_attention(scorer.SGR_module, scorer.sim_eval_w, nodes)
        if len(edges):
            weights |= {"nodes": reaching(edges), "edges": edges}
    return Attention(float(logit if scorer.output == "logit" else logit.sigmoid()), weights)


def pair_attention(query: Tensor, context: Tensor, scale: float | Tensor) -> Tensor:
    """SCAN's attention of one pair's queries [Q, D] over its contexts [X, D], [Q, X]; `scale` may be [Q, 1]."""
    return (scale * affinity_norm(query @ context.t(), "clipped_l2norm", dim=0)).softmax(1)


def graph_attention(graph: nn.ModuleList, final: nn.Module, nodes: Tensor) -> tuple[Tensor, Tensor]:
    """Steps of SGR over one pair's nodes [M, S]: the logit, read out at node 0, and the edges [K, M, M]."""
    edges = []
    for step in graph:
        edges.append((step.graph_query_w(nodes) @ step.graph_key_w(nodes).t()).softmax(1))  # type: ignore[operator]
        nodes = step.sim_graph_w(edges[-1] @ nodes).relu()  # type: ignore[operator]
    return final(nodes[0]), torch.stack(edges) if edges else nodes.new_empty(0, len(nodes), len(nodes))


def reaching(edges: Tensor) -> Tensor:
    """The share of each first node in node 0 after all steps, by the edges alone: [K, M, M] -> [M]."""
    share = edges[-1, 0]
    for step in reversed(edges[:-1]):
        share = share @ step
    return share
