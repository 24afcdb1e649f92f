"""SGRAF (Diao et al., AAAI 2021): drop-in for Paranioar/SGRAF's `model.py` and its evaluator's scoring.

Names, arguments, state_dict keys and numbers are the published ones, in training mode too: SAF's BatchNorm sees
one caption at a time, TextSA's dropout is drawn caption by caption, VisualSA's BatchNorm has the region index as
channel.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from ..nn import GraphReasoning, PairScorer
from ..ops import hardest_negative_loss
from ._common import Dropout, Matcher, encode_text, l1norm, l2norm, require_options, score_arrays
from ._evaluator import AverageMeter, LogCollector, encode_data, evalrank
from ._inputs import TextEncoder
from ._recall import i2t, t2i
from ._self_attention import TextSA, VisualSA
from ._sgraf_scorer import AttentionFiltration, EncoderSimilarity
from .scan import EncoderImagePrecomp as EncoderImage
from .scan import cosine_similarity, func_attention

OPTIONS = (
    "grad_clip", "img_dim", "embed_size", "no_imgnorm", "vocab_size", "word_dim", "num_layers", "bi_gru",
    "no_txtnorm", "margin", "max_violation", "learning_rate",
)  # fmt: skip

__all__ = [
    "SGRAF",
    "AttentionFiltration",
    "AverageMeter",
    "ContrastiveLoss",
    "EncoderImage",
    "EncoderSimilarity",
    "EncoderText",
    "GraphReasoning",
    "LogCollector",
    "SCAN_attention",
    "TextSA",
    "VisualSA",
    "cosine_sim",
    "encode_data",
    "evalrank",
    "i2t",
    "l1norm",
    "l2norm",
    "shard_attn_scores",
    "t2i",
]


def cosine_sim(x1: Tensor, x2: Tensor, dim: int = -1, eps: float = 1e-8) -> Tensor:
    """Cosines along `dim`; as `itm_fast.models.scan.cosine_similarity`.

    >>> import torch
    >>> cosine_sim(torch.tensor([3.0, 4.0]), torch.tensor([4.0, 3.0]))
    tensor(0.9600)
    """
    return cosine_similarity(x1, x2, dim, eps)


def SCAN_attention(query: Tensor, context: Tensor, smooth: float, eps: float = 1e-8) -> Tensor:
    """What each query attends to, for inspection; scores are not computed with this function.

    Args:
        query: [B, Q, D].
        context: [B, C, D].
        smooth: inverse temperature of the softmax over the context.
        eps: not used, as published.

    Returns:
        Unit vectors [B, Q, D].

    >>> import torch
    >>> SCAN_attention(torch.randn(2, 5, 8), torch.randn(2, 36, 8), 9.0).shape
    torch.Size([2, 5, 8])
    """
    return l2norm(func_attention(query, context, Namespace(raw_feature_norm="clipped_l2norm"), smooth)[0])


class EncoderText(TextEncoder):
    """Embedding, dropout 0.4, (bi-)GRU, mean of the directions and l2norm."""

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
        self.dropout = Dropout(0.4)
        self.use_bi_gru = use_bi_gru
        self.cap_rnn = nn.GRU(word_dim, embed_size, num_layers, batch_first=True, bidirectional=use_bi_gru)
        nn.init.uniform_(self.embed.weight, -0.1, 0.1)

    def forward(self, captions: Tensor, lengths: Sequence[int] | Tensor) -> Tensor:
        """Word ids [B, W] int64 -> caption [B, longest, D], zeros beyond each length."""
        return encode_text(self.dropout(self.embed(captions)), lengths, self.cap_rnn, self.no_txtnorm)[0]


class ContrastiveLoss(nn.Module):
    """The hinge loss of a score matrix, which ranks matching pairs above the others; summed over the batch."""

    def __init__(self, margin: float = 0, max_violation: bool = False) -> None:
        super().__init__()
        self.margin = margin
        self.max_violation = max_violation

    def forward(self, scores: Tensor) -> Tensor:
        """Scores [B, B] with the matching pairs on the diagonal -> loss, 0-d."""
        return hardest_negative_loss(scores, margin=self.margin, hardest=self.max_violation)


class SGRAF(Matcher):
    """Similarity graph reasoning or attention filtration: encoders, scorer, loss and optimizer in one object.

    Args:
        opt: the published options; optional are `opt.device` (default: CUDA if there is a GPU) and `opt.num_region`
            (default: 36).

    Raises:
        ValueError: an option is missing or has an unknown value.

    >>> import torch
    >>> from argparse import Namespace
    >>> model = SGRAF(Namespace(
    ...     grad_clip=2.0, img_dim=6, embed_size=8, no_imgnorm=False, vocab_size=9, word_dim=5, num_layers=1,
    ...     bi_gru=True, no_txtnorm=False, sim_dim=4, module_name="SGR", sgr_step=3, margin=0.2,
    ...     max_violation=True, learning_rate=2e-4))
    >>> model.val_start()
    >>> ids = torch.tensor([[1, 4, 2], [1, 2, 0]])
    >>> model.forward_sim(*model.forward_emb(torch.randn(2, 36, 6), ids, [3, 2])).shape
    torch.Size([2, 2])
    """

    parts: tuple[str, ...] = ("img_enc", "txt_enc", "sim_enc")
    weighs_regions = True
    options: tuple[str, ...] = ("sim_dim", "module_name", "sgr_step")  # those that the pair scorer reads
    sim_enc: PairScorer

    def __init__(self, opt: Namespace) -> None:
        require_options(opt, type(self).__name__, self.reads())
        super().__init__(opt)
        self.img_enc = self.image(opt)
        self.txt_enc = self.text(opt)
        self.sim_enc = self.similarity(opt)
        self.criterion = ContrastiveLoss(opt.margin, opt.max_violation)
        self.optimise((self.txt_enc, self.img_enc, self.sim_enc), opt)

    @classmethod
    def reads(cls) -> tuple[str, ...]:
        return (*OPTIONS, *cls.options)

    def image(self, opt: Namespace) -> nn.Module:
        """Make the image encoder; models with another one override this."""
        return EncoderImage(opt.img_dim, opt.embed_size, opt.no_imgnorm)

    def text(self, opt: Namespace) -> nn.Module:
        """Make the text encoder; models with another text encoder override this."""
        return EncoderText(opt.vocab_size, opt.word_dim, opt.embed_size, opt.num_layers, opt.bi_gru, opt.no_txtnorm)

    @classmethod
    def similarity(cls, opt: Namespace) -> PairScorer:
        """Make the pair scorer; other models with these encoders override this."""
        regions = getattr(opt, "num_region", 36)
        return EncoderSimilarity(opt.embed_size, opt.sim_dim, opt.module_name, opt.sgr_step, regions)

    @property
    def scorer(self) -> PairScorer:
        """The pair scorer: `sim_enc`."""
        return self.sim_enc

    def forward_emb(
        self, images: Tensor, captions: Tensor, lengths: Sequence[int] | Tensor
    ) -> tuple[Tensor, Tensor, Sequence[int] | Tensor]:
        """Embed features [B, R, F] and word ids [B, W] -> image [B, R, D], caption [B, longest, D], lengths."""
        features, ids = self.inputs(images, captions, lengths)
        return self.img_enc(features), self.txt_enc(ids, lengths), lengths

    def forward_sim(
        self,
        img_embs: Tensor,
        cap_embs: Tensor,
        cap_lens: Sequence[int] | Tensor,
        region_lengths: Tensor | None = None,
    ) -> Tensor:
        """Scores [I, T] of embeddings; arguments as `EncoderSimilarity.forward`."""
        return self.sim_enc(img_embs, cap_embs, cap_lens, region_lengths)

    def forward_loss(self, sims: Tensor, **kwargs: Any) -> Tensor:
        """Loss of scores [B, B], 0-d; logged as `Loss`."""
        loss = self.criterion(sims)
        self.log("Loss", loss.item(), sims.shape[0])
        return loss

    def batch_loss(self, images, captions, lengths, region_lengths):
        return self.forward_loss(self.forward_sim(*self.forward_emb(images, captions, lengths), region_lengths))


def shard_attn_scores(
    model: SGRAF,
    img_embs: np.ndarray | Tensor,
    cap_embs: np.ndarray | Tensor,
    cap_lens: Sequence[int] | Tensor,
    opt: Namespace,
    shard_size: int = 100,
) -> np.ndarray:
    """Score all pairs of a split.

    Args:
        model: in evaluation mode (`val_start`).
        img_embs: [I, R, D].
        cap_embs: [T, W, D], padded.
        cap_lens: [T] tokens per caption.
        opt: not used, as published.
        shard_size: not used: the memory bound is `itm_fast.workspace`.

    Returns:
        Scores, float64 [I, T], computed in the model's dtype.
    """
    dtype = next(model.sim_enc.parameters()).dtype
    return score_arrays(model.sim_enc, img_embs, cap_embs, cap_lens, model.device, dtype)
