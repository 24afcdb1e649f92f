"""Pair scorers that are weighted sums of `itm_fast.cross_attention_score`, and a loss that scores its batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..nn import Attention, CrossAttentionScore, State
from ..ops import cross_attention_score, hardest_negative_loss
from ._common import PaddedScorer
from ._lengths import pack_padded


class SumOfScores(PaddedScorer):
    """sum over the terms of factor * cross_attention_score(**options): a pair scorer without parameters.

    Args:
        terms: pairs (factor, options).

    >>> import torch
    >>> both = [(0.5, {"direction": direction, "pool": "mean"}) for direction in ("t2i", "i2t")]
    >>> SumOfScores(both)(torch.randn(2, 36, 8), torch.randn(3, 5, 8), [5, 2, 4]).shape
    torch.Size([2, 3])
    """

    def __init__(self, terms: Sequence[tuple[float, dict[str, Any]]]) -> None:
        super().__init__()
        self.terms = terms

    def extra_repr(self) -> str:
        return ", ".join(f"{factor:g} * {options}" for factor, options in self.terms)

    def score(
        self,
        image_state: State,
        words: Tensor,
        cu_seqlens: Tensor,
        caption_state: State,
        region_lengths: Tensor | None = None,
    ) -> Tensor:
        (image,) = image_state
        total = None
        for factor, options in self.terms:
            one = cross_attention_score(image, words, cu_seqlens, region_lengths=region_lengths, **options)
            one = one if factor == 1 else factor * one
            total = one if total is None else total + one
        assert total is not None
        return total

    def attention(self, image: Tensor, words: Tensor) -> Attention:
        """`regions` and `words`, of the first term in each direction."""
        found = [CrossAttentionScore(**options).attention(image, words) for _, options in self.terms]
        weights: dict[str, Tensor] = {}
        for one in found:
            weights = {name: weight for name, weight in one.weights.items() if name != "cosines"} | weights
        return Attention(sum(factor * one.score for (factor, _), one in zip(self.terms, found)), weights)


class ScoredLoss(nn.Module):
    """Score a batch with a pair scorer and return the hinge loss, summed over the batch."""

    def __init__(self, scorer: nn.Module, margin: float, max_violation: bool) -> None:
        super().__init__()
        self.scorer, self.margin, self.max_violation = scorer, margin, max_violation

    def forward(
        self, im: Tensor, s: Tensor, s_l: Sequence[int] | Tensor, region_lengths: Tensor | None = None
    ) -> Tensor:
        """Images [B, R, D], captions [B, W, D] and their lengths -> loss, 0-d."""
        words, cu_seqlens = pack_padded("ScoredLoss", ("s", "s_l"), s, s_l)
        scores = self.scorer(im, words, cu_seqlens, region_lengths)
        return hardest_negative_loss(scores, margin=self.margin, hardest=self.max_violation)
