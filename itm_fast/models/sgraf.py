"""SGRAF (Diao et al., AAAI 2021): drop-in for Paranioar/SGRAF's `model.py` and its evaluator's scoring.

Names, arguments, state_dict keys and numbers are the published ones, in training mode too: SAF's BatchNorm sees
one caption at a time, TextSA's dropout is drawn caption by caption, VisualSA's BatchNorm has the region index as
channel. What depends on one image or one caption alone is computed once; pairs are scored in blocks by the ops.
"""

from __future__ import annotations

from argparse import Namespace
from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .._share import share
from .._workspace import GIB, scratch_bytes, workspace
from ..nn import Attention, GraphReasoning, PairScorer, SimilarityFilter, SimilarityGraph, State, xavier_
from ..ops import (
    hardest_negative_loss,
    similarity_filter_score,
    similarity_graph_score,
    similarity_nodes,
)
from ..ops._recompute import again
from ..packing import bounds
from ._common import Dropout, Matcher, choice, encode_text, l1norm, l2norm, require_options, score_arrays
from ._evaluator import AverageMeter, LogCollector, encode_data, evalrank
from ._inputs import TextEncoder
from ._recall import i2t, t2i
from ._self_attention import GlobalVectors, TextSA, VisualSA
from ._sgraf_attention import similarity_attention
from .scan import EncoderImagePrecomp as EncoderImage
from .scan import cosine_similarity, func_attention

NAME = "EncoderSimilarity"
OUTPUTS = ("score", "logit", "z")
SMOOTH = 9.0  # hard-coded in the published code
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


class AttentionFiltration(SimilarityFilter):
    """SAF over the nodes of one caption.

    Args:
        sim_dim: S.

    >>> AttentionFiltration(8)(torch.rand(4, 13, 8)).shape
    torch.Size([4, 8])
    """

    def forward(self, sim_emb: Tensor) -> Tensor:  # type: ignore[override]
        """Nodes [B, M, S] of B images with one caption -> [B, S], unit rows."""
        cu_seqlens = torch.tensor([0, sim_emb.shape[1]], dtype=torch.int32, device=sim_emb.device)
        return super().forward(sim_emb, cu_seqlens)[:, 0]


class EncoderSimilarity(GlobalVectors):
    """Scores of all pairs from regions and words: SGR or SAF over similarity vectors (equations 1 to 9).

    Args:
        embed_size: D.
        sim_dim: S.
        module_name: "SGR" or "SAF". The published default "AVE" is refused, as it is there.
        sgr_step: K, for SGR; 0 scores the global similarity vector alone.
        num_region: R. The published code fixes 36.

    Attributes:
        output: "score"; "logit" for the number before the sigmoid, whose gradient stays finite where a score is rounded
            to 1.0; or "z" for the vectors [I, T, S] before the last layer, as MSCN's meta network takes them. Set it on
            the object, or in a subclass.

    Raises:
        ValueError: `module_name` is neither, or `output`, when pairs are scored, none of the three.

    >>> scorer = EncoderSimilarity(8, 4, "SAF").eval()
    >>> scorer(torch.randn(2, 36, 8), torch.randn(3, 5, 8), [5, 2, 4]).shape
    torch.Size([2, 3])
    """

    output = "score"

    def __init__(
        self, embed_size: int, sim_dim: int, module_name: str = "AVE", sgr_step: int = 3, num_region: int = 36
    ) -> None:
        choice(NAME, "module_name", module_name, ("SGR", "SAF"))
        super().__init__(embed_size, num_region)
        self.module_name = module_name
        self.all_images = module_name == "SAF"
        self.sim_tranloc_w = nn.Linear(embed_size, sim_dim)
        self.sim_tranglo_w = nn.Linear(embed_size, sim_dim)
        self.sim_eval_w = nn.Linear(sim_dim, 1)
        if module_name == "SGR":
            self.SGR_module = SimilarityGraph(sim_dim, sgr_step)
        else:
            self.SAF_module = AttentionFiltration(sim_dim)
        for linear in (self.sim_tranloc_w, self.sim_tranglo_w, self.sim_eval_w):
            xavier_(linear)

    def extra_repr(self) -> str:
        """Whether the results are no scores; `weights_checksum` includes it through `repr`."""
        return "" if self.output == "score" else f"output={self.output!r}"

    @property
    def sigmoid(self) -> Callable[[Tensor], Tensor]:
        """The last step, which methods of the published class call by this name; it has no parameters."""
        return torch.sigmoid

    def score(
        self,
        image_state: State,
        words: Tensor,
        cu_seqlens: Tensor,
        caption_state: State,
        region_lengths: Tensor | None = None,
    ) -> Tensor:
        """Scores in (0, 1), [I, T], of the images and captions whose states are given; by `output`, logits or z.

        In training all images of the batch must come in one call: SAF's statistics are over all of them.
        """
        if self.output not in OUTPUTS:
            raise ValueError(f"{NAME}: output must be one of {', '.join(OUTPUTS)}, got {self.output!r}")
        states = image_state, words, cu_seqlens, caption_state, region_lengths
        if self.output != "z" and self.module_name == "SGR" and len(self.SGR_module):
            return self._score_pairs(similarity_graph_score, self.SGR_module.stacked(), *states)
        if self.output != "z" and self.module_name == "SAF" and not self.SAF_module.bn.training:
            score = partial(similarity_filter_score, eps=self.SAF_module.bn.eps)
            return self._score_pairs(score, self.SAF_module.arguments(), *states)
        # One half of the scratch is for a block's nodes and their gradients, the other for the ops that run on them.
        limit = scratch_bytes(words.device) // 2
        with workspace(limit / GIB):
            return self._score_together(*states, limit)

    def attention(self, image: Tensor, words: Tensor) -> Attention:
        """`regions`, `nodes` and, of SGR, `edges`: see `itm_fast.attention`."""
        return similarity_attention(self, SMOOTH, image, words)

    def _score_pairs(self, score, head, image_state, words, cu_seqlens, caption_state, region_lengths) -> Tensor:
        """Score with one op, for which all pairs are independent."""
        (image, image_global), (caption_global,) = image_state, caption_state
        local, overall, final = self.sim_tranloc_w, self.sim_tranglo_w, self.sim_eval_w
        return score(
            image, image_global, words, caption_global, cu_seqlens, local.weight, local.bias,
            overall.weight, overall.bias, *head, final.weight[0], final.bias,
            scale=SMOOTH, region_lengths=region_lengths, output=self.output,
        ).to(words.dtype)  # fmt: skip

    def _score_together(self, image_state, words, cu_seqlens, caption_state, region_lengths, limit) -> Tensor:
        """Score blocks of all images with some captions: in training, SAF's batch statistics are over all images."""
        (image, image_global), (caption_global,) = image_state, caption_state
        N, I, T = len(words), len(image), len(caption_global)
        row = 2 * max(I, 1) * self.sim_eval_w.in_features * words.element_size()
        most, run_block = limit // row, self._block
        if torch.is_grad_enabled() and most < N + T:
            run_block = again(self._block, words.device.type)
        edge, blocks, start = bounds(cu_seqlens, N, NAME), [], 0
        nodes = [stop + t for t, stop in enumerate(edge)]  # bounds of the captions' nodes
        while start < T:
            stop = max(start + 1, bisect_right(nodes, nodes[start] + most) - 1)
            part, at = words[edge[start] : edge[stop]], cu_seqlens[start : stop + 1] - edge[start]
            blocks.append(run_block(image, image_global, part, at, caption_global[start:stop], region_lengths))
            start = stop
        if not blocks:
            return words.new_empty((I, 0, self.sim_eval_w.in_features) if self.output == "z" else (I, 0))
        scores, means, variances = zip(*blocks, strict=True)
        if len(means[0]):
            found = torch.cat(means), torch.cat(variances), I * (cu_seqlens.diff() + 1)
            now = share()
            if now is not None and now.divided:
                found = now.whole(found[0]), now.whole(found[1]), now.whole(found[2])
            self.SAF_module.track(*found)
        return torch.cat(scores, 1)

    def _block(
        self, image, image_global, words, cu_seqlens, caption_global, region_lengths
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Scores or logits [I, T] or z [I, T, S], and in training SAF's mean and variance, each [T]."""
        local, overall = self.sim_tranloc_w, self.sim_tranglo_w
        nodes, node_edge = similarity_nodes(
            image, image_global, words, caption_global, cu_seqlens, local.weight, local.bias,
            overall.weight, overall.bias, scale=SMOOTH, region_lengths=region_lengths,
        )  # fmt: skip
        if self.module_name == "SGR":
            z = self.SGR_module(nodes, node_edge)
            mean = var = z.new_empty(0)
        else:
            z, mean, var = self.SAF_module.filtered(nodes, node_edge)
        if self.output == "z":
            return z.to(words.dtype), mean, var
        logit = self.sim_eval_w(z).squeeze(2)
        return (logit if self.output == "logit" else logit.sigmoid()).to(words.dtype), mean, var


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
