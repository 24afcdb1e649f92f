"""The boxes of a split, for pair scorers that read them."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..data.split import HOW_BOXES

if TYPE_CHECKING:
    from ..data import Split
    from ..data.split import Rows


def boxes_for(scorer: Any, split: Split) -> Tensor | None:
    """The boxes of a split [I, R, 4], if the scorer takes them; warns if there are none."""
    found = warn_without_boxes(scorer, split)
    return None if found is None else torch.from_numpy(found[:])


def warn_without_boxes(scorer: Any, split: Split) -> Rows | None:
    """The boxes of a split as they are stored, if the scorer takes them; warns if there are none."""
    if not getattr(scorer, "takes_boxes", False):
        return None
    if split.boxes is None:
        name = type(scorer).__name__
        warnings.warn(f"{split.name}: there are no boxes, which {name} reads; {HOW_BOXES}", stacklevel=3)
    return split.boxes
