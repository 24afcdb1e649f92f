"""SCAN (Lee et al., ECCV 2018): drop-in for kuanghuei/SCAN's `model.py` and its evaluator's scoring.

Names, arguments, state_dict keys and numbers are the published ones; the scores come from
`itm_fast.cross_attention_score`. These also work, on which the published code fails: the l1 normalisations, a single
image, captions in any order of length, machines without CUDA.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from typing import Any, get_args

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

from .._names import Direction, Norm, Pool
from ..nn import CrossAttentionScore, PairScorer
from ..ops import hardest_negative_loss
from ..ops._attention import affinity_norm
from ._common import Matcher, choice, device_of, encode_text, l1norm, l2norm, require_options, score_arrays
from ._evaluator import AverageMeter, LogCollector, encode_data, evalrank
from ._image_encoders import EncoderImage, EncoderImagePrecomp, EncoderImageWeightNormPrecomp
from ._inputs import TextEncoder
from ._lengths import pack_padded
from ._recall import i2t, t2i

NORMS: dict[str, Norm] = {"no_norm" if name == "none" else name: name for name in get_args(Norm)}
POOLS: dict[str, Pool] = {"LogSumExp": "lse", "Max": "max", "Sum": "sum", "Mean": "mean"}
OPTIONS = (
    "grad_clip", "img_dim", "embed_size", "precomp_enc_type", "no_imgnorm", "vocab_size", "word_dim",
    "num_layers", "bi_gru", "no_txtnorm", "margin", "max_violation", "learning_rate",
)  # fmt: skip

__all__ = [
    "SCAN",
    "AverageMeter",
    "ContrastiveLoss",
    "EncoderImage",
    "EncoderImagePrecomp",
    "EncoderImageWeightNormPrecomp",
    "EncoderText",
    "LogCollector",
    "cosine_similarity",
    "encode_data",
    "evalrank",
    "func_attention",
    "i2t",
    "l1norm",
    "l2norm",
    "shard_xattn_i2t",
    "shard_xattn_t2i",
    "t2i",
    "xattn_score_i2t",
    "xattn_score_t2i",
]


class EncoderText(TextEncoder):
    """Embedding, (bi-)GRU, mean of the directions and l2norm, without dropout."""

    def __init__(
        self,
        vocab_size: int,
        word_dim: int,
        embed_size: int,
        num_layers: int,
        use_bi_gru: bool = False,
        no_txtnorm: bool = False,
    ) -> None:
        super().__init__()
        self.embed_size = embed_size
        self.no_txtnorm = no_txtnorm
        self.embed = nn.Embedding(vocab_size, word_dim)
        self.use_bi_gru = use_bi_gru
        self.rnn = nn.GRU(word_dim, embed_size, num_layers, batch_first=True, bidirectional=use_bi_gru)
        nn.init.uniform_(self.embed.weight, -0.1, 0.1)

    def forward(self, x: Tensor, lengths: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
        """Word ids [B, W] int64 -> caption [B, longest, D], zeros beyond each length, and the lengths [B]."""
        return encode_text(self.embed(x), lengths, self.rnn, self.no_txtnorm)


def func_attention(
    query: Tensor, context: Tensor, opt: Namespace, smooth: float, eps: float = 1e-8
) -> tuple[Tensor, Tensor]:
    """The attention of each query over the context, for inspection; scores are not computed with this function.

    Args:
        query: [B, Q, D].
        context: [B, C, D].
        opt: its `raw_feature_norm` normalises the affinities over the queries.
        smooth: inverse temperature of the softmax over the context.
        eps: not used, as published.

    Returns:
        Attended vectors [B, Q, D] and attention [B, C, Q].
    """
    choice("func_attention", "raw_feature_norm", opt.raw_feature_norm, tuple(NORMS))
    affinity = torch.bmm(context, rearrange(query, "b q d -> b d q"))
    attention = (smooth * affinity_norm(affinity, NORMS[opt.raw_feature_norm], dim=2)).softmax(1)
    return torch.bmm(rearrange(attention, "b c q -> b q c"), context), attention


def cosine_similarity(x1: Tensor, x2: Tensor, dim: int = 1, eps: float = 1e-8) -> Tensor:
    """Cosines of vectors along `dim`, x1 . x2 / max(|x1| |x2|, eps), without dimensions of size 1, as published.

    >>> cosine_similarity(torch.tensor([[3.0, 4.0]]), torch.tensor([[4.0, 3.0]]))
    tensor(0.9600)
    """
    length = torch.linalg.vector_norm(x1, dim=dim) * torch.linalg.vector_norm(x2, dim=dim)
    return ((x1 * x2).sum(dim) / length.clamp(min=eps)).squeeze()


def _scorer(direction: Direction, opt: Namespace) -> CrossAttentionScore:
    choice("SCAN", "cross_attn", direction, ("t2i", "i2t"))
    choice("SCAN", "raw_feature_norm", opt.raw_feature_norm, tuple(NORMS))
    choice("SCAN", "agg_func", opt.agg_func, tuple(POOLS))
    return CrossAttentionScore(
        direction, NORMS[opt.raw_feature_norm], opt.lambda_softmax, POOLS[opt.agg_func], getattr(opt, "lambda_lse", 6.0)
    )


def _xattn_score(direction, images, captions, cap_lens, opt, region_lengths):
    words, cu_seqlens = pack_padded(f"xattn_score_{direction}", ("captions", "cap_lens"), captions, cap_lens)
    return _scorer(direction, opt)(images, words, cu_seqlens, region_lengths)


def xattn_score_t2i(
    images: Tensor,
    captions: Tensor,
    cap_lens: Sequence[int] | Tensor,
    opt: Namespace,
    region_lengths: Tensor | None = None,
) -> Tensor:
    """Score every image against every caption, words attending to regions (SCAN, section 3.1).

    Args:
        images: [I, R, D], unit rows.
        captions: [T, W, D], padded.
        cap_lens: [T] tokens per caption.
        opt: with raw_feature_norm, agg_func, lambda_softmax and lambda_lse.
        region_lengths: [I] regions of each image; None means R for all.

    Returns:
        Scores, [I, T].

    Raises:
        ValueError: an option is unknown or a shape is wrong.

    >>> from argparse import Namespace
    >>> opt = Namespace(raw_feature_norm="no_norm", agg_func="Mean", lambda_softmax=9.0, lambda_lse=6.0)
    >>> xattn_score_t2i(torch.randn(2, 36, 8), torch.randn(3, 5, 8), [5, 2, 4], opt).shape
    torch.Size([2, 3])
    """
    return _xattn_score("t2i", images, captions, cap_lens, opt, region_lengths)


def xattn_score_i2t(
    images: Tensor,
    captions: Tensor,
    cap_lens: Sequence[int] | Tensor,
    opt: Namespace,
    region_lengths: Tensor | None = None,
) -> Tensor:
    """Score every image against every caption, regions attending to words; arguments as `xattn_score_t2i`.

    >>> from argparse import Namespace
    >>> opt = Namespace(raw_feature_norm="no_norm", agg_func="Mean", lambda_softmax=4.0, lambda_lse=5.0)
    >>> xattn_score_i2t(torch.randn(2, 36, 8), torch.randn(3, 5, 8), [5, 2, 4], opt).shape
    torch.Size([2, 3])
    """
    return _xattn_score("i2t", images, captions, cap_lens, opt, region_lengths)


class ContrastiveLoss(nn.Module):
    """Score a batch and return the hinge loss that ranks matching pairs above the others; summed over the batch."""

    def __init__(self, opt: Namespace, margin: float = 0, max_violation: bool = False) -> None:
        super().__init__()
        self.opt = opt
        self.margin = margin
        self.max_violation = max_violation

    def forward(
        self, im: Tensor, s: Tensor, s_l: Sequence[int] | Tensor, region_lengths: Tensor | None = None
    ) -> Tensor:
        """Images [B, R, D], captions [B, W, D] and their lengths -> loss, 0-d."""
        scores = self.scores(im, s, s_l, region_lengths)
        return hardest_negative_loss(scores, margin=self.margin, hardest=self.max_violation)

    def scores(self, im: Tensor, s: Tensor, s_l: Sequence[int] | Tensor, region_lengths: Tensor | None) -> Tensor:
        """Scores [B, B] of the batch; other models with this loss override this."""
        return _xattn_score(self.opt.cross_attn, im, s, s_l, self.opt, region_lengths)


class SCAN(Matcher):
    """Stacked cross attention network: encoders, loss and optimizer in one object, as published.

    Args:
        opt: the published options; `opt.device` is optional (default: CUDA if there is a GPU).

    Raises:
        ValueError: an option is missing or has an unknown value.

    >>> from argparse import Namespace
    >>> model = SCAN(Namespace(
    ...     grad_clip=2.0, img_dim=6, embed_size=8, precomp_enc_type="basic", no_imgnorm=False,
    ...     vocab_size=9, word_dim=5, num_layers=1, bi_gru=True, no_txtnorm=False, margin=0.2,
    ...     max_violation=True, learning_rate=2e-4, cross_attn="t2i", raw_feature_norm="clipped_l2norm",
    ...     agg_func="LogSumExp", lambda_softmax=9.0, lambda_lse=6.0))
    >>> [len(state) for state in model.state_dict()]
    [2, 9]
    """

    parts: tuple[str, ...] = ("img_enc", "txt_enc")
    # Those that the pair scorer reads.
    options: tuple[str, ...] = ("cross_attn", "raw_feature_norm", "agg_func", "lambda_softmax", "lambda_lse")

    def __init__(self, opt: Namespace) -> None:
        require_options(opt, type(self).__name__, self.reads())
        super().__init__(opt)
        self.scorer = self.similarity(opt)
        self.img_enc = self.image(opt)
        self.txt_enc = self.text(opt)
        self.criterion = self.loss(opt)
        self.optimise((self.txt_enc, self.img_enc), opt)

    @classmethod
    def reads(cls) -> tuple[str, ...]:
        return (*OPTIONS, *cls.options)

    @classmethod
    def similarity(cls, opt: Namespace) -> PairScorer:
        return _scorer(opt.cross_attn, opt)

    def image(self, opt: Namespace) -> nn.Module:
        """Make the image encoder; models with another one override this."""
        return EncoderImage("", opt.img_dim, opt.embed_size, opt.precomp_enc_type, opt.no_imgnorm)

    def text(self, opt: Namespace) -> nn.Module:
        """Make the text encoder; models with another text encoder override this."""
        return EncoderText(opt.vocab_size, opt.word_dim, opt.embed_size, opt.num_layers, opt.bi_gru, opt.no_txtnorm)

    def loss(self, opt: Namespace) -> nn.Module:
        """Make the loss; models with other scores override this."""
        return ContrastiveLoss(opt, opt.margin, opt.max_violation)

    def forward_emb(
        self, images: Tensor, captions: Tensor, lengths: Sequence[int] | Tensor, volatile: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Embed features [B, R, F] and word ids [B, W]; `volatile` means without gradients.

        Returns:
            Image [B, R, D], caption [B, longest, D] and the lengths [B].
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and not volatile):
            features, ids = self.inputs(images, captions, lengths)
            img_emb = self.img_enc(features)
            cap_emb, cap_lens = self.txt_enc(ids, lengths)
        return img_emb, cap_emb, cap_lens

    def forward_loss(
        self,
        img_emb: Tensor,
        cap_emb: Tensor,
        cap_len: Sequence[int] | Tensor,
        *,
        region_lengths: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Loss of a batch of embeddings, 0-d; logged as `Le`."""
        loss = self.criterion(img_emb, cap_emb, cap_len, region_lengths)
        self.log("Le", loss.item(), img_emb.shape[0])
        return loss

    def batch_loss(self, images, captions, lengths, region_lengths):
        return self.forward_loss(*self.forward_emb(images, captions, lengths), region_lengths=region_lengths)


def _shard(
    direction: Direction, images: np.ndarray | Tensor, captions: np.ndarray | Tensor, caplens, opt
) -> np.ndarray:
    # The published evaluators collect a model's float32 embeddings in float64 arrays, which kernels on a GPU refuse.
    dtype = torch.get_default_dtype() if images.dtype == np.float64 else torch.as_tensor(images[:0]).dtype
    return score_arrays(_scorer(direction, opt), images, captions, caplens, device_of(opt), dtype)


def shard_xattn_t2i(
    images: np.ndarray | Tensor,
    captions: np.ndarray | Tensor,
    caplens: Sequence[int] | Tensor,
    opt: Namespace,
    shard_size: int = 128,
) -> np.ndarray:
    """Score all pairs of a split, words attending to regions.

    Args:
        images: [I, R, D]. Arrays in float64, in which the published evaluators collect embeddings, are scored in
            `torch.get_default_dtype()` (float32), the dtype of models; arrays of another dtype, and tensors, are scored
            in that of their own.
        captions: [T, W, D], padded.
        caplens: [T] tokens per caption.
        opt: with raw_feature_norm, agg_func, lambda_softmax and lambda_lse.
        shard_size: not used: the memory bound is `itm_fast.workspace`.

    Returns:
        Scores, float64 [I, T].

    >>> from argparse import Namespace
    >>> opt = Namespace(raw_feature_norm="no_norm", agg_func="Mean", lambda_softmax=9.0, lambda_lse=6.0)
    >>> shard_xattn_t2i(np.ones((2, 36, 8)), np.ones((3, 5, 8)), [5, 2, 4], opt).shape
    (2, 3)
    """
    return _shard("t2i", images, captions, caplens, opt)


def shard_xattn_i2t(
    images: np.ndarray | Tensor,
    captions: np.ndarray | Tensor,
    caplens: Sequence[int] | Tensor,
    opt: Namespace,
    shard_size: int = 128,
) -> np.ndarray:
    """Score all pairs of a split, regions attending to words; arguments as `shard_xattn_t2i`.

    >>> from argparse import Namespace
    >>> opt = Namespace(raw_feature_norm="no_norm", agg_func="Mean", lambda_softmax=4.0, lambda_lse=5.0)
    >>> shard_xattn_i2t(np.ones((2, 36, 8)), np.ones((3, 5, 8)), [5, 2, 4], opt).shape
    (2, 3)
    """
    return _shard("i2t", images, captions, caplens, opt)
