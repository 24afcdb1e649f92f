"""What SAF attends to for one caption and one image (SGRAF, equations 3, 8 and 9)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..ops._attention import affinity_norm, l2norm
from .sgraf import SMOOTH, EncoderSimilarity


@dataclass(frozen=True, eq=False)
class Attention:
    """Where the words of a caption look, and how much each of them counts.

    Attributes:
        regions: [W, R], for each word a distribution over the image's regions.
        nodes: [1 + W], weights of the similarity nodes, which sum to 1: the whole picture with the whole caption
            first, then the words.
        score: the pair's score that follows from them.
    """

    regions: Tensor
    nodes: Tensor
    score: float


@torch.no_grad()
def saf_attention(scorer: EncoderSimilarity, image: Tensor, words: Tensor) -> Attention:
    """Attention of a SAF model for one pair.

    Args:
        scorer: SAF's `sim_enc`, in evaluation mode.
        image: [R, D], unit rows.
        words: [W, D], unit rows.

    Returns:
        `Attention`; its score equals the scorer's, to rounding.

    Raises:
        ValueError: the scorer is not SAF.

    >>> _ = torch.manual_seed(0)
    >>> scorer = EncoderSimilarity(8, 4, "SAF").eval()
    >>> image, words = torch.rand(36, 8), torch.rand(5, 8)
    >>> found = saf_attention(scorer, image, words)
    >>> found.regions.shape, found.nodes.shape, round(float(found.nodes.sum()), 4)
    (torch.Size([5, 36]), torch.Size([6]), 1.0)
    >>> abs(found.score - scorer(image[None], words, torch.tensor([0, 5])).item()) < 1e-6
    True
    """
    if scorer.module_name != "SAF":
        raise ValueError(f"saf_attention: the model must be SAF, got {scorer.module_name}")
    affinity = affinity_norm(image @ words.t(), "clipped_l2norm", dim=1)
    regions = (SMOOTH * affinity).softmax(0).t()  # [W, R]
    local = l2norm(scorer.sim_tranloc_w((l2norm(regions @ image) - words).square()))
    cu_seqlens = torch.tensor([0, len(words)], dtype=torch.int32)
    (_, image_global), (caption_global,) = scorer.image_state(image[None]), scorer.caption_state(words, cu_seqlens)
    overall = l2norm(scorer.sim_tranglo_w((image_global - caption_global).square()))
    nodes = torch.cat([overall, local])  # [1 + W, S]
    saf: Any = scorer.SAF_module
    gate = saf.bn(saf.attn_sim_w(nodes)).sigmoid().squeeze(1)
    weight = gate / (gate.sum() + 1e-8)
    score = scorer.sim_eval_w(l2norm(weight @ nodes)).sigmoid()
    return Attention(regions, weight, float(score))
