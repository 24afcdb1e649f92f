"""CHAN's published scoring of a batch (Pan, Wu, Zhang; CVPR 2023): all affinities at once, padding set to -1.

The same PyTorch operations in the same order as the authors' code, so that it is both the oracle of the tests and an
honest baseline of the benchmarks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

MASK = -1.0


def _mask(lengths: Tensor, most: int) -> Tensor:
    return (torch.arange(most).expand(len(lengths), most) < lengths.long()[:, None]).float()


def affinities(image: Tensor, caption: Tensor, region_lengths: Tensor, lengths: Tensor) -> Tensor:
    """[I, T, R, W] with -1 where a region or a word is padding."""
    (images, R, D), (captions, W, _) = image.shape, caption.shape
    found = torch.matmul(image.reshape(images * R, D), caption.reshape(captions * W, D).t())
    found = found.reshape(images, R, captions, W).permute(0, 2, 1, 3)
    mask = torch.matmul(_mask(region_lengths, R).reshape(-1, 1), _mask(lengths, W).reshape(-1, 1).t())
    return found.masked_fill(mask.reshape(images, R, captions, W).permute(0, 2, 1, 3) == 0, MASK)


def loop(
    state: object,
    image: Tensor,
    caption: Tensor,
    lengths: Sequence[int] | Tensor,
    region_lengths: Tensor | None = None,
    *,
    coding_type: str = "VHACoding",
    pooling_type: str = "LSEPooling",
    belta: float = 0.1,
) -> Tensor:
    """Score every image against every caption as the authors' code does.

    Args:
        state: not used: the scorer has no parameters.
        image: [I, R, D], unit rows.
        caption: [T, W, D], padded.
        lengths: T tokens per caption.
        region_lengths: I regions per image; None means R for all.
        coding_type: "VHACoding" or "THACoding".
        pooling_type: "LSEPooling", "MeanPooling", "MaxPooling" or "SumPooling".
        belta: temperature of LSEPooling.

    Returns:
        Scores, [I, T].

    Raises:
        ValueError: `coding_type` or `pooling_type` is unknown.

    >>> loop({}, torch.ones(2, 3, 4), torch.ones(5, 6, 4), [6, 2, 3, 4, 5]).shape
    torch.Size([2, 5])
    """
    lengths = torch.as_tensor(lengths)
    counts = torch.full((len(image),), image.shape[1]) if region_lengths is None else region_lengths
    dims = {"VHACoding": -2, "THACoding": -1}
    if coding_type not in dims:
        raise ValueError(f"coding_type {coding_type!r} is unknown: choose VHACoding or THACoding")
    longest = int(lengths.max())
    found = affinities(image, caption[:, :longest], counts, lengths).max(dim=dims[coding_type])[0]
    if pooling_type == "MaxPooling":
        return found.max(dim=-1)[0]
    padding = found == MASK
    if pooling_type == "LSEPooling":
        return torch.logsumexp(found.masked_fill(padding, -torch.inf) / belta, dim=-1)
    total = found.masked_fill(padding, 0.0).sum(dim=-1)
    if pooling_type == "MeanPooling":
        return total / (~padding).sum(dim=-1)
    if pooling_type != "SumPooling":
        raise ValueError(f"pooling_type {pooling_type!r} is unknown")
    return total
