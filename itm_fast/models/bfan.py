"""BFAN (Liu et al., ACM MM 2019): drop-in for CrossmodalGroup/BFAN's `model.py` and its evaluator's scoring.

Names, arguments, state_dict keys and numbers are the published ones; the scores come from
`itm_fast.cross_attention_score` with focal weights. These also work, on which the published code fails: captions of
one word and images of one region, whose attention has nothing to leave out; a single image; captions in any order of
length.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from ..ops._attention import affinity_norm, attention_weights
from . import scan
from ._common import choice, device_of, l1norm, l2norm, score_arrays
from ._evaluator import AverageMeter, LogCollector, encode_data, evalrank
from ._recall import i2t, t2i
from ._sums import SumOfScores
from .scan import (
    EncoderImage,
    EncoderImagePrecomp,
    EncoderImageWeightNormPrecomp,
    cosine_similarity,
)

FOCAL = {"equal": "focal_equal", "prob": "focal_prob"}

__all__ = [
    "BFAN",
    "AverageMeter",
    "ContrastiveLoss",
    "EncoderImage",
    "EncoderImagePrecomp",
    "EncoderImageWeightNormPrecomp",
    "EncoderText",
    "FocalAttention",
    "LogCollector",
    "cosine_similarity",
    "encode_data",
    "evalrank",
    "func_attention",
    "i2t",
    "l1norm",
    "l2norm",
    "shard_xattn",
    "t2i",
    "xattn_score",
]


class EncoderText(scan.EncoderText):
    """SCAN's text encoder, always bidirectional."""

    def __init__(
        self, vocab_size: int, word_dim: int, embed_size: int, num_layers: int, no_txtnorm: bool = False
    ) -> None:
        super().__init__(vocab_size, word_dim, embed_size, num_layers, True, no_txtnorm)


def func_attention(query: Tensor, context: Tensor, opt: Namespace, eps: float = 1e-8) -> Tensor:
    """The focal attention of each query over the context, for inspection; scores are not computed with this function.

    Args:
        query: [B, Q, D].
        context: [B, C, D].
        opt: with lambda_softmax and focal_type.
        eps: not used, as published.

    Returns:
        Attended vectors [B, Q, D].
    """
    choice("func_attention", "focal_type", opt.focal_type, tuple(FOCAL))
    logits = opt.lambda_softmax * affinity_norm(torch.bmm(context, query.transpose(1, 2)), "clipped_l2norm", dim=2)
    return torch.bmm(attention_weights(logits, FOCAL[opt.focal_type], 0.0, dim=1).transpose(1, 2), context)


class FocalAttention(SumOfScores):
    """BFAN's pair score: mean cosines of words and of regions with what they attend to, in both directions, summed.

    Args:
        lambda_softmax: inverse temperature of the attention.
        focal_type: "equal" or "prob": the contexts that share it.

    >>> FocalAttention()(torch.randn(2, 36, 8), torch.randn(3, 5, 8), [5, 2, 4]).shape
    torch.Size([2, 3])
    """

    def __init__(self, lambda_softmax: float = 20.0, focal_type: str = "equal") -> None:
        choice("BFAN", "focal_type", focal_type, tuple(FOCAL))
        own = {"scale": float(lambda_softmax), "weights": FOCAL[focal_type], "pool": "mean"}
        super().__init__([(1.0, {"direction": direction, **own}) for direction in ("t2i", "i2t")])


def _scorer(opt: Namespace) -> FocalAttention:
    return FocalAttention(opt.lambda_softmax, opt.focal_type)


def xattn_score(
    images: Tensor,
    captions: Tensor,
    cap_lens: Sequence[int] | Tensor,
    opt: Namespace,
    region_lengths: Tensor | None = None,
) -> Tensor:
    """Score every image against every caption.

    Args:
        images: [I, R, D], unit rows.
        captions: [T, W, D], padded.
        cap_lens: [T] tokens per caption.
        opt: with lambda_softmax and focal_type.
        region_lengths: [I] regions of each image; None means R for all.

    Returns:
        Scores, [I, T].

    Raises:
        ValueError: an option is unknown or a shape is wrong.

    >>> opt = Namespace(lambda_softmax=20.0, focal_type="equal")
    >>> xattn_score(torch.randn(2, 36, 8), torch.randn(3, 5, 8), [5, 2, 4], opt).shape
    torch.Size([2, 3])
    """
    return _scorer(opt)(images, captions, cap_lens, region_lengths)


class ContrastiveLoss(scan.ContrastiveLoss):
    """Score a batch and return the hinge loss that ranks matching pairs above the others; summed over the batch."""

    def scores(self, im: Tensor, s: Tensor, s_l: Sequence[int] | Tensor, region_lengths: Tensor | None) -> Tensor:
        return xattn_score(im, s, s_l, self.opt, region_lengths)


class BFAN(scan.SCAN):
    """Bidirectional focal attention network: encoders, loss and optimizer in one object, as published.

    Args:
        opt: the published options; `opt.device` is optional (default: CUDA if there is a GPU).

    Raises:
        ValueError: an option is missing or has an unknown value.

    >>> model = BFAN(Namespace(
    ...     grad_clip=2.0, img_dim=6, embed_size=8, precomp_enc_type="basic", no_imgnorm=False, vocab_size=9,
    ...     word_dim=5, num_layers=1, no_txtnorm=False, margin=0.2, max_violation=True, learning_rate=2e-4,
    ...     lambda_softmax=20.0, focal_type="equal"))
    >>> [len(state) for state in model.state_dict()]
    [2, 9]
    """

    options = ("lambda_softmax", "focal_type")

    @classmethod
    def reads(cls) -> tuple[str, ...]:
        return tuple(name for name in super().reads() if name != "bi_gru")

    @classmethod
    def similarity(cls, opt: Namespace) -> FocalAttention:
        return _scorer(opt)

    def text(self, opt: Namespace) -> nn.Module:
        """Published options have no `bi_gru`: the GRU is bidirectional. `itm-fast train` may set it."""
        if getattr(opt, "bi_gru", True):
            return EncoderText(opt.vocab_size, opt.word_dim, opt.embed_size, opt.num_layers, opt.no_txtnorm)
        return super().text(opt)

    def loss(self, opt: Namespace) -> nn.Module:
        return ContrastiveLoss(opt, opt.margin, opt.max_violation)


def shard_xattn(
    images: np.ndarray | Tensor,
    captions: np.ndarray | Tensor,
    caplens: Sequence[int] | Tensor,
    opt: Namespace,
    shard_size: int = 128,
) -> np.ndarray:
    """Score all pairs of a split.

    Args:
        images: [I, R, D], scored in its dtype: the published evaluator passes float64.
        captions: [T, W, D], padded.
        caplens: [T] tokens per caption.
        opt: with lambda_softmax and focal_type.
        shard_size: not used: the memory bound is `itm_fast.workspace`.

    Returns:
        Scores, float64 [I, T].

    >>> opt = Namespace(lambda_softmax=20.0, focal_type="equal")
    >>> shard_xattn(np.ones((2, 36, 8)), np.ones((3, 5, 8)), [5, 2, 4], opt).shape
    (2, 3)
    """
    dtype = torch.as_tensor(images[:0]).dtype
    return score_arrays(_scorer(opt), images, captions, caplens, device_of(opt), dtype)
