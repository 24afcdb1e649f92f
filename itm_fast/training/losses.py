"""The published ranking loss of one batch, encoded whole or in parts, by one process or by several."""

from __future__ import annotations

import argparse
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .._ranks import Ranks
from .._share import Share
from ..nn import image_state
from ..ops import hardest_negative_loss
from ..ops._recompute import again
from ..packing import pack, spans

if TYPE_CHECKING:
    from ..data import Batch

_ALONE = Ranks()


def batch_loss(
    model: Any, batch: Batch, opt: argparse.Namespace, ranks: Ranks = _ALONE, chunk: int | None = None
) -> Tensor:
    """Encode one batch, score its B x B pairs and return the hinge loss over its negatives (SGRAF, equation 10).

    Args:
        model: has `forward_emb` and `scorer`; its training or evaluation mode stays as it is.
        batch: B captions, each with its image; several captions may have the same image. With several processes each
            has its part of the captions, and `batch.whole` describes all of them.
        opt: `margin`; `max_violation`: only the hardest negative counts, not all of them; `exclude_same_image`: other
            captions of an image are not its negatives (in the published code they are).
        ranks: the processes that have the parts of the batch.
        chunk: encode so many captions and images at a time, and again in the backward pass, which then holds the
            encoders' intermediates of no more than these; None: all at once. The loss is the same.

    Returns:
        0-d, summed over the batch; the same in every process. The parameters' gradients, averaged over the processes,
        are those of one process.
    """
    whole = batch.whole
    rows, lengths = (range(len(batch.lengths)), batch.lengths) if whole is None else (whole.rows, whole.lengths)
    images = batch.image_index if whole is None else whole.image_index
    if whole is None and chunk is None:
        image, words = _encoded(model, batch.features, batch.ids, batch.lengths)
        cu_seqlens, *of_images = _sizes(batch, image.device)
        state = image_state(model.scorer, image, *of_images)
        score = model.scorer.score(
            state, words, cu_seqlens, model.scorer.caption_state(words, cu_seqlens), of_images[0]
        )
    else:
        share = Share(ranks, lengths, rows)
        image, words = _encoded_in_parts(model, batch, share, chunk or len(rows))
        with share.active():
            score = _scores(model.scorer, share, image, words, *_sizes(batch, image.device))
    return hardest_negative_loss(
        score,
        margin=opt.margin,
        hardest=opt.max_violation,
        image_ids=images.to(score.device) if opt.exclude_same_image else None,
    )


def _encoded(model: Any, features: Tensor, ids: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """The embeddings of images [B, R, D] and of the captions' words, packed: [N, D]."""
    image, caption, lengths = model.forward_emb(features, ids, lengths)
    return image, pack(caption, lengths)[0]


def _encoded_in_parts(model: Any, batch: Batch, share: Share, size: int) -> tuple[Tensor, Tensor]:
    """As `_encoded`, `size` captions at a time.

    The backward pass encodes each part again (gradient caching; Gao et al., RepL4NLP 2021), with the same dropout.
    """

    def part(at: slice) -> tuple[Tensor, Tensor]:
        with share.active(at):
            return _encoded(model, batch.features[at], batch.ids[at], batch.lengths[at])

    parts = list(spans(len(batch.lengths), size))
    if len(parts) == 1:
        return part(parts[0])
    part = again(part, model.device.type)
    found = [part(at) for at in parts]
    return torch.cat([image for image, _ in found]), torch.cat([words for _, words in found])


def _sizes(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The batch's cu_seqlens, region_lengths and boxes."""
    lengths, boxes = (None if x is None else x.to(device) for x in (batch.region_lengths, batch.boxes))
    return _bounds(batch.lengths, device), lengths, boxes


def _bounds(lengths: Any, device: torch.device) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


def _scores(
    scorer: Any,
    share: Share,
    image: Tensor,
    words: Tensor,
    cu_seqlens: Tensor,
    region_lengths: Tensor | None,
    boxes: Tensor | None,
) -> Tensor:
    """Scores [B, B] of the whole batch, of which each process computes its images' or its captions', or all."""
    of_images = image_state(scorer, image, region_lengths, boxes)
    caption_state = scorer.caption_state(words, cu_seqlens)
    if not share.divided:
        return scorer.score(of_images, words, cu_seqlens, caption_state, region_lengths)
    if scorer.all_images or scorer.all_pairs:
        of_images = tuple(share.whole(x) for x in of_images)
        if region_lengths is not None:
            region_lengths = share.whole(region_lengths)
    if scorer.all_pairs or not scorer.all_images:
        words, cu_seqlens = share.whole_words(words), _bounds(share.lengths, words.device)
        caption_state = tuple(
            share.whole_words(x) if k < scorer.per_word else share.whole(x) for k, x in enumerate(caption_state)
        )
    score = scorer.score(of_images, words, cu_seqlens, caption_state, region_lengths)
    if scorer.all_pairs:
        return score
    return share.whole(score.t()).t() if scorer.all_images else share.whole(score)
