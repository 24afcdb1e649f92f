"""The boxes of a split, for pair scorers that read them."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..data.boxes import HOW_BOXES, check_boxes

if TYPE_CHECKING:
    from ..data import Split
    from ..data.split import Rows

_STEP = 4096  # images whose boxes are checked at once


def boxes_for(model: Any, split: Split) -> Tensor | None:
    """The boxes of a split [I, R, 4], if the model's scorer takes them; warnings and errors as `stored_boxes`."""
    found = stored_boxes(model, split)
    return None if found is None else torch.from_numpy(found[:])


def stored_boxes(model: Any, split: Split) -> Rows | None:
    """The boxes of a split as they are stored, if the model's scorer takes them; warns as `warn_of_boxes`.

    Raises:
        ValueError: a box is not left, top, right and bottom as parts of the picture; names the split and the image.
    """
    warn_of_boxes(model, split.name, split.boxes)
    if split.boxes is None or not _takes_boxes(model):
        return None
    for start in range(0, len(split.boxes), _STEP):
        some = slice(start, start + _STEP)
        lengths = None if split.region_lengths is None else split.region_lengths[some]
        check_boxes(split.name, split.boxes[some], lengths, start)
    return split.boxes


def warn_of_boxes(model: Any, name: str, boxes: Any) -> None:
    """Warn if the model reads boxes and there are none, or if there are some and it was trained without.

    Args:
        model: a model, whose scorer says whether it takes boxes.
        name: what the boxes belong to, for the message.
        boxes: None if there are none.
    """
    if not _takes_boxes(model):
        return
    if boxes is None:
        warnings.warn(f"{name}: there are no boxes, {model.scorer.without_boxes}; {HOW_BOXES}", stacklevel=2)
    elif getattr(model, "trained_with_boxes", None) is False:
        warnings.warn(
            f"{name}: there are boxes, and this {type(model).__name__} was trained without, so its scores are by "
            "neighbours that it has not learned; train it with boxes, or take these away",
            stacklevel=2,
        )


def _takes_boxes(model: Any) -> bool:
    return getattr(getattr(model, "scorer", None), "takes_boxes", False)
