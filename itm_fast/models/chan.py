"""CHAN (Pan, Wu, Zhang; CVPR 2023): its pair score and encoders, under the names and keys of ppanzx/CHAN.

Each word is coded by its largest region (VHA), each region by its largest word (THA) or by a softmax over words (VSA),
and what they find is pooled. The encoders are the GRU ones. Of its training, AdamW, the first epoch with the mean
hinge, half precision and the dropout of words and regions are not here: this model trains as SCAN does.
"""

from __future__ import annotations

from argparse import Namespace

from torch import Tensor, nn

from ._common import choice, l2norm
from ._image_encoders import EncoderImagePrecomp as _Plain
from ._sums import ScoredLoss, SumOfScores
from .maxsim import HARD
from .scan import SCAN
from .scan import EncoderText as _Text

CODINGS = ("VHACoding", "THACoding", "VSACoding")
POOLINGS = {"LSEPooling": "lse", "MeanPooling": "mean", "MaxPooling": "max", "SumPooling": "sum"}
ENCODERS = ("basic", "selfattention")

__all__ = ["CHAN", "EncoderImagePrecomp", "EncoderTextBigru", "SelfAttention", "SimsEncoder"]


class SimsEncoder(SumOfScores):
    """CHAN's pair score: coding, then pooling. "LSEPooling" is log sum exp(m / belta), about 6 and no cosine.

    Its 1e-8 beside lengths is a lower bound here, which changes VSA's scores by about 1e-8.

    Args:
        coding_type: "VHACoding", "THACoding" or "VSACoding".
        pooling_type: "LSEPooling", "MeanPooling", "MaxPooling" or "SumPooling". Its "SoftmaxPooling", which gives NaN
            where anything is padded, is refused.
        belta: temperature of LSEPooling.
        alpha: temperature of VSACoding.

    >>> import torch
    >>> SimsEncoder()(torch.randn(2, 36, 8), torch.randn(3, 5, 8), [5, 2, 4]).shape
    torch.Size([2, 3])
    """

    def __init__(
        self,
        coding_type: str = "VHACoding",
        pooling_type: str = "LSEPooling",
        belta: float = 0.1,
        alpha: float = 0.1,
    ) -> None:
        choice("CHAN", "coding_type", coding_type, CODINGS)
        choice("CHAN", "pooling_type", pooling_type, tuple(POOLINGS))
        soft = {"affinity_norm": "none", "scale": 1 / alpha, "similarity": "projection"}
        own = {
            "direction": "t2i" if coding_type == "VHACoding" else "i2t",
            **(soft if coding_type == "VSACoding" else HARD),
            "pool": POOLINGS[pooling_type],
            "pool_scale": 1 / belta,
        }
        super().__init__([(1 / belta if pooling_type == "LSEPooling" else 1.0, own)])


class SelfAttention(nn.Module):
    """x + attention of LayerNorm(x), 8 heads; without lengths, as the GRU script calls it."""

    def __init__(self, d_model: int, n_head: int = 8) -> None:
        super().__init__()
        self.ln = nn.LayerNorm(d_model)
        self.attn = nn.MultiheadAttention(d_model, n_head, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """[B, R, D] -> [B, R, D]."""
        own = self.ln(x)
        return x + self.attn(own, own, own, need_weights=False)[0]


class EncoderImagePrecomp(_Plain):
    """Linear, self-attention over the regions where `precomp_enc_type` is "selfattention", and l2norm."""

    def __init__(
        self, img_dim: int, embed_size: int, precomp_enc_type: str = "basic", no_imgnorm: bool = False
    ) -> None:
        choice("EncoderImagePrecomp", "precomp_enc_type", precomp_enc_type, ENCODERS)
        super().__init__(img_dim, embed_size, no_imgnorm)
        self.feedforward = nn.Identity() if precomp_enc_type == "basic" else SelfAttention(embed_size)

    def forward(self, images: Tensor, image_lengths: Tensor | None = None) -> Tensor:
        """Features [B, R, F] -> [B, R, D]; `image_lengths` is not used, as published."""
        features = self.feedforward(self.fc(images))
        return features if self.no_imgnorm else l2norm(features, dim=-1)


class EncoderTextBigru(_Text):
    """SCAN's text encoder, with a linear map `fc` that the published code stores and does not apply."""

    def __init__(
        self, vocab_size: int, embed_size: int, word_dim: int, num_layers: int, use_bi_gru: bool = True,
        no_txtnorm: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(vocab_size, word_dim, embed_size, num_layers, use_bi_gru, no_txtnorm)
        self.fc = nn.Linear(embed_size, embed_size)
        nn.init.xavier_uniform_(self.embed.weight)


class CHAN(SCAN):
    """Cross-modal hard aligning network with GRU encoders: encoders, scorer, loss and optimizer in one object.

    Args:
        opt: the options of SCAN's encoders and training, and coding_type, pooling_type, belta and alpha; `opt.device`
            is optional.

    Raises:
        ValueError: an option is missing or has an unknown value.

    >>> model = CHAN(Namespace(
    ...     grad_clip=2.0, img_dim=6, embed_size=8, precomp_enc_type="basic", no_imgnorm=False, vocab_size=9,
    ...     word_dim=5, num_layers=1, bi_gru=True, no_txtnorm=False, margin=0.05, max_violation=True,
    ...     learning_rate=5e-4, coding_type="VHACoding", pooling_type="LSEPooling", belta=0.1, alpha=0.1))
    >>> [len(state) for state in model.state_dict()]
    [2, 11, 0, 0]
    """

    parts = ("img_enc", "txt_enc", "sim_enc", "criterion")
    options = ("coding_type", "pooling_type", "belta", "alpha")

    @property
    def sim_enc(self) -> nn.Module:
        """The pair scorer, which has no parameters."""
        return self.scorer

    @classmethod
    def similarity(cls, opt: Namespace) -> SimsEncoder:
        return SimsEncoder(opt.coding_type, opt.pooling_type, opt.belta, opt.alpha)

    def image(self, opt: Namespace) -> nn.Module:
        return EncoderImagePrecomp(opt.img_dim, opt.embed_size, opt.precomp_enc_type, opt.no_imgnorm)

    def text(self, opt: Namespace) -> nn.Module:
        return EncoderTextBigru(
            opt.vocab_size, opt.embed_size, opt.word_dim, opt.num_layers, opt.bi_gru, opt.no_txtnorm
        )

    def loss(self, opt: Namespace) -> nn.Module:
        return ScoredLoss(self.scorer, opt.margin, opt.max_violation)
