"""Batches of padded word ids and features, for training and for encoding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .captions import encode_caption
from .split import Split
from .texts import caption_texts
from .vocabulary import Vocabulary


@dataclass(frozen=True)
class Whole:
    """The batch of which one of several processes has a part.

    Attributes:
        rows: the places of this process's captions in the whole batch.
        lengths: the lengths in words of all its captions, descending.
        image_index: int64, the images of all its captions.
    """

    rows: range
    lengths: list[int]
    image_index: Tensor


@dataclass(frozen=True)
class Batch:
    """B captions, longest first, each with its image.

    Attributes:
        features: [B, R, F] float32, zero beyond `region_lengths`.
        ids: [B, W] int64 word ids, zeros beyond a caption's length.
        lengths: B lengths in words, `<start>` and `<end>` included, descending.
        caption_index: [B] int64, which captions of the split these are.
        image_index: [B] int64, which images; two captions of one image have the same.
        region_lengths: [B] int32, or None if every image has R regions.
        whole: if these are one process's part of a batch, that batch; its longest caption has W words.
        boxes: [B, R, 4] float32, or None if the split has none.
    """

    features: Tensor
    ids: Tensor
    lengths: list[int]
    caption_index: Tensor
    image_index: Tensor
    region_lengths: Tensor | None
    whole: Whole | None = None
    boxes: Tensor | None = None

    @property
    def captions(self) -> int:
        """Number of captions of the whole batch."""
        return len(self.lengths if self.whole is None else self.whole.lengths)


class TrainingBatches:
    """Shuffled training batches: one sample per caption, as published.

    The order of an epoch depends on the seed and the epoch alone, so a run that is resumed at any step gets the same
    batches as one that was not interrupted. The last batch of an epoch may be smaller.

    Args:
        split: the training split.
        vocabulary: the model's vocabulary.
        batch_size: captions per batch, at least 1.
        seed: random seed of the shuffling, at least 0.
        rank, world: of each batch, longest caption first, yield captions `rank`, `rank` + `world`, ..., for one of
            `world` processes. A batch with fewer captions than processes is yielded whole.

    Raises:
        ValueError: batch_size or seed is too small.

    >>> import numpy as np
    >>> split = Split(np.zeros((2, 36, 8)), ["a cat", "a dog", "one dog"], np.array([0, 1, 1]))
    >>> batches = TrainingBatches(split, Vocabulary.build(split.captions, min_count=1), batch_size=2)
    >>> len(batches), [tuple(batch.features.shape) for batch in batches.epoch(0)]
    (2, [(2, 36, 8), (1, 36, 8)])
    """

    def __init__(
        self,
        split: Split,
        vocabulary: Vocabulary,
        batch_size: int = 128,
        *,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        _positive(batch_size)
        if seed < 0:
            raise ValueError(f"seed must be at least 0, got {seed}")
        self.split, self.vocabulary, self.batch_size, self.seed = split, vocabulary, batch_size, seed
        self.rank, self.world = rank, world
        self._ids: list[np.ndarray | None] = [None] * len(split.captions)

    def __len__(self) -> int:
        """Number of batches in an epoch."""
        return -(-len(self.split.captions) // self.batch_size)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """The batches of one epoch.

        Args:
            epoch: 0, 1, ...
            first_step: how many batches to skip at the start, for a resumed run.
        """
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self._ids))
        for step in range(first_step, len(self)):
            yield self._batch(order[step * self.batch_size : (step + 1) * self.batch_size])

    def _batch(self, captions: np.ndarray) -> Batch:
        captions = np.array(sorted(captions.tolist(), key=lambda t: len(self._words(t)), reverse=True))
        ids, lengths = _pad([self._words(t) for t in captions.tolist()])
        images = self.split.caption_to_image[captions]
        whole = None
        if 1 < self.world <= len(captions):
            rows = range(self.rank, len(captions), self.world)
            whole = Whole(rows, lengths, torch.from_numpy(images))
            mine = slice(rows.start, None, rows.step)
            captions, images, ids, lengths = captions[mine], images[mine], ids[mine], lengths[mine]
        features, region_lengths = _read(self.split, images)
        return Batch(
            features=features,
            ids=ids,
            lengths=lengths,
            caption_index=torch.from_numpy(captions),
            image_index=torch.from_numpy(images),
            region_lengths=region_lengths,
            whole=whole,
            boxes=None if self.split.boxes is None else torch.from_numpy(self.split.boxes[images]),
        )

    def _words(self, t: int) -> np.ndarray:
        words = self._ids[t]
        if words is None:
            words = self._ids[t] = np.array(encode_caption(self.split.captions[t], self.vocabulary), np.int32)
        return words


def image_batches(split: Split, batch_size: int = 128) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield every image once, in order, in batches for the image encoder.

    Args:
        split: any split.
        batch_size: images per batch, at least 1.

    Yields:
        features [B, R, F] float32, and region_lengths [B] int32 or None.

    >>> import numpy as np
    >>> split = Split(np.zeros((5, 36, 8)), ["a cat"], [0])
    >>> [len(features) for features, _ in image_batches(split, 2)]
    [2, 2, 1]
    """
    _positive(batch_size)
    for start in range(0, len(split.features), batch_size):
        yield _read(split, slice(start, start + batch_size))


def caption_batches(
    captions: Sequence[str], vocabulary: Vocabulary, batch_size: int = 128
) -> Iterator[tuple[Tensor, Tensor, list[int]]]:
    """Yield every caption once, the longest ones first, in batches for the text encoder with little padding.

    Args:
        captions: T captions.
        vocabulary: the model's vocabulary.
        batch_size: captions per batch, at least 1.

    Yields:
        index [B] int64 (which captions these are), ids [B, W] int64 with zeros as padding, and B lengths.

    >>> vocabulary = Vocabulary.build(["a cat"], min_count=1)
    >>> [(index.tolist(), lengths) for index, _, lengths in caption_batches(["cat", "a cat"], vocabulary)]
    [([1, 0], [4, 3])]
    """
    _positive(batch_size)
    captions = caption_texts(captions, "caption_batches: captions")
    words = [np.array(encode_caption(caption, vocabulary), np.int32) for caption in captions]
    order = sorted(range(len(words)), key=lambda t: len(words[t]), reverse=True)
    for start in range(0, len(order), batch_size):
        index = order[start : start + batch_size]
        yield (torch.tensor(index), *_pad([words[t] for t in index]))


def _read(split: Split, images: slice | np.ndarray) -> tuple[Tensor, Tensor | None]:
    lengths = None if split.region_lengths is None else torch.from_numpy(split.region_lengths[images])
    return torch.from_numpy(split.read(images)), lengths


def _pad(words: list[np.ndarray]) -> tuple[Tensor, list[int]]:
    lengths = [len(ids) for ids in words]
    padded = np.zeros((len(words), max(lengths)), np.int64)
    for row, ids in zip(padded, words, strict=True):
        row[: len(ids)] = ids
    return torch.from_numpy(padded), lengths


def _positive(batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
