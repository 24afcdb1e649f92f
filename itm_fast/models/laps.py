"""The pair scorer of LAPS (Fu et al., CVPR 2024): patches chosen by the caption, after CrossmodalGroup/LAPS' code.

With unit(x) = x / max(|x|, 1e-12), patches x_r of an image (its class token x_0 apart) and words t_j, for one pair:

    key_r = unit(x_r) . unit(mean_r x_r) + unit(x_r) . unit(mean_j t_j), a constant for the gradient     (1)
    kept  = the ceil(sparse_ratio R) patches of the largest keys                                         (2)
    z_a   = sum over the kept r of softmax_r(scale MLP_a(x_r)) x_r,  a = 1 to A                           (3)
    z_0   = sum over the other r of softmax_r(key_r) x_r                                                 (4)
    B_kj  = LeakyReLU(unit(z_k) . unit(t_j)), slope 0.1, with k over x_0, the z_a and z_0                 (5)
    S     = mean_j max_k B_kj + mean_k max_j B_kj                                                        (6)

MLP is LayerNorm, Linear, GELU, Linear, and the same for all captions. `MaxMean` is (5) and (6) of all patches, halved.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import Arguments
from ..nn import Attention, State
from ..ops import _recompute
from ..packing import bounds
from ._common import PaddedScorer, sums
from ._pair_blocks import blocks
from ._rows import linear
from .maxsim import SLOPE

NAME = "SlimmedMaxMean"
HIDDEN = 0.2  # of D, between the layers of MLP
unit = nn.functional.normalize


class _Aggregation(nn.Module):
    """The weights of (3)."""

    def __init__(self, embed_size: int, tokens: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1, 1, 1))
        hidden = int(embed_size * HIDDEN)
        layers = nn.LayerNorm(embed_size), nn.Linear(embed_size, hidden), nn.GELU(), nn.Linear(hidden, tokens)
        self.weight = nn.Sequential(*layers)

    def forward(self, patches: Tensor) -> Tensor:
        """scale MLP(x_r): [I, R, D] -> [I, R, A]."""
        layers: Any = self.weight
        norm, first, gelu, second = layers
        hidden = gelu(linear(norm(patches), first.weight, first.bias))
        return self.scale * linear(hidden, second.weight, second.bias)


class SlimmedMaxMean(PaddedScorer):
    """LAPS' pair scorer, (1) to (6).

    Args:
        embed_size: D, at least 5.
        num_patches: R, without the class token.
        sparse_ratio: share of the patches that a caption keeps, more than 0 and less than 1.
        aggr_ratio: A is int(num_patches * aggr_ratio * sparse_ratio).
        has_cls: the first row of an image is its class token.

    Raises:
        ValueError: no patch would be kept, none would be left, or A would be 0.

    >>> scorer = SlimmedMaxMean(8, num_patches=16)
    >>> scorer(torch.randn(2, 17, 8), torch.randn(3, 5, 8), [5, 2, 4]).shape
    torch.Size([2, 3])
    """

    def __init__(
        self,
        embed_size: int,
        num_patches: int = 196,
        sparse_ratio: float = 0.5,
        aggr_ratio: float = 0.4,
        has_cls: bool = True,
    ) -> None:
        super().__init__()
        kept, tokens = math.ceil(num_patches * sparse_ratio), int(num_patches * aggr_ratio * sparse_ratio)
        if not 0 < kept < num_patches or tokens < 1 or int(embed_size * HIDDEN) < 1:
            raise ValueError(
                f"{NAME}: of num_patches = {num_patches} with sparse_ratio {sparse_ratio} and aggr_ratio {aggr_ratio} "
                f"{kept} would be kept and {tokens} tokens be made of them, for embed_size = {embed_size}; some must "
                "be kept, some left, at least 1 token made, and embed_size be at least 5"
            )
        self.num_patches, self.sparse_ratio, self.aggr_ratio = int(num_patches), sparse_ratio, aggr_ratio
        self.has_cls, self.kept = bool(has_cls), kept
        self.aggr_net = _Aggregation(embed_size, tokens)

    def extra_repr(self) -> str:
        options = "num_patches", "sparse_ratio", "aggr_ratio", "has_cls"
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in options)

    def image_state(self, image: Tensor, region_lengths: Tensor | None = None) -> State:
        """The image [I, R (+ 1), D], the logits of (3) [I, R, A] and the image's part of the keys [I, R]."""
        rows = self.num_patches + self.has_cls
        if image.dim() != 3 or image.shape[1] != rows:
            token = " and a class token" if self.has_cls else ""
            said = f"{self.num_patches} patches{token}, so [I, {rows}, D], got {list(image.shape)}"
            raise ValueError(f"{NAME}: image must have {said}")
        if region_lengths is not None:
            raise ValueError(f"{NAME}: region_lengths must be None, as all images have the same patches")
        Arguments(NAME).weights("image", image, self)  # which its LayerNorm would refuse in words of torch's own
        patches = image[:, self.has_cls :]
        with torch.no_grad():
            key = (unit(patches, dim=-1) * unit(patches.mean(1, keepdim=True), dim=-1)).sum(-1)
        return image, self.aggr_net(patches), key

    @torch.no_grad()
    def caption_state(self, words: Tensor, cu_seqlens: Tensor) -> State:
        """unit(mean_j t_j): words [N, D] -> [T, D]."""
        bounds(cu_seqlens, len(words), NAME)
        return (unit(sums(words, cu_seqlens.diff().long()), dim=-1).to(words.dtype),)

    def score(
        self,
        image_state: State,
        words: Tensor,
        cu_seqlens: Tensor,
        caption_state: State,
        region_lengths: Tensor | None = None,
    ) -> Tensor:
        """Scores [I, T] of the images and captions whose states are given."""
        image, logits, key = image_state
        A, D = logits.shape[2], image.shape[2]

        def pair_bytes(length: int) -> int:
            return 4 * ((A + 2) * (2 * D + 2 * length) + 3 * self.num_patches * (A + 2))

        cut = partial(blocks, NAME, "IIINT", pair_bytes, self._block)
        tensors = image, logits, key, words, *caption_state
        # Autograd records of each token k of a pair z_k and unit(z_k), the patches' shares before and after `cat`, 4
        # lengths and factors, and B_kj before and after LeakyReLU; of each word t_j, where a block gathers it, and
        # unit(t_j).
        tokens = (A + 2) * ((len(cu_seqlens) - 1) * (2 * D + 2 * self.num_patches + 4) + 2 * len(words))
        numbers = len(image) * tokens + 2 * words.numel()
        return _recompute.score(cut, "IIINT", tensors, cu_seqlens, region_lengths, numbers=numbers)

    def _block(self, length, cu_seqlens, region_lengths, image, logits, key, words, mean) -> Tensor:
        """Scores of some images with captions of one length."""
        tokens = self._tokens(image, self._weights(image, logits, key, mean))
        caption = unit(words, dim=-1).unflatten(0, (-1, length))
        affinity = torch.einsum("bckd,cld->bckl", unit(tokens, dim=-1), caption)
        affinity = nn.functional.leaky_relu(affinity, SLOPE)
        return affinity.amax(2).mean(2) + affinity.amax(3).mean(2)

    def _weights(self, image: Tensor, logits: Tensor, key: Tensor, mean: Tensor) -> Tensor:
        """The shares of the patches in the tokens of each pair, (1) to (4): [b, c, A + 1, R], z_0 last."""
        with torch.no_grad():
            patches = unit(image[:, self.has_cls :], dim=-1)
            of_pair = key[:, None] + linear(patches, mean).transpose(1, 2)  # [b, c, R]
            order = of_pair.argsort(dim=2, descending=True, stable=True)  # of equal keys the first patch's
            left = torch.ones_like(of_pair, dtype=torch.bool).scatter(2, order[..., : self.kept], False)
            extra = of_pair.masked_fill(~left, float("-inf")).softmax(2)
        own = logits.transpose(1, 2)[:, None].masked_fill(left[:, :, None], float("-inf")).softmax(3)
        return torch.cat([own, extra[:, :, None]], 2)

    def _tokens(self, image: Tensor, weights: Tensor) -> Tensor:
        """x_0 where there is one, z_1 to z_A and z_0: [b, c, ., D]."""
        tokens = torch.einsum("bckr,brd->bckd", weights, image[:, self.has_cls :])
        if not self.has_cls:
            return tokens
        return torch.cat([image[:, None, :1].expand(-1, weights.shape[1], -1, -1), tokens], 2)

    def attention(self, image: Tensor, words: Tensor) -> Attention:
        """`tokens` [A + 1, R], the patches' shares in the tokens, and `kept` [R], 1 where the caption keeps a patch."""
        edge = torch.tensor([0, len(words)], dtype=torch.int32, device=words.device)
        x, logits, key = self.image_state(image[None])
        (mean,) = self.caption_state(words, edge)
        weights = self._weights(x, logits, key, mean)[0, 0]
        score = self._block(len(words), edge, None, x, logits, key, words, mean)
        return Attention(score.item(), {"tokens": weights, "kept": (weights[-1] == 0).to(weights.dtype)})
