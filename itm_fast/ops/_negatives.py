"""Which entries of a batch's score matrix are negatives."""

from __future__ import annotations

import torch
from torch import Tensor


def positives(score: Tensor, image_ids: Tensor | None) -> Tensor:
    """[B, B] mask of the entries that are not negatives: the diagonal or, given ids, all pairs with equal ids."""
    if image_ids is None:
        return torch.eye(len(score), dtype=torch.bool, device=score.device)
    return image_ids[:, None] == image_ids[None, :]
