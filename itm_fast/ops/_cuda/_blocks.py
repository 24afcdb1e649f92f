"""Blocks of images and captions that are scored one after another, as what their kernels read besides the inputs would
not fit the scratch memory for all of them at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..._workspace import scratch_bytes
from ...packing import kept, spans, stretches


def room(device: torch.device) -> int:
    """Bytes for what a block's kernels read besides the inputs; as much is left for making it and for results."""
    return scratch_bytes(device) // 2


def blocks(
    images: int, edge: Sequence[int], image_bytes: int, word_bytes: int, pair_bytes: int, room: int
) -> list[tuple[slice, slice]]:
    """Cut images x captions into blocks of at most `room` bytes, but of at least one image with one caption.

    Args:
        images: how many.
        edge: bounds of the captions' words.
        image_bytes, word_bytes, pair_bytes: scratch of an image, of a word, and of an image with a caption.
        room: scratch of a block, in bytes.

    >>> blocks(2, [0, 3, 5], 10, 1, 0, 25)
    [(slice(0, 2, None), slice(0, 2, None))]
    >>> blocks(2, [0, 3, 5], 10, 1, 0, 20)
    [(slice(0, 1, None), slice(0, 2, None)), (slice(1, 2, None), slice(0, 2, None))]
    """
    captions = len(edge) - 1
    if images * (image_bytes + captions * pair_bytes) + edge[-1] * word_bytes <= room:
        return [(slice(0, images), slice(0, captions))]
    found = []
    for some in stretches(edge, max(1, room // 2 // max(1, word_bytes))):
        each = image_bytes + (some.stop - some.start) * pair_bytes
        found += [(part, some) for part in spans(images, max(1, room // 2 // max(1, each)))]
    return found


def part(
    cu_seqlens: Tensor, region_lengths: Tensor | None, images: slice, captions: slice
) -> tuple[Tensor, Tensor | None]:
    """cu_seqlens and region_lengths of a block; see `packing.kept`."""

    def bounds(edge: Tensor) -> Tensor:
        return edge[captions.start : captions.stop + 1] - edge[captions.start]

    edge = kept(cu_seqlens, ("block", captions.start, captions.stop), bounds)
    if region_lengths is None:
        return edge, None
    return edge, kept(region_lengths, ("block", images.start, images.stop), lambda count: count[images].clone())
