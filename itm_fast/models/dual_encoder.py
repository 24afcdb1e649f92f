"""The plain dual encoder: the cosine of an image's mean region and a caption's mean word, with SGRAF's encoders.

It is the baseline for the models that compare regions with words.
"""

from __future__ import annotations

from argparse import Namespace

from torch import Tensor

from ..nn import PairScorer, State
from ._common import PaddedScorer, l2norm, sums, without_padding
from ._rows import linear
from .sgraf import SGRAF


class MeanCosine(PaddedScorer):
    """Cosines of the means of regions and words: a pair scorer without parameters.

    >>> import torch
    >>> MeanCosine()(torch.randn(2, 36, 8), torch.randn(3, 5, 8), [5, 2, 4]).shape
    torch.Size([2, 3])
    """

    def image_state(self, image: Tensor, region_lengths: Tensor | None = None) -> State:
        """The image and the unit vector along its mean region: [I, R, D], [I, D]."""
        if region_lengths is None:
            return image, l2norm(image.mean(1))
        regions, _ = without_padding(image, region_lengths)
        return image, l2norm(regions.sum(1) / region_lengths[:, None])

    def caption_state(self, words: Tensor, cu_seqlens: Tensor) -> State:
        """The unit vectors along the captions' mean words: [T, D]."""
        lengths = cu_seqlens.diff().long()
        return (l2norm((sums(words, lengths) / lengths[:, None]).to(words.dtype)),)

    def score(
        self,
        image_state: State,
        words: Tensor,
        cu_seqlens: Tensor,
        caption_state: State,
        region_lengths: Tensor | None = None,
    ) -> Tensor:
        return linear(image_state[1], caption_state[0])


class DualEncoder(SGRAF):
    """SGRAF's encoders, and the cosine of the means of regions and words.

    Args:
        opt: the options of SGRAF's encoders and training; `opt.device` is optional.

    Raises:
        ValueError: an option is missing.

    >>> model = DualEncoder(Namespace(
    ...     grad_clip=2.0, img_dim=6, embed_size=8, no_imgnorm=False, vocab_size=9, word_dim=5, num_layers=1,
    ...     bi_gru=True, no_txtnorm=False, margin=0.2, max_violation=True, learning_rate=2e-4))
    >>> [len(state) for state in model.state_dict()]
    [2, 9]
    """

    parts = ("img_enc", "txt_enc")
    weighs_regions = False
    options = ()

    @classmethod
    def similarity(cls, opt: Namespace) -> PairScorer:
        """The means' cosines."""
        return MeanCosine()
