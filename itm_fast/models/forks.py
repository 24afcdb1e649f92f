"""SGRAF's pair scorer as the repositories that train it on noisy pairs change it; their losses stay theirs.

In a fork the import goes below the class that it replaces, as an import above it is silently overridden:

    from itm_fast.models.forks import DECL as EncoderSimilarity

| name | repository | what differs from `itm_fast.models.sgraf.EncoderSimilarity` |
|---|---|---|
| `NCR`, `RCL`, `CRCL` | XLearning-SCU/2021-NeurIPS-NCR, penghu-cs/RCL (RCL-SGRAF), QinYang79/CRCL | nothing |
| `DECL` | QinYang79/DECL | the result is the logit |
| `L2RM` | hhc1997/L2RM | scores of matching pairs as well |
| `BiCro` | xu5zhao/BiCro | `glo_emb`, the means of regions and of words |

hhc1997/MSCN is not among them: its training differentiates the gradients of the scores once more, which the ops refuse.
In evaluation `EncoderSimilarity` with `output` "z" gives the vectors that its meta network takes.

`itm_fast.models.load(path, network="A")` reads NCR's checkpoints, which hold `model_A` and `model_B`.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ._common import sums
from ._lengths import pack_padded
from .sgraf import EncoderSimilarity

__all__ = ["CRCL", "DECL", "NCR", "RCL", "BiCro", "L2RM"]

NCR = RCL = CRCL = EncoderSimilarity


class DECL(EncoderSimilarity):
    """SGRAF's scorer without its sigmoid; DECL's loss takes logits, and its `forward_sim` the sigmoid.

    >>> import torch
    >>> scorer = DECL(8, 4, "SAF").eval()
    >>> logit = scorer(torch.randn(2, 36, 8), torch.randn(3, 5, 8), [5, 2, 4])
    >>> scorer.sigmoid(logit).shape
    torch.Size([2, 3])
    """

    output = "logit"


class L2RM(EncoderSimilarity):
    """SGRAF's scorer, which returns the scores of the matching pairs beside all scores.

    >>> import torch
    >>> scorer = L2RM(8, 4, "SGR").eval()
    >>> image, caption = torch.randn(3, 36, 8), torch.randn(3, 5, 8)
    >>> [list(x.shape) for x in scorer(image, caption, [5, 2, 4])]
    [[3, 3], [3]]
    >>> scorer.forward_individual(image, caption, [5, 2, 4]).shape
    torch.Size([3, 1])
    """

    def forward(  # type: ignore[override]
        self, img_emb, cap_emb, cap_lens, region_lengths=None
    ) -> tuple[Tensor, Tensor]:
        """Scores [I, T], and those of image i with caption i without a gradient."""
        score = super().forward(img_emb, cap_emb, cap_lens, region_lengths)
        return score, score.detach().diagonal().clone()

    def forward_individual(self, img_emb: Tensor, cap_emb: Tensor, cap_lens: Sequence[int] | Tensor) -> Tensor:
        """Scores [B, 1] of image i with caption i alone; in training SAF's statistics are over one pair."""
        return self.matched(img_emb, cap_emb, cap_lens)[:, None]


class BiCro(EncoderSimilarity):
    """SGRAF's scorer with the plain global embeddings from which BiCro estimates how well pairs match.

    >>> import torch
    >>> scorer = BiCro(8, 4, "SGR")
    >>> [list(x.shape) for x in scorer.glo_emb(torch.randn(2, 36, 8), torch.randn(3, 5, 8), [5, 2, 4])]
    [[2, 8], [3, 8]]
    """

    def glo_emb(self, img_emb: Tensor, cap_emb: Tensor, cap_lens: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
        """The mean region of each image, [I, D], and the mean word of each caption, [T, D]."""
        words, cu_seqlens = pack_padded("BiCro.glo_emb", ("cap_emb", "cap_lens"), cap_emb, cap_lens)
        lengths = cu_seqlens.diff().long()
        return img_emb.mean(1), (sums(words, lengths) / lengths[:, None]).to(words.dtype)
