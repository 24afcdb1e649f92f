"""CMCAN's scoring loop (Zhang et al., AAAI 2022): one caption an iteration, all images at once.

Our own code, of the operations that the published loop has, step by step, over a plain state_dict: the oracle of the
tests and the baseline of the benchmarks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .scan import attend, l2norm
from .sgraf import batch_norm, linear, reason, self_attention

V, R, T = "sim_embv", "sim_enc", "sim_embt"


def loop(
    state: Mapping[str, Tensor],
    image: Tensor,
    caption: Tensor,
    lengths: Sequence[int],
    adjacency: Tensor | None = None,
    *,
    num_partial: int = 5,
    self_layers: int = 3,
    training: bool = False,
    dropout: float = 0.4,
) -> Tensor:
    """Score every image against every caption.

    Args:
        state: the scorer's parameters and buffers by their published names.
        image: [I, R, D], unit rows.
        caption: [T, W, D], padded.
        lengths: T tokens per caption.
        adjacency: [I, R, R] of zeros and ones; None: no neighbours.
        num_partial: regions of a partial vector.
        self_layers: steps of both graphs.
        training: whether dropout is drawn, and statistics are the batch's.
        dropout: its rate.

    Returns:
        Scores, [I, T].
    """

    def vectors(name: str, difference: Tensor) -> Tensor:
        return l2norm(torch.relu(linear(state, name, torch.pow(difference, 2))), -1)

    I, regions, _ = image.shape
    local = batch_norm(state, f"{V}.emb_local_bn", linear(state, f"{V}.emb_local_li", image), training)
    local = F.dropout(torch.tanh(local), dropout, training)
    overall = batch_norm(state, f"{V}.emb_global_bn", linear(state, f"{V}.emb_global_li", image.mean(1)), training)
    overall = F.dropout(torch.tanh(overall), dropout, training)
    logits = linear(state, f"{V}.emb_common", local * overall.unsqueeze(1).repeat(1, regions, 1)).squeeze(2)
    total = (F.softmax(logits, dim=1).unsqueeze(2) * image).sum(dim=1)
    size = torch.pow(total, 2).sum(dim=-1, keepdim=True).sqrt() + 1e-8
    image_global = total / size
    parts = []
    for i in range(I):
        for r in range(regions):
            near = [] if adjacency is None else adjacency[i, r].eq(1).nonzero().flatten().tolist()
            chosen = [*near, *[r] * (num_partial - len(near))]
            weight = F.softmax(logits[i, chosen], dim=0)
            parts.append((weight.unsqueeze(1) * image[i, chosen]).sum(0) / size[i])
    part = torch.stack(parts).view(image.shape)
    columns = []
    text = {name.removeprefix(f"{V}."): x for name, x in state.items() if name.startswith(f"{V}.t_global_w")}
    for t in range(caption.size(0)):
        words = caption[t, : int(lengths[t]), :].unsqueeze(0)
        caption_global = self_attention(text, "t_global_w", words, training, dropout)
        words = words.repeat(I, 1, 1)
        global_node = vectors(f"{V}.sim_tranglo_w", image_global - caption_global)
        of_words = vectors(f"{T}.sim_tranloc_wt", l2norm(attend(words, image, "clipped_l2norm", 9.0), -1) - words)
        of_regions = vectors(f"{V}.sim_tranloc_wv", l2norm(attend(image, words, "clipped_l2norm", 9.0), -1) - image)
        partial = vectors(f"{V}.sim_tranpar_wv", part - caption_global.repeat(regions, 1).unsqueeze(0))
        common = linear(state, f"{V}.emb_similarity", partial * global_node.unsqueeze(1).repeat(1, regions, 1))
        gate = F.layer_norm(common.squeeze(2), (regions,), state[f"{V}.ln.weight"], state[f"{V}.ln.bias"])
        of_regions = torch.sigmoid(gate).unsqueeze(2) * of_regions
        ends = []
        for way, nodes in ("t", of_words), ("v", of_regions):
            nodes = torch.cat([global_node.unsqueeze(1), nodes], 1)
            for k in range(self_layers):
                nodes = reason(state, f"{R}.module_{way}.{k}", nodes)
            ends.append(nodes[:, 0, :])
        columns.append(torch.sigmoid(linear(state, f"{R}.sim_eval_w", torch.cat(ends, -1))))
    return torch.cat(columns, 1)
