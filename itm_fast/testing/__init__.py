"""Inputs, the one accuracy rule, and each paper's own slow loop (`testing.scan`, `testing.sgraf`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..packing import pack
from .accuracy import assert_accurate, rounding

__all__ = ["assert_accurate", "inputs", "rounding"]


def inputs(
    I: int,
    lengths: Sequence[int],
    R: int,
    D: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    requires_grad: bool = False,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Random unit-length features as the encoders give them.

    Args:
        I: images.
        lengths: words of each caption.
        R: regions.
        D: embedding.
        dtype: of the features; they are drawn in float64 and rounded, so all dtypes see the same data.
        device: where they lie.
        requires_grad: of image and words.
        seed: of the random numbers.

    Returns:
        image [I, R, D], words [N, D], cu_seqlens [T + 1] int32.

    >>> from itm_fast.testing import inputs
    >>> [list(x.shape) for x in inputs(2, [3, 5], 4, 8)]
    [[2, 4, 8], [8, 8], [3]]
    """
    generator = torch.Generator().manual_seed(seed)
    # A part common to all of an item's rows keeps affinities away from zero, as trained encoders do.
    image = torch.randn(I, R, D, generator=generator, dtype=torch.float64) + torch.randn(
        1, 1, D, generator=generator, dtype=torch.float64
    )
    caption = torch.randn(len(lengths), max(lengths, default=1), D, generator=generator, dtype=torch.float64)
    caption = caption + torch.randn(1, 1, D, generator=generator, dtype=torch.float64)
    words, cu_seqlens = pack(torch.nn.functional.normalize(caption, dim=-1), lengths)
    image = torch.nn.functional.normalize(image, dim=-1).to(device=device, dtype=dtype)
    words = words.to(device=device, dtype=dtype)
    return image.requires_grad_(requires_grad), words.requires_grad_(requires_grad), cu_seqlens.to(device)
