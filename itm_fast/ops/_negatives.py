"""Which entries of a batch's score matrix are negatives."""

from __future__ import annotations

import torch
from torch import Tensor


def positives(score: Tensor, positive: Tensor | None, image_ids: Tensor | None) -> Tensor:
    """Mask [I, T] of the entries that are not negatives.

    Args:
        score: [I, T].
        positive: [I], the caption of each image; None: caption i.
        image_ids: [T], the image of each caption; None: only the matching pairs are not negatives.
    """
    I, T = score.shape
    own = torch.arange(I, device=score.device) if positive is None else positive
    ids = torch.arange(T, device=score.device) if image_ids is None else image_ids
    return ids[own][:, None] == ids[None, :]


def columns(x: Tensor, positive: Tensor | None) -> Tensor:
    """The columns [I, I] of x [I, T] that belong to the captions of its images, in the images' order."""
    return x if positive is None else x[:, positive]
