"""RCAR's scoring loop (Diao et al., IEEE TIP 2023): one caption an iteration, all images at once.

Our own code, of the operations that the published loop has, step by step, over a plain state_dict: the oracle of the
tests and the baseline of the benchmarks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .scan import cosine, l2norm
from .sgraf import linear


def loop(
    state: Mapping[str, Tensor],
    image: Tensor,
    caption: Tensor,
    lengths: Sequence[int],
    *,
    attn_type: str = "t2i",
    self_regulator: str = "coop_rcar",
    step: int = 2,
    smooth: float = 10.0,
    training: bool = False,
    dropout: float = 0.4,
) -> Tensor:
    """Score every image against every caption.

    Args:
        state: the scorer's parameters by their published names.
        image: [I, R, D], unit rows.
        caption: [T, W, D], padded.
        lengths: T tokens per caption.
        attn_type: "t2i" or "i2t".
        self_regulator: "coop_rcar", "only_rar" or "only_rcr".
        step: number of steps.
        smooth: the first temperature.
        training: whether dropout is drawn.
        dropout: its rate.

    Returns:
        Scores, [I, T].
    """

    def regulated(query: Tensor, context: Tensor, matrix: Tensor, lam: Tensor | float) -> Tensor:
        weighed = query * matrix
        affinity = l2norm(F.leaky_relu(torch.bmm(context, weighed.transpose(1, 2)), 0.1), -1)
        weight = F.softmax(affinity.transpose(1, 2).contiguous() * lam, dim=2).transpose(1, 2).contiguous()
        return l2norm(torch.bmm(context.transpose(1, 2), weight).transpose(1, 2), -1)

    def aligned(k: int, query: Tensor, context: Tensor, matrix: Tensor, lam: Tensor | float) -> Tensor:
        difference = torch.pow(torch.sub(query, regulated(query, context, matrix, lam)), 2)
        return l2norm(linear(state, f"alv_modules.{k}.sim_transform_w", difference), -1)

    def correspond(k: int, s: Tensor, matrix: Tensor, lam: Tensor | float) -> tuple[Tensor, Tensor]:
        name = f"rcr_modules.{k}"
        two = [
            linear(state, f"{name}.{way}.2", torch.tanh(linear(state, f"{name}.{way}.0", s)))
            for way in ("rcr_matrix_w", "rcr_smooth_w")
        ]
        return (torch.tanh(two[0]) + matrix).clamp(min=-1, max=1), F.relu(two[1] + lam)

    def aggregate(k: int, s: Tensor, g: Tensor) -> Tensor:
        name = f"rar_modules.{k}"
        key = F.dropout(torch.tanh(linear(state, f"{name}.rar_k_w.0", s)), dropout, training)
        ask = F.dropout(torch.tanh(linear(state, f"{name}.rar_q_w.0", g)), dropout, training)
        common = key.mul(ask.unsqueeze(1).repeat(1, key.size(1), 1))
        weight = F.softmax(linear(state, f"{name}.rar_v_w.0", common).squeeze(2), dim=1)
        return l2norm((weight.unsqueeze(2) * s).sum(dim=1), -1)

    columns = []
    for t in range(caption.size(0)):
        words = caption[t, : int(lengths[t]), :].unsqueeze(0).repeat(image.size(0), 1, 1)
        query, context = (words, image) if attn_type == "t2i" else (image, words)
        matrix = image.new_ones(image.shape[2])
        lam: Tensor | float = smooth
        if self_regulator == "only_rcr":
            for k in range(step):
                matrix, lam = correspond(k, aligned(k, query, context, matrix, lam), matrix, lam)
            columns.append(cosine(query, regulated(query, context, matrix, lam), 2).mean(dim=1))
            continue
        for k in range(step):
            if k == 0 or self_regulator == "coop_rcar":
                s = aligned(k, query, context, matrix, lam)
            if k == 0:
                g = torch.mean(s, 1)
            if self_regulator == "coop_rcar" and k < step - 1:
                matrix, lam = correspond(k, s, matrix, lam)
            g = aggregate(k, s, g)
        columns.append(torch.sigmoid(linear(state, "sim_eval_w", g)).squeeze(1))
    return torch.stack(columns, 1)
