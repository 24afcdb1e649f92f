"""SCAN's image encoders for precomputed features, which SGRAF, BFAN and NAAF have too."""

from __future__ import annotations

from torch import Tensor, nn

from ..nn import xavier_
from ._common import choice, l2norm
from ._inputs import ImageEncoder


def EncoderImage(
    data_name: str, img_dim: int, embed_size: int, precomp_enc_type: str = "basic", no_imgnorm: bool = False
) -> nn.Module:
    """Make the image encoder for precomputed features.

    Args:
        data_name: not used, as published.
        img_dim: F.
        embed_size: D.
        precomp_enc_type: "basic" or "weight_norm".
        no_imgnorm: leave the rows as the Linear gives them.

    Raises:
        ValueError: `precomp_enc_type` is unknown.

    >>> import torch
    >>> EncoderImage("coco_precomp", 6, 8)(torch.randn(2, 3, 6)).shape
    torch.Size([2, 3, 8])
    """
    choice("EncoderImage", "precomp_enc_type", precomp_enc_type, ("basic", "weight_norm"))
    if precomp_enc_type == "basic":
        return EncoderImagePrecomp(img_dim, embed_size, no_imgnorm)
    return EncoderImageWeightNormPrecomp(img_dim, embed_size, no_imgnorm)


class _EncoderImage(ImageEncoder):
    """The linear map `fc` and l2norm."""

    def __init__(self, fc: nn.Linear | _WeightNormLinear, embed_size: int, no_imgnorm: bool) -> None:
        super().__init__(fc.in_features)
        self.embed_size = embed_size
        self.no_imgnorm = no_imgnorm
        self.fc = fc

    def extra_repr(self) -> str:
        """The option that changes embeddings but no weight; `weights_checksum` includes it through `repr`."""
        return f"no_imgnorm={self.no_imgnorm}"

    def forward(self, images: Tensor) -> Tensor:
        """Embed features [B, R, F] -> [B, R, D], unit rows unless `no_imgnorm`."""
        features = self.fc(images)
        return features if self.no_imgnorm else l2norm(features, dim=-1)


class EncoderImagePrecomp(_EncoderImage):
    """Linear and l2norm: features [B, R, F] -> [B, R, D]."""

    def __init__(self, img_dim: int, embed_size: int, no_imgnorm: bool = False) -> None:
        linear = nn.Linear(img_dim, embed_size)
        xavier_(linear)
        super().__init__(linear, embed_size, no_imgnorm)


class _WeightNormLinear(nn.Module):
    """Linear with weight g v / |v|, |v| over the whole matrix, under the published checkpoints' keys."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features = in_features
        linear = nn.Linear(in_features, out_features)
        self.bias = linear.bias
        self.weight_g = nn.Parameter(linear.weight.detach().norm())
        self.weight_v = linear.weight

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight_v * (self.weight_g / self.weight_v.norm()), self.bias)


class EncoderImageWeightNormPrecomp(_EncoderImage):
    """Weight-normalised Linear and l2norm: features [B, R, F] -> [B, R, D]."""

    def __init__(self, img_dim: int, embed_size: int, no_imgnorm: bool = False) -> None:
        super().__init__(_WeightNormLinear(img_dim, embed_size), embed_size, no_imgnorm)
