"""RCAR's regulators: their weights, and the scores that they lead to, for any way to compute attended vectors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ._common import l2norm
from ._rows import linear, sigmoid


def _mlp(first: int, hidden: int, last: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(first, hidden), nn.Tanh(), nn.Linear(hidden, last))


class AggregationRegulator(nn.Module):
    """The weights of (4)."""

    def __init__(self, sim_dim: int) -> None:
        super().__init__()
        for name in ("rar_q_w", "rar_k_w"):
            setattr(self, name, nn.Sequential(nn.Linear(sim_dim, sim_dim), nn.Tanh(), nn.Dropout(0.4)))
        self.rar_v_w = nn.Sequential(nn.Linear(sim_dim, 1))


class CorrespondenceRegulator(nn.Module):
    """The weights of (3)."""

    def __init__(self, sim_dim: int, embed_dim: int) -> None:
        super().__init__()
        self.rcr_smooth_w = _mlp(sim_dim, sim_dim // 2, 1)
        self.rcr_matrix_w = _mlp(sim_dim, sim_dim * 2, embed_dim)


class AlignmentVector(nn.Module):
    """The weights of (2)."""

    def __init__(self, sim_dim: int, embed_dim: int) -> None:
        super().__init__()
        self.sim_transform_w = nn.Linear(embed_dim, sim_dim)


def regulated(
    regulator, step, smooth, drops, weights, query, mask, first, attended, kept,
    padded: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """(1) to (4) of models/rcar.py: scores [b, c] of queries [b, c, q, D], where b or c may be 1 for all to share.

    Args:
        regulator: "coop_rcar", "only_rar" or "only_rcr".
        step: n.
        smooth: the first temperature.
        drops: the share that dropout sets to zero.
        weights: by the names of the scorer's parameters.
        query: the queries.
        mask: bool [b, c, q], likewise, which queries are real, or None: all.
        first: (weight, bias) -> the similarity vectors of the first step.
        attended: (queries times channel weights, temperatures [b, c, q]) -> attended vectors.
        kept: bool [b, c, steps, q + 1, S], what dropout kept, or None: all.
        padded: a `Padding`, if the queries are the words of captions one after another, [b, words, D].
    """
    def layer(name: str, x: Tensor) -> Tensor:
        return linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def by_pair(x: Tensor) -> Tensor:
        return x if padded is None else padded(x)

    def mean(x: Tensor) -> Tensor:
        if mask is None:
            return x.mean(2)
        count = mask.sum(2).to(x.dtype)
        return x.sum(2) / count.view(*count.shape, *[1] * (x.dim() - 3))

    def vectors(k: int) -> Tensor:
        name = f"alv_modules.{k}.sim_transform_w"
        align = weights[f"{name}.weight"], weights[f"{name}.bias"]
        real = mask if padded is None else None
        return aligned(query, attended(query * matrix, smooth), align, real) if k else first(*align)

    def dropped(x: Tensor, k: int, rows: slice) -> Tensor:
        if kept is None:
            return x
        factor = kept[:, :, k, rows].to(x.dtype)
        return x * (factor / (1 - drops) if drops < 1 else factor).view_as(x)  # of rate 1 nothing is kept

    matrix: Any = 1.0
    similar = vectors(0)
    of_pair = by_pair(similar)
    overall = mean(of_pair)
    for k in range(step):
        if k and regulator != "only_rar":
            similar = vectors(k)
            of_pair = by_pair(similar)
        if regulator == "only_rcr" or (regulator == "coop_rcar" and k < step - 1):
            of_matrix, of_smooth = (f"rcr_modules.{k}.{name}" for name in ("rcr_matrix_w", "rcr_smooth_w"))
            change = layer(f"{of_matrix}.2", layer(f"{of_matrix}.0", similar).tanh()).tanh()
            matrix = (change + matrix).clamp(-1, 1)
            change = layer(f"{of_smooth}.2", layer(f"{of_smooth}.0", similar).tanh())
            smooth = (change[..., 0] + smooth).relu()
        if regulator != "only_rcr":
            name = f"rar_modules.{k}"
            key = dropped(layer(f"{name}.rar_k_w.0", of_pair).tanh(), k, slice(-1))
            ask = dropped(layer(f"{name}.rar_q_w.0", overall).tanh(), k, slice(-1, None))
            logit = layer(f"{name}.rar_v_w.0", key * ask.unsqueeze(2))[..., 0]
            logit = logit if mask is None else logit.masked_fill(~mask, float("-inf"))
            overall = l2norm((logit.softmax(2).unsqueeze(3) * of_pair).sum(2))
    if regulator == "only_rcr":
        u = l2norm(attended(query * matrix, smooth))
        size = torch.linalg.vector_norm(query, dim=-1) * torch.linalg.vector_norm(u, dim=-1)
        return mean(by_pair((query * u).sum(-1) / size.clamp_min(1e-8)))
    return sigmoid(layer("sim_eval_w", overall)[..., 0])


def aligned(query: Tensor, attended: Tensor, align: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
    """(2), with zeros for queries that are not real."""
    found = l2norm(linear((query - l2norm(attended)).square(), *align))
    return found if mask is None else found.masked_fill(~mask[..., None], 0.0)
