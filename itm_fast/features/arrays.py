"""Region features that exist already, one .npy or .npz file per image."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..data.boxes import check_boxes
from ..data.stored import damaged, open_npy

KINDS = (".npy", ".npz")


def label(name: str) -> str:
    """The image's name: that of its file without .npy or .npz.

    >>> label("toys/kite.jpg.npy"), label("kite.jpg")
    ('toys/kite.jpg', 'kite.jpg')
    """
    return name[:-4] if name.lower().endswith(KINDS) else name


def read(path: Path) -> tuple[NDArray[np.floating], NDArray[np.float32] | None]:
    """The regions of one image, and their boxes where the file has them.

    Args:
        path: a .npy file; or an .npz file whose array is called `features` or `x` or is its only one. Its boxes are
            `boxes`, [R, 4] as parts of the picture, or `bbox` in pixels with `image_w` and `image_h`.

    Returns:
        [R, F] floating point; and [R, 4] left, top, right, bottom as parts of the picture, or None.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is damaged, holds Python objects, or its arrays have other shapes or numbers.
    """
    boxes = None
    if path.suffix.lower() == ".npy":
        features = open_npy(path)
    else:
        with damaged(f"{path} is not a whole .npz file of numbers"), np.load(path, allow_pickle=False) as file:
            names = list(file)
            name = next((each for each in ("features", "x") if each in names), names[0] if len(names) == 1 else None)
            if name is None:
                raise ValueError(f"its arrays are {', '.join(names) or 'none'}, and none is called features")
            features = file[name]
            if "boxes" in names:
                boxes = np.asarray(file["boxes"], np.float32)
            elif {"bbox", "image_w", "image_h"} <= set(names):
                width, height = float(file["image_w"]), float(file["image_h"])
                boxes = np.asarray(file["bbox"] / [width, height, width, height], np.float32)
    if features.ndim != 2 or 0 in features.shape or features.dtype.kind != "f":
        raise ValueError(
            f"{path} must be [regions, features] of floating-point numbers, got {features.dtype} {list(features.shape)}"
        )
    if boxes is not None:
        if boxes.shape != (len(features), 4):
            raise ValueError(f"{path}: its boxes must be [{len(features)}, 4], got {list(boxes.shape)}")
        check_boxes(str(path), boxes[None])
        boxes = boxes.clip(0, 1)
    return features, boxes
