"""From one batch to the published ranking loss."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..ops import hardest_negative_loss
from ..packing import pack

if TYPE_CHECKING:
    from ..data import Batch


def batch_loss(model: Any, batch: Batch, opt: argparse.Namespace) -> Tensor:
    """Encode one batch, score its B x B pairs and take the hinge on its negatives (SGRAF eq. 10).

    Args:
        model: with `forward_emb` and `scorer`, in the mode it is to run in.
        batch: B captions, each with its image; several may share one.
        opt: `margin`; `max_violation`, for the hardest negative alone in place of all of them; and
            `exclude_same_image`, so that other captions of an image are no negatives to it (the published
            code takes them as negatives).

    Returns:
        0-d, summed over the batch.
    """
    image, caption, lengths = model.forward_emb(batch.features, batch.ids, batch.lengths)
    words, cu_seqlens = pack(caption, lengths)
    regions = None if batch.region_lengths is None else batch.region_lengths.to(image.device)
    return hardest_negative_loss(
        model.scorer(image, words, cu_seqlens, regions),
        margin=opt.margin,
        hardest=opt.max_violation,
        image_ids=batch.image_index.to(image.device) if opt.exclude_same_image else None,
    )
