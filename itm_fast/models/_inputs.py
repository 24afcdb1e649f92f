"""Checks of what a model is given to encode: features of regions, and word ids with their lengths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import Arguments, Shape
from ._lengths import whole_numbers

FEATURES, IDS = Shape("B R F"), Shape("B W")


class ImageEncoder(nn.Module):
    """An encoder of features [B, R, F], which loads its own keys out of a larger state_dict, as published ones do.

    Args:
        img_dim: F.
    """

    def __init__(self, img_dim: int) -> None:
        super().__init__()
        self.img_dim = img_dim

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False):
        """Load this module's keys and ignore all others."""
        own = self.state_dict()
        found = {name: value for name, value in state_dict.items() if name in own}
        return super().load_state_dict(found, strict=strict, assign=assign)


class TextEncoder(nn.Module):
    """An encoder of word ids [B, W], whose table `embed` has a row for each word."""

    embed: nn.Embedding
    no_txtnorm: bool

    @property
    def vocab_size(self) -> int | None:
        """The number of words; None if a table of another class has replaced `embed`."""
        return self.embed.num_embeddings if isinstance(self.embed, nn.Embedding) else None

    def extra_repr(self) -> str:
        """The option that changes embeddings but no weight; `weights_checksum` includes it through `repr`."""
        return f"no_txtnorm={self.no_txtnorm}"


def features_for(op: str, images: Tensor, encoder: nn.Module, device: torch.device, name: str = "images") -> Tensor:
    """Features [B, R, F] on a model's device; `name` is the argument's in messages.

    What an image encoder of another class takes is not known: its dtype and its F are not compared.

    Raises:
        ValueError: they have another shape, or another F than the image encoder.
        TypeError: they are no tensor, or have another dtype than the image encoder's weights.
    """
    check = Arguments(op)
    check.floats(name, images, FEATURES)
    images = images.to(device)
    if isinstance(encoder, ImageEncoder):
        check.weights(name, images, encoder)
        if encoder.img_dim != images.shape[2]:
            known = encoder.img_dim
            raise ValueError(f"{op}: {name} must be [B, R, F] with F = {known} (img_dim), got {list(images.shape)}")
    return images


def ids_for(
    op: str, captions: Tensor, lengths: Sequence[float] | Tensor, encoder: nn.Module, device: torch.device
) -> Tensor:
    """Word ids [B, W] on a model's device, where each of the lengths [B] lies in 1..W.

    How many words a text encoder of another class knows is not known: there no word id is refused.

    Raises:
        ValueError: there are no captions, they or the lengths have another shape, a length lies outside 1..W, or, where
            they can be read without waiting for a device, a word id is not one of the model's.
        TypeError: they are no tensor of integers, or the lengths no numbers.
    """
    Arguments(op).integers("captions", captions, IDS)
    B, W = captions.shape
    if not B:
        raise ValueError(f"{op}: captions must be [B, W] with B > 0, got {[B, W]}")
    try:
        # A copy, as each check would wait for the device that the lengths lie on.
        values = whole_numbers(torch.as_tensor(lengths).cpu(), f"{op}: lengths")
    except (TypeError, RuntimeError) as error:
        raise TypeError(f"{op}: lengths must be [B] whole numbers, got {lengths!r:.60}") from error
    if values.shape != (B,):
        raise ValueError(f"{op}: lengths must be [B] with B = {B} as in captions, got {list(values.shape)}")
    least, most = int(values.min()), int(values.max())
    if least < 1 or most > W:
        raise ValueError(f"{op}: lengths must lie in 1..{W} (W of captions), got {least}..{most}")
    known = encoder.vocab_size if isinstance(encoder, TextEncoder) else None
    if known is not None and captions.device.type == "cpu":
        least, most = int(captions.min()), int(captions.max())
        if least < 0 or most >= known:
            raise ValueError(
                f"{op}: captions must hold word ids in 0..{known - 1} (vocab_size {known}), got {least}..{most}; use "
                "the vocabulary that the model was made for"
            )
    return captions.to(device)
