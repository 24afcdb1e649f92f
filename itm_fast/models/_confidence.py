"""The weights of CMCAN's pair scorer, and the scores that they lead to, for any way to compute attended vectors.

The equations are those of models/cmcan.py.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..nn import SimilarityGraph, xavier_
from ..ops import similarity_graph
from ._common import Dropout, l2norm, without_padding
from ._rows import linear, sigmoid
from ._self_attention import TextSA, normalised

PARTIAL = 5
GRAPH = 6  # tensors of `SimilarityGraph.stacked`


class GraphEmbt(nn.Module):
    """The weights of the words' similarity vectors."""

    def __init__(self, embed_size: int, sim_dim: int) -> None:
        super().__init__()
        self.sim_tranloc_wt = nn.Linear(embed_size, sim_dim)
        xavier_(self.sim_tranloc_wt)


class GraphEmbv(nn.Module):
    """Global vectors, (1) to (3), and the weights of the regions' similarity vectors and confidences."""

    def __init__(self, embed_size: int, sim_dim: int, num_region: int, dropout_rate: float) -> None:
        super().__init__()
        self.t_global_w = TextSA(embed_size, dropout_rate)
        self.emb_local_li = nn.Linear(embed_size, embed_size)
        self.emb_local_bn = nn.BatchNorm1d(num_region)
        self.emb_global_li = nn.Linear(embed_size, embed_size)
        self.emb_global_bn = nn.BatchNorm1d(embed_size)
        self.emb_common = nn.Linear(embed_size, 1)
        self.dropout = Dropout(dropout_rate)
        for name in ("sim_tranloc_wv", "sim_tranpar_wv", "sim_tranglo_w"):
            setattr(self, name, nn.Linear(embed_size, sim_dim))
        self.emb_similarity = nn.Linear(sim_dim, 1)
        self.ln = nn.LayerNorm(num_region)
        for module in self.children():
            if isinstance(module, nn.Linear):
                xavier_(module)

    def image(self, image: Tensor, adjacency: Tensor | None, region_lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        """(1) and (2): image [I, R, D] -> v_g [I, D] and p [I, R, D]."""
        valid = None
        if region_lengths is not None:
            image, valid = without_padding(image, region_lengths)
        count = image.shape[1] if region_lengths is None else region_lengths[:, None].to(image.dtype)
        local, mean = self._linear(self.emb_local_li, image), image.sum(1) / count
        local = self.dropout(normalised(self.emb_local_bn, local, valid).tanh())
        overall = self.dropout(normalised(self.emb_global_bn, self._linear(self.emb_global_li, mean)).tanh())
        logits = self._linear(self.emb_common, local * overall[:, None])[..., 0]  # [I, R]
        if valid is not None:
            logits = logits.masked_fill(~valid, float("-inf"))
        total = (logits.softmax(1)[..., None] * image).sum(1)
        size = torch.linalg.vector_norm(total, dim=-1, keepdim=True) + 1e-8
        near = self._weights(logits, adjacency)
        return total / size, torch.bmm(near, image) / size[:, None]

    @staticmethod
    def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
        return linear(x, layer.weight, layer.bias)

    @staticmethod
    def _weights(logits: Tensor, adjacency: Tensor | None) -> Tensor:
        """softmax(e) over a region's neighbours, [I, R, R]; it counts as often as there are places left of the five."""
        (I, R), alone = logits.shape, torch.eye(logits.shape[1], dtype=logits.dtype, device=logits.device)
        if adjacency is None:
            return alone.expand(I, R, R)
        near = adjacency.to(logits).eq(1).to(logits.dtype)
        times = near + alone * (PARTIAL - near.sum(-1, keepdim=True))
        padding = logits.isinf()
        times = times.masked_fill(padding[:, None, :], 0.0) + alone * padding[:, :, None]
        return (logits.masked_fill(padding, 0.0)[:, None] + times.log()).softmax(-1)


class GraphReasoner(nn.Module):
    """The weights of (6) and (7)."""

    def __init__(self, sim_dim: int, self_layers: int) -> None:
        super().__init__()
        self.sim_eval_w = nn.Linear(2 * sim_dim, 1)
        self.module_t = SimilarityGraph(sim_dim, self_layers)
        self.module_v = SimilarityGraph(sim_dim, self_layers)
        xavier_(self.sim_eval_w)


def equal_nodes(overall: Tensor, local: Tensor) -> tuple[Tensor, Tensor]:
    """As `nodes_of`, of equally many rows each, local [b, c, n, S]."""
    nodes = torch.cat([overall[:, :, None], local], 2)  # [b, c, 1 + n, S]
    starts = torch.arange(nodes.shape[1] + 1, dtype=torch.int32, device=nodes.device) * nodes.shape[2]
    return nodes.flatten(1, 2), starts


def pair_scores(image, image_global, part, words, caption_global, to_words, to_regions, of_words, *weights) -> Tensor:
    """(3) to (7), [b, c].

    Args:
        image, image_global, part: [b, n, D], [b, D] and, p_r, [b, n, D].
        words: [b or 1, c, L, D], or [1, words, D] of captions one after another.
        caption_global: [b or 1, c, D].
        to_words, to_regions: make P of the words, and of the regions [b, c, n, D].
        of_words: (overall, local of the words) -> the nodes and their bounds.
        *weights: as `score` lists them.
    """
    glo, wt, wv, par, common, norm, final = (weights[k : k + 2] for k in range(0, 14, 2))
    n = image.shape[1]

    def vectors(layer, a: Tensor, b: Tensor) -> Tensor:
        return l2norm(linear((a - b).square(), *layer).relu())

    overall = vectors(glo, image_global[:, None], caption_global)
    z_t = similarity_graph(*of_words(overall, vectors(wt, l2norm(to_words()), words)), *weights[14 : 14 + GRAPH])
    confidence = vectors(par, part[:, None], caption_global[:, :, None]) * overall[:, :, None]
    confidence = linear(confidence, *common)[..., 0]
    confidence = sigmoid(nn.functional.layer_norm(confidence, (n,), norm[0][:n], norm[1][:n]))
    local = vectors(wv, l2norm(to_regions()), image[:, None])
    z_v = similarity_graph(*equal_nodes(overall, confidence[..., None] * local), *weights[14 + GRAPH :])
    return sigmoid(linear(torch.cat([z_t, z_v], -1), *final)[..., 0])
