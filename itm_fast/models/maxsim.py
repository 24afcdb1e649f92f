"""MaxSim: the largest affinity of each word with a region, summed or averaged (ColBERT, ColPali, FILIP), and the scores
of LAPS, TERAN and ALADIN, which are variants of it.

`MaxSim` is a model with SCAN's encoders; the others are pair scorers that `itm_fast.models.scorer` builds.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import State
from ..packing import starts
from ._common import PaddedScorer, choice, without_padding
from ._sums import ScoredLoss, SumOfScores
from .scan import SCAN

DIRECTIONS = {"t2i": ("t2i",), "i2t": ("i2t",), "both": ("t2i", "i2t")}
HARD = {"affinity_norm": "none", "weights": "hard", "similarity": "product"}
SLOPE = 0.1
AGGREGATIONS = {"MrSw": ("t2i",), "MwSr": ("i2t",), "symm": ("t2i", "i2t"), "MrAVGw": ("t2i",)}

__all__ = ["Alignment", "MaxMean", "MaxSim", "MaxSimilarity"]


class MaxSimilarity(SumOfScores):
    """sum_j or mean_j of max_i v_i . t_j over the words t_j, over the regions with the largest word, or both added.

    Args:
        maxsim: "t2i" (each word takes its largest region), "i2t" (each region its largest word) or "both".
        agg_func: "Mean" or "Sum" over what takes.

    >>> MaxSimilarity(agg_func="Sum")(torch.randn(2, 36, 8), torch.randn(3, 5, 8), [5, 2, 4]).shape
    torch.Size([2, 3])
    """

    def __init__(self, maxsim: str = "t2i", agg_func: str = "Mean") -> None:
        choice("MaxSim", "maxsim", maxsim, tuple(DIRECTIONS))
        choice("MaxSim", "agg_func", agg_func, ("Mean", "Sum"))
        own = {**HARD, "pool": agg_func.lower()}
        super().__init__([(1.0, {"direction": direction, **own}) for direction in DIRECTIONS[maxsim]])


class MaxMean(SumOfScores):
    """LAPS' max-mean of unit rows: mean_j max_i B_ij, with `i2t` averaged with mean_i max_j B_ij.

    Args:
        i2t: both directions.
        scan: B is LeakyReLU with slope 0.1 of the cosines, else the cosines.

    >>> MaxMean()(torch.randn(2, 36, 8), torch.randn(3, 5, 8), [5, 2, 4]).shape
    torch.Size([2, 3])
    """

    def __init__(self, i2t: bool = True, scan: bool = True) -> None:
        terms = []
        for direction in ("t2i", "i2t") if i2t else ("t2i",):
            own, factor = {"direction": direction, **HARD}, 0.5 if i2t else 1.0
            terms.append((factor, {**own, "pool": "mean"}))
            if scan:  # LeakyReLU grows, so it may follow the maximum; it is x - (1 - slope) min(x, 0)
                terms.append((-factor * (1 - SLOPE), {**own, "pool": "negative"}))
        super().__init__(terms)

    def score(
        self,
        image_state: State,
        words: Tensor,
        cu_seqlens: Tensor,
        caption_state: State,
        region_lengths: Tensor | None = None,
    ) -> Tensor:
        unit = nn.functional.normalize
        return super().score((unit(image_state[0], dim=-1),), unit(words, dim=-1), cu_seqlens, (), region_lengths)

    def attention(self, image: Tensor, words: Tensor) -> Any:
        """As of every `SumOfScores`, of unit rows."""
        return super().attention(*(nn.functional.normalize(x, dim=-1) for x in (image, words)))


class Alignment(PaddedScorer):
    """TERAN's and ALADIN's alignment of regions and words, whose rows need not be unit vectors.

    In training the originals take the maximum over padded sets, in which padding has affinity 0: so there the largest
    affinity with a caption shorter than the batch's longest, or with an image of fewer than R regions, is at least 0.

    Args:
        aggregation: "MrSw" (largest region, summed over words), "MrAVGw" (averaged), "MwSr" (largest word, summed over
            regions) or "symm" (MrSw + MwSr).

    >>> Alignment()(torch.randn(2, 36, 8), torch.randn(3, 5, 8), [5, 2, 4]).shape
    torch.Size([2, 3])
    """

    def __init__(self, aggregation: str = "MrSw") -> None:
        super().__init__()
        choice("TERAN", "aggregation", aggregation, tuple(AGGREGATIONS))
        pool = "mean" if aggregation == "MrAVGw" else "sum"
        self.ways = {
            direction: SumOfScores([(1.0, {"direction": direction, "pool": pool, **HARD})])
            for direction in AGGREGATIONS[aggregation]
        }
        self.aggregation = aggregation

    def extra_repr(self) -> str:
        return f"aggregation={self.aggregation!r}"

    def score(
        self,
        image_state: State,
        words: Tensor,
        cu_seqlens: Tensor,
        caption_state: State,
        region_lengths: Tensor | None = None,
    ) -> Tensor:
        (image,) = image_state
        found = []
        for direction, way in self.ways.items():
            rows, edge, regions, counts = words, cu_seqlens, image, region_lengths
            if self.training and direction == "i2t":
                rows, edge = _with_zero(words, cu_seqlens)
            elif self.training and region_lengths is not None:
                regions, _ = without_padding(image, region_lengths)
                counts = (region_lengths + 1).clamp(max=image.shape[1])
            found.append(way.score((regions,), rows, edge, (), counts))
        return found[0] if len(found) == 1 else found[0] + found[1]

    def attention(self, image: Tensor, words: Tensor) -> Any:
        """As of every `SumOfScores`."""
        terms = [term for way in self.ways.values() for term in way.terms]
        return SumOfScores(terms).attention(image, words)


def _with_zero(words: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """Packed captions with a row of zeros after each one that is shorter than the longest."""
    lengths = cu_seqlens.diff()
    if not len(lengths):
        return words, cu_seqlens
    short = lengths < lengths.max()
    more = starts(short).to(cu_seqlens.dtype)
    owner = torch.arange(len(lengths), device=words.device).repeat_interleave(lengths.long())
    rows = words.new_zeros(len(words) + int(more[-1]), words.shape[1])
    place = torch.arange(len(words), device=words.device) + more[:-1].long()[owner]
    return rows.index_copy(0, place, words), cu_seqlens + more


class MaxSim(SCAN):
    """MaxSim with SCAN's encoders, loss and optimizer.

    Args:
        opt: the options of SCAN's encoders and training, and maxsim and agg_func; `opt.device` is optional.

    Raises:
        ValueError: an option is missing or has an unknown value.

    >>> model = MaxSim(Namespace(
    ...     grad_clip=2.0, img_dim=6, embed_size=8, precomp_enc_type="basic", no_imgnorm=False, vocab_size=9,
    ...     word_dim=5, num_layers=1, bi_gru=True, no_txtnorm=False, margin=0.2, max_violation=True,
    ...     learning_rate=2e-4, maxsim="t2i", agg_func="Mean"))
    >>> [len(state) for state in model.state_dict()]
    [2, 9]
    """

    options = ("maxsim", "agg_func")

    @classmethod
    def similarity(cls, opt: Namespace) -> MaxSimilarity:
        return MaxSimilarity(opt.maxsim, opt.agg_func)

    def loss(self, opt: Namespace) -> nn.Module:
        return ScoredLoss(self.scorer, opt.margin, opt.max_violation)
