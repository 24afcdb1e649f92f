"""SGRAF's published scoring loop (Diao et al., AAAI 2021): one caption an iteration, all images at once.

The same PyTorch operations in the same order as the authors' `EncoderSimilarity.forward`, copies and `repeat`
included, over a plain state_dict, so that it is both the oracle of the tests and an honest baseline of the
benchmarks. Equations 1 to 9 of the paper.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .scan import attend, l1norm, l2norm

State = Mapping[str, Tensor]


def linear(state: State, name: str, x: Tensor) -> Tensor:
    """The Linear of that name."""
    return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])


def batch_norm(state: State, name: str, x: Tensor, training: bool) -> Tensor:
    """torch.nn.BatchNorm1d with its defaults; in training it updates the buffers in `state`."""
    if training:
        state[f"{name}.num_batches_tracked"].add_(1)
    buffers = (state[f"{name}.running_mean"], state[f"{name}.running_var"])
    return F.batch_norm(x, *buffers, state[f"{name}.weight"], state[f"{name}.bias"], training, 0.1, 1e-5)


def self_attention(state: State, name: str, local: Tensor, training: bool, dropout: float) -> Tensor:
    """Global vectors of `local` [B, L, D] -> [B, D]: VisualSA where the state has BatchNorm, else TextSA."""
    mean = torch.mean(local, 1)
    local_embedding = linear(state, f"{name}.embedding_local.0", local)
    if f"{name}.embedding_local.1.weight" in state:
        local_embedding = batch_norm(state, f"{name}.embedding_local.1", local_embedding, training)
    local_embedding = F.dropout(torch.tanh(local_embedding), dropout, training)
    global_embedding = linear(state, f"{name}.embedding_global.0", mean)
    if f"{name}.embedding_global.1.weight" in state:
        global_embedding = batch_norm(state, f"{name}.embedding_global.1", global_embedding, training)
    global_embedding = F.dropout(torch.tanh(global_embedding), dropout, training)
    global_embedding = global_embedding.unsqueeze(1).repeat(1, local_embedding.size(1), 1)
    common = local_embedding.mul(global_embedding)
    weight = F.softmax(linear(state, f"{name}.embedding_common.0", common).squeeze(2), dim=1)
    return l2norm((weight.unsqueeze(2) * local).sum(dim=1), -1)


def reason(state: State, name: str, nodes: Tensor) -> Tensor:
    """One SGR step over nodes [I, M, S]: no scale, no mask, no residual."""
    query = linear(state, f"{name}.graph_query_w", nodes)
    key = linear(state, f"{name}.graph_key_w", nodes)
    edge = torch.softmax(torch.bmm(query, key.permute(0, 2, 1)), dim=-1)
    return torch.relu(linear(state, f"{name}.sim_graph_w", torch.bmm(edge, nodes)))


def filtrate(state: State, nodes: Tensor, training: bool) -> Tensor:
    """SAF over nodes [I, M, S] -> [I, S]: BatchNorm's statistics are over the I x M values of one caption."""
    gate = linear(state, "SAF_module.attn_sim_w", nodes).permute(0, 2, 1)
    gate = l1norm(torch.sigmoid(batch_norm(state, "SAF_module.bn", gate, training)), -1)
    return l2norm(torch.matmul(gate, nodes).squeeze(1), -1)


def loop(
    state: State,
    image: Tensor,
    caption: Tensor,
    lengths: Sequence[int] | Tensor,
    *,
    training: bool = False,
    dropout: float = 0.4,
) -> Tensor:
    """Score every image against every caption as the authors' code does.

    Args:
        state: a state_dict of the published `EncoderSimilarity`; with SGR_module keys it is SGR, with SAF_module
            keys SAF. In training its BatchNorm buffers are updated in place.
        image: [I, R, D], unit rows.
        caption: [T, W, D], padded.
        lengths: T tokens per caption.
        training: batch statistics and dropout, as in `.train()` mode.
        dropout: probability of the dropouts in VisualSA and TextSA.

    Returns:
        Scores in (0, 1), [I, T].

    >>> from itm_fast.models.sgraf import EncoderSimilarity
    >>> state = EncoderSimilarity(8, 4, "SAF").state_dict()
    >>> loop(state, torch.rand(2, 36, 8), torch.rand(3, 5, 8), [5, 2, 4]).shape
    torch.Size([2, 3])
    """
    steps = len({key.split(".")[1] for key in state if key.startswith("SGR_module.")})
    scores = []
    images = image.size(0)
    image_global = self_attention(state, "v_global_w", image, training, dropout)
    for t in range(caption.size(0)):
        words = caption[t, : int(lengths[t]), :].unsqueeze(0)
        words_expanded = words.repeat(images, 1, 1)
        caption_global = self_attention(state, "t_global_w", words, training, dropout)

        attended = l2norm(attend(words_expanded, image, "clipped_l2norm", 9.0), -1)
        local = torch.pow(torch.sub(attended, words_expanded), 2)
        local = l2norm(linear(state, "sim_tranloc_w", local), -1)
        overall = torch.pow(torch.sub(image_global, caption_global), 2)
        overall = l2norm(linear(state, "sim_tranglo_w", overall), -1)
        nodes = torch.cat([overall.unsqueeze(1), local], 1)  # [I, 1 + W, S], the global node first

        if steps:
            for step in range(steps):
                nodes = reason(state, f"SGR_module.{step}", nodes)
            vector = nodes[:, 0, :]
        else:
            vector = filtrate(state, nodes, training)
        scores.append(torch.sigmoid(linear(state, "sim_eval_w", vector)))
    return torch.cat(scores, 1)
