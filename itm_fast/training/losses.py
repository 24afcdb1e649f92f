"""The published ranking loss of one batch."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..ops import hardest_negative_loss
from ..packing import pack

if TYPE_CHECKING:
    from ..data import Batch


def batch_loss(model: Any, batch: Batch, opt: argparse.Namespace) -> Tensor:
    """Encode one batch, score its B x B pairs and return the hinge loss over its negatives (SGRAF, equation 10).

    Args:
        model: has `forward_emb` and `scorer`; its training or evaluation mode stays as it is.
        batch: B captions, each with its image; several captions may have the same image.
        opt: `margin`; `max_violation`: only the hardest negative counts, not all of them; `exclude_same_image`: other
            captions of an image are not its negatives (in the published code they are).

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
