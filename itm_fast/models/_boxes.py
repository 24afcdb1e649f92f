"""The boxes of an image's regions: what must hold of them, and which regions are neighbours by them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._common import real_rows

_SLACK = 0.01  # detectors may lie a pixel outside


def check(name: str, boxes: Tensor, image: Tensor) -> None:
    """Refuse boxes of another shape than [I, R, 4], or in pixels.

    Args:
        name: what the message names.
        boxes: of the regions of `image`.
        image: [I, R, D].

    Raises:
        ValueError: says what came.
    """
    if boxes.shape != (*image.shape[:2], 4):
        raise ValueError(
            f"{name}: boxes must be {[*image.shape[:2], 4]}, a box for each region, got {list(boxes.shape)}"
        )
    most = boxes.nan_to_num().abs().max().item() if boxes.numel() else 0.0
    if most > 1 + _SLACK:
        raise ValueError(
            f"{name}: boxes must be parts of the picture, from 0 to 1, and one has {most:g}; divide x by the picture's "
            "width and y by its height"
        )


def neighbours(boxes: Tensor, region_lengths: Tensor | None = None) -> Tensor:
    """CMCAN's adjacency: a region, and the nearest centre to its right, top, left and bottom, where there is one.

    Args:
        boxes: [I, R, 4]; of padding they may be anything.
        region_lengths: [I] regions of each image; None: R.

    Returns:
        [I, R, R] of zeros and ones, at most 5 ones in a row.

    >>> neighbours(torch.tensor([[[0.0, 0.0, 0.2, 0.2], [0.4, 0.0, 0.6, 0.2], [0.8, 0.0, 1.0, 0.2]]]))[0]
    tensor([[1., 1., 0.],
            [1., 1., 1.],
            [0., 1., 1.]])
    """
    I, R, _ = boxes.shape
    centre = (boxes[..., :2] + boxes[..., 2:]) / 2
    right, down = (centre[:, None] - centre[:, :, None]).unbind(-1)  # from a region (row) to another
    angle, apart = torch.atan2(-down, right), (right.square() + down.square()).sqrt()
    own = torch.eye(R, dtype=torch.bool, device=boxes.device).expand(I, R, R)
    apart = apart.masked_fill(own, math.inf)
    if region_lengths is not None:
        real = real_rows(region_lengths, R)
        apart = apart.masked_fill(~(real[:, :, None] & real[:, None]), math.inf)
    found, quarter = own.to(boxes.dtype), math.pi / 2
    for sector in range(-1, 3):  # right, top, left, bottom have their middle at 0, 1, 2 and -1 quarters
        middle = sector * quarter
        inside = (angle >= middle - quarter / 2) & (angle < middle + quarter / 2)
        if sector == 2:  # angles end at pi and begin at -pi
            inside = (angle >= middle - quarter / 2) | (angle < -middle + quarter / 2)
        near, which = apart.masked_fill(~inside, math.inf).min(2, keepdim=True)
        found = found.scatter_reduce(2, which, near.isfinite().to(found.dtype), "amax")
    return found
