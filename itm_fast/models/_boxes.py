"""The boxes of an image's regions: what must hold of them, and which regions are neighbours by them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.boxes import check_boxes
from ..packing import valid


def tensor_of(array: Tensor | np.ndarray[Any, Any]) -> Tensor:
    """A tensor as it is, and an array as a copy: torch warns of arrays that are not writable, as those of files are."""
    return array if isinstance(array, Tensor) else torch.tensor(np.asarray(array))


def checked(
    name: str, boxes: Tensor | np.ndarray[Any, Any], image: Tensor, region_lengths: Tensor | None = None
) -> Tensor:
    """Boxes on the device of `image`; refused are those of another shape than [I, R, 4], or as `check_boxes` says.

    Args:
        name: what the message names.
        boxes: of the regions of `image`.
        image: [I, R, D].
        region_lengths: [I] regions of each image; None: R.

    Raises:
        ValueError: says what came.
    """
    boxes = tensor_of(boxes)
    if boxes.shape != (*image.shape[:2], 4):
        raise ValueError(
            f"{name}: boxes must be {[*image.shape[:2], 4]}, a box for each region, got {list(boxes.shape)}"
        )
    lengths = None if region_lengths is None else region_lengths.cpu().numpy()
    check_boxes(name, boxes.detach().cpu().double().numpy(), lengths)
    return boxes.to(image.device)


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
        real = valid(region_lengths, R)
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
