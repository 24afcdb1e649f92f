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
    """The boxes of a split [I, R, 4], if the model's scorer takes them; warnings and errors as `require_boxes`.

    Warns, too, if the model was trained without boxes and the split has some.
    """
    found = require_boxes(getattr(model, "scorer", None), split)
    if found is not None and getattr(model, "trained_with_boxes", None) is False:
        warnings.warn(
            f"{split.name}: there are boxes, and this {type(model).__name__} was trained without, so its scores are by "
            "neighbours that it has not learned; train it with boxes, or take these away",
            stacklevel=3,
        )
    return None if found is None else torch.from_numpy(found[:])


def require_boxes(scorer: Any, split: Split) -> Rows | None:
    """The boxes of a split as they are stored, if the scorer takes them; warns if there are none.

    Raises:
        ValueError: a box is not left, top, right and bottom as parts of the picture; names the split and the image.
    """
    warn_without_boxes(scorer, split.name, split.boxes)
    if split.boxes is None or not getattr(scorer, "takes_boxes", False):
        return None
    for start in range(0, len(split.boxes), _STEP):
        some = slice(start, start + _STEP)
        lengths = None if split.region_lengths is None else split.region_lengths[some]
        check_boxes(split.name, split.boxes[some], lengths, start)
    return split.boxes


def warn_without_boxes(scorer: Any, name: str, boxes: Any) -> None:
    """Warn if the scorer takes boxes and `boxes` is None; `name` says of what."""
    if boxes is None and getattr(scorer, "takes_boxes", False):
        warnings.warn(f"{name}: there are no boxes, {scorer.without_boxes}; {HOW_BOXES}", stacklevel=3)
