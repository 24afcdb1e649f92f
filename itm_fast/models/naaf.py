"""NAAF (Zhang et al., CVPR 2022): the pair score, thresholds and encoders of CrossmodalGroup/NAAF.

With D = T V^T, m_j = max_i D_ji, and t a threshold, the score is the mean over words j of n_j + f_j + r_j:

    f_j = t_j . c_j / |c_j|, c_j the attention over the regions with D_ji > t, weights exp(lambda (D_ji - t))
    r_j = sum_i alpha_ji D_ji, alpha SCAN's attention
    n_j = min(0, m_j - t) in training; in evaluation m_j - t where its mean over similar words is negative, else 0

each an `itm_fast.cross_attention_score`. In training the thresholds follow the affinities of the batch's
words, caption by caption (`mine`). Captions of one word are scored like all others; the published code gives each the
mean of f over all images.
"""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import work_dtype
from .._names import Negative
from ..nn import Attention, CrossAttentionScore, State
from ..ops import cross_attention_score
from ..ops._cpu_calls import score_sum
from ..packing import bounds
from ._common import PaddedScorer, choice, without_padding
from ._rows import apart
from ._sums import ScoredLoss
from .bfan import EncoderText
from .scan import SCAN

MODES = ("", "train_online", "train", "test")
ENOUGH = 200  # words of matching pairs before the thresholds follow them
TINY = 1e-8  # the least length that c is divided by
OPTIONS = ("lambda_softmax", "thres", "thres_safe", "intra_lambda", "alpha", "mode")
LEARNED = ("thres", "thres_safe")  # which training moves
MOVED = (*LEARNED, "mean_pos", "mean_neg", "stnd_pos", "stnd_neg")  # what the published function writes into `opt`

__all__ = ["NAAF", "EncoderText", "GloveRNNEncoder", "NegativeAware", "xattn_score", "xattn_score_test"]


class NegativeAware(PaddedScorer):
    """NAAF's pair score, and in training its thresholds.

    Args:
        lambda_softmax: inverse temperature of both attentions.
        thres: the threshold in training.
        thres_safe: the threshold in evaluation.
        intra_lambda: inverse temperature of the mean over similar words.
        alpha: weight of a false match against a false mismatch in the threshold.
        mode: "": by training or evaluation mode, thresholds following the batch; "test" or "train": always that score,
            with the thresholds given; "train_online": always that of training, thresholds following the batch.

    Attributes:
        thres, thres_safe, mean_pos, mean_neg, stnd_pos, stnd_neg: as the published `opt` has them after a batch.

    >>> NegativeAware(thres_safe=0.2).eval()(torch.randn(2, 36, 8), torch.randn(3, 5, 8), [5, 2, 4]).shape
    torch.Size([2, 3])
    """

    all_pairs = True  # the thresholds follow the batch, caption by caption

    def __init__(
        self,
        lambda_softmax: float = 20.0,
        thres: float = 0.0,
        thres_safe: float = 0.0,
        intra_lambda: float = 5.0,
        alpha: float = 2.0,
        mode: str = "",
    ) -> None:
        super().__init__()
        choice("NAAF", "mode", mode, MODES)
        self.lambda_softmax, self.intra_lambda, self.alpha = float(lambda_softmax), float(intra_lambda), float(alpha)
        self.thres, self.thres_safe, self.mode = float(thres), float(thres_safe), mode
        self.mean_pos = self.mean_neg = self.stnd_pos = self.stnd_neg = 0.0

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in OPTIONS)

    def _terms(self) -> list[dict[str, Any]]:
        """The options of n, f and r."""
        trains = self.training if not self.mode else self.mode != "test"
        threshold, scale = self.thres if trains else self.thres_safe, self.lambda_softmax
        plain: dict[str, Any] = {"affinity_norm": "none", "scale": scale, "threshold": threshold}
        pool: Negative = "negative" if trains else "smoothed_negative"
        largest = {"weights": "hard", "similarity": "product", "pool": pool, "pool_scale": self.intra_lambda}
        return [
            plain | largest,
            plain | {"weights": "threshold", "similarity": "projection", "pool": "mean"},
            {"scale": scale, "similarity": "product", "pool": "mean"},
        ]

    def score(
        self,
        image_state: State,
        words: Tensor,
        cu_seqlens: Tensor,
        caption_state: State,
        region_lengths: Tensor | None = None,
    ) -> Tensor:
        """Scores [I, T]. Where thresholds follow the batch, caption t belongs to image t."""
        rest = image_state, words, cu_seqlens, (), region_lengths
        if self.mode in ("test", "train") or not (self.training or self.mode):
            return self._sum(*rest)
        edge = bounds(cu_seqlens, len(words), "NAAF")
        if len(edge) - 1 != len(image_state[0]):
            raise ValueError(
                "NAAF: in training caption t must belong to image t, as the thresholds follow such pairs; got "
                f"{len(image_state[0])} images and {len(edge) - 1} captions. mode='train' holds the thresholds fixed"
            )
        return self._online(edge, *rest)

    def _online(self, edge: list[int], image_state: State, words: Tensor, *rest: Any) -> Tensor:
        """Scores of matching pairs, whose thresholds may move after every caption.

        r and the affinities D do not depend on them, so n and f are made of D alone: with G the dot products of an
        image's regions and w the weights of c_j, t_j . c_j = sum_i w_i D_ji and |c_j|^2 = w . G w.
        """
        (image,), (_, _, region_lengths) = image_state, rest
        relevance = CrossAttentionScore(**self._terms()[2]).score(image_state, words, *rest)
        real = None
        if region_lengths is not None:
            image, real = without_padding(image, region_lengths)
        x, y = image.to(work_dtype(image)), words.to(work_dtype(words))
        affinity = torch.einsum("ird,nd->irn", x, y)
        gram = x @ x.transpose(1, 2)
        padding = None if real is None else ~real[:, :, None]
        peak = (affinity if padding is None else affinity.masked_fill(padding, float("-inf"))).amax(1)  # [I, N]
        found, seen = [relevance.new_empty(len(image), 0)], _Seen()
        lengths = [stop - start for start, stop in pairwise(edge)]
        # Cut once: backward of a slice would fill and add a gradient of the whole, for every caption.
        parts = zip(affinity.split(lengths, 2), peak.split(lengths, 1), relevance.unbind(1), strict=True)
        for t, (own, top, r) in enumerate(parts):
            threshold = self.thres
            kept = own > threshold if padding is None else (own > threshold) & ~padding
            weight = torch.where(kept, (self.lambda_softmax * (own - threshold)).exp(), 0.0)
            weight = weight / (weight.sum(1, keepdim=True) + 1e-8)
            square, none = (weight * (gram @ weight)).sum(1), ~kept.any(1)
            length = square.clamp_min(TINY**2).sqrt()  # as max(|c|, 1e-8), whose gradient there is 0 too
            f = ((weight * own).sum(1) / length).masked_fill(none, 0.0)
            n = (top - threshold).clamp(max=0.0)
            score = r + (n + f).mean(1).to(r.dtype)
            self.mine(seen, t, top, score)
            found.append(score[:, None])
        return torch.cat(found, 1)

    def _sum(self, image_state: State, words: Tensor, cu_seqlens: Tensor, _: State, counts: Tensor | None) -> Tensor:
        """n + f + r: in C++ from one pass over the affinities, where it scores and no gradient is recorded."""
        terms, (image,) = self._terms(), image_state
        if apart(image, words):
            return score_sum(image, words, cu_seqlens, counts, [CrossAttentionScore(**term).options for term in terms])
        n, f, r = (cross_attention_score(image, words, cu_seqlens, region_lengths=counts, **term) for term in terms)
        return n + f + r

    @torch.no_grad()
    def mine(self, seen: _Seen, t: int, peak: Tensor, score: Tensor) -> None:
        """Move the thresholds after caption t, given its scores [I] and its words' largest affinities [I, L].

        If its own image scores highest, the largest affinities of its words with this image, and with the image of the
        lowest score, join those of the captions before. Once there are more than 200 of each, `thres` moves to where
        two normal distributions with their means and deviations cross, and `thres_safe` to three deviations below the
        mean of the matching ones. Before, both are 0.
        """
        if int(score.argmax()) == t:
            seen.pos.append(peak[t])
            seen.neg.append(peak[int(score.argmin())])
            seen.words += peak.shape[1]
            if seen.words > ENOUGH:
                self._move(torch.cat(seen.pos), torch.cat(seen.neg))
        if seen.words < ENOUGH:
            self.thres = self.thres_safe = 0.0

    def _move(self, pos: Tensor, neg: Tensor) -> None:
        self.mean_pos, self.stnd_pos = pos.mean().item(), pos.std().item()
        self.mean_neg, self.stnd_neg = neg.mean().item(), neg.std().item()
        (mp, sp), (mn, sn) = (self.mean_pos, self.stnd_pos), (self.mean_neg, self.stnd_neg)
        if not sp:
            return
        a, b = sp**2 - sn**2, 2 * (mp * sn**2 - mn * sp**2)
        c = (mn * sp) ** 2 - (mp * sn) ** 2 + 2 * (sp * sn) ** 2 * math.log(sn / (self.alpha * sp) + 1e-8)
        new = self.thres, self.thres_safe
        if b * b > 4 * a * c:
            new = (-b + math.sqrt(b * b - 4 * a * c)) / (2 * a + 1e-10), mp - 3 * sp
        crossing, safe = (x if 0 <= x <= 1 else 0.0 for x in new)
        self.thres = 0.7 * crossing + 0.3 * self.thres
        self.thres_safe = 0.7 * safe + 0.3 * self.thres_safe

    def attention(self, image: Tensor, words: Tensor) -> Attention:
        """`regions` [W, R] of the term r."""
        found = [CrossAttentionScore(**term).attention(image, words) for term in self._terms()]
        return Attention(sum(one.score for one in found), {"regions": found[2].weights["regions"]})


def xattn_score(images: Tensor, captions: Tensor, cap_lens: Sequence[int] | Tensor, opt: Namespace) -> Tensor:
    """Scores [I, I] of a batch for training, caption t that of image t; moves `opt`'s thresholds and their statistics.

    Args:
        images: [I, R, D], unit rows.
        captions: [I, W, D], padded, unit rows.
        cap_lens: [I] tokens per caption.
        opt: with lambda_softmax, thres, thres_safe and alpha.

    >>> opt = Namespace(lambda_softmax=20.0, thres=0.1, thres_safe=0.1, alpha=2.0)
    >>> xattn_score(torch.randn(3, 36, 8), torch.randn(3, 5, 8), [5, 2, 4], opt).shape, opt.thres
    (torch.Size([3, 3]), 0.0)
    """
    scorer = NegativeAware(opt.lambda_softmax, opt.thres, opt.thres_safe, alpha=opt.alpha, mode="train_online")
    score = scorer(images, captions, cap_lens)
    for name in MOVED:
        if name in LEARNED or scorer.stnd_pos:  # there are means once there are enough words
            setattr(opt, name, getattr(scorer, name))
    return score


def xattn_score_test(images: Tensor, captions: Tensor, cap_lens: Sequence[int] | Tensor, opt: Namespace) -> Tensor:
    """Scores [I, T] in float64 for evaluation; arguments as `xattn_score`, with any captions.

    >>> opt = Namespace(lambda_softmax=20.0, thres_safe=0.1)
    >>> xattn_score_test(torch.randn(2, 36, 8), torch.randn(3, 5, 8), [5, 2, 4], opt).shape
    torch.Size([2, 3])
    """
    opt.using_intra_info = True  # as the published function leaves it
    scorer = NegativeAware(opt.lambda_softmax, thres_safe=opt.thres_safe, mode="test")
    return scorer(images, captions, cap_lens).double()


class _Seen:
    """Largest affinities of the words of matching and of mismatching pairs in one batch."""

    def __init__(self) -> None:
        self.pos: list[Tensor] = []
        self.neg: list[Tensor] = []
        self.words = 0


class GloveEmb(nn.Module):
    """Word vectors under the published key `glove.weight`; they are trained, as there."""

    def __init__(self, num_embeddings: int, glove_dim: int) -> None:
        super().__init__()
        self.glove = nn.Embedding(num_embeddings, glove_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.glove(x)


class GloveRNNEncoder(EncoderText):
    """The text encoder with GloVe's word vectors, which a checkpoint or the caller fills."""

    def __init__(
        self, vocab_size: int, embed_dim: int, latent_size: int, num_layers: int = 1, no_txtnorm: bool = False
    ) -> None:
        super().__init__(vocab_size, embed_dim, latent_size, num_layers, no_txtnorm)
        self.embed = GloveEmb(vocab_size, embed_dim)  # type: ignore[assignment]

    @property
    def vocab_size(self) -> int:
        return self.embed.glove.num_embeddings  # type: ignore[union-attr, return-value]


class NAAF(SCAN):
    """Negative-aware attention framework: encoders, scorer, loss and optimizer in one object.

    The loss always takes the hardest negatives, as published. The thresholds are in `scorer`.

    Args:
        opt: the options of SCAN's encoders and training; lambda_softmax, thres, thres_safe, intra_lambda, alpha, mode
            and precomp_enc_text_type; `opt.device` is optional.

    Raises:
        ValueError: an option is missing or has an unknown value.

    >>> model = NAAF(Namespace(
    ...     grad_clip=2.0, img_dim=6, embed_size=8, precomp_enc_type="basic", no_imgnorm=False, vocab_size=9,
    ...     word_dim=5, num_layers=1, no_txtnorm=False, margin=0.2, max_violation=True, learning_rate=5e-4,
    ...     lambda_softmax=20.0, thres=0.0, thres_safe=0.0, intra_lambda=5.0, alpha=2.0, mode="",
    ...     precomp_enc_text_type="GloVe"))
    >>> [len(state) for state in model.state_dict()]
    [2, 9]
    """

    options = (*OPTIONS, "precomp_enc_text_type")
    scorer: NegativeAware

    @classmethod
    def reads(cls) -> tuple[str, ...]:
        return tuple(name for name in super().reads() if name != "bi_gru")

    @classmethod
    def similarity(cls, opt: Namespace) -> NegativeAware:
        return NegativeAware(*(getattr(opt, name) for name in OPTIONS))

    def text(self, opt: Namespace) -> nn.Module:
        choice("NAAF", "precomp_enc_text_type", opt.precomp_enc_text_type, ("basic", "GloVe"))
        make: Any = EncoderText if opt.precomp_enc_text_type == "basic" else GloveRNNEncoder
        return make(opt.vocab_size, opt.word_dim, opt.embed_size, opt.num_layers, opt.no_txtnorm)

    def learned_options(self) -> dict[str, float]:
        return {name: getattr(self.scorer, name) for name in LEARNED}

    def restore_learned(self, found: Mapping[str, Any]) -> None:
        for name, value in found.items():
            setattr(self.scorer, name, float(value))

    def train_start(self) -> None:
        """Switch to training mode: thresholds follow the batches."""
        super().train_start()
        self.scorer.train()

    def val_start(self) -> None:
        """Switch to evaluation mode."""
        super().val_start()
        self.scorer.eval()

    def loss(self, opt: Namespace) -> nn.Module:
        return ScoredLoss(self.scorer, opt.margin, True)
