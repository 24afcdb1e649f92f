"""What must hold of the boxes of regions, wherever they come from."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

HOW_BOXES = (
    "write SPLIT_boxes.npy, [images, regions, 4] with left, top, right and bottom as parts of the picture from 0 to 1, "
    "beside SPLIT_ims.npy; itm-fast features does. Of CMCAN's own files, divide SPLIT_ims_bbx.npy (pixels) by the "
    "width and height in SPLIT_ims_size.npy"
)
_SLACK = 0.01  # detectors may lie a pixel outside
_WRONG = {
    "are not finite": lambda boxes: ~np.isfinite(boxes).all(-1),
    "do not lie in the picture, from 0 to 1; divide x by the picture's width and y by its height": lambda boxes: (
        (boxes < -_SLACK) | (boxes > 1 + _SLACK)
    ).any(-1),
    "end before they begin; they must be left, top, right and bottom": lambda boxes: (
        boxes[..., 2:] < boxes[..., :2]
    ).any(-1),
}


def check_boxes(
    name: str, boxes: NDArray[np.floating], region_lengths: NDArray[np.integer] | None = None, first: int = 0
) -> None:
    """Refuse boxes that are not left, top, right and bottom as parts of the picture.

    Args:
        name: what the message begins with.
        boxes: [I, R, 4].
        region_lengths: [I] regions of each image, None: R; boxes beyond them may be anything.
        first: the number of the first of these images, for the message.

    Raises:
        ValueError: says which image, which region and what its box is.

    >>> check_boxes("dev", np.array([[[0.0, 0.0, 0.5, 1.0], [0.5, 0.0, 0.2, 1.0]]]))
    Traceback (most recent call last):
    ValueError: dev: boxes end before they begin; they must be left, top, right and bottom: image 0, region 1 has \
[0.5, 0, 0.2, 1]
    """
    real = np.full(boxes.shape[:2], True)
    if region_lengths is not None:
        real = np.arange(boxes.shape[1]) < region_lengths[:, None]
    for what, wrong in _WRONG.items():
        found = np.argwhere(wrong(boxes) & real)
        if len(found):
            image, region = found[0].tolist()
            box = ", ".join(f"{x:g}" for x in boxes[image, region].tolist())
            raise ValueError(f"{name}: boxes {what}: image {first + image}, region {region} has [{box}]")
    empty = real.any(1) & ~(boxes.any(-1) & real).any(1)
    if empty.any():
        raise ValueError(f"{name}: all boxes of image {first + int(empty.argmax())} are zeros")
