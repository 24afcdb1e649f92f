"""One split of an image-text data set: its captions, and features that are read from disk row by row."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from .stored import StoredArray
from .texts import caption_texts

# The characters that bytes.strip() removes: the published readers strip captions before they decode them.
WHITE_SPACE = " \t\n\r\v\f"


class Rows:
    """An array [n, ...] on disk (or in memory), read row by row as float32.

    Args:
        source: numpy array, memory map or `StoredArray` of floating-point numbers, or int8 with `scale`.
        every: use every `every`-th row of `source` (1: all rows).
        scale: float32 factors for the last axis; a row is then `source * scale`.
        count: use only the first `count` of these rows; None: all.

    Raises:
        ValueError: the source is 0-dimensional.

    Attributes:
        shape: (n, ...).
        dtype: float32, whatever is stored.
        stored_dtype: float16 if the source is, else float32: the dtype in which `save_splits` writes the rows (float64
            is rounded to float32, as in the published readers).

    >>> import numpy as np
    >>> rows = Rows(np.arange(12, dtype=np.float16).reshape(6, 2), every=3)
    >>> rows.shape, rows[[1, 0]].tolist()
    ((2, 2), [[6.0, 7.0], [0.0, 1.0]])
    """

    dtype = np.dtype(np.float32)

    def __init__(
        self, source: Any, *, every: int = 1, scale: np.ndarray | None = None, count: int | None = None
    ) -> None:
        if not source.shape:
            raise ValueError(f"an array of rows needs at least one dimension, got shape {source.shape}")
        self._source, self._every, self._scale = source, every, scale
        n = source.shape[0] // every
        self.shape: tuple[int, ...] = (n if count is None else min(n, count), *source.shape[1:])
        self.stored_dtype = np.dtype(np.float16 if source.dtype == np.float16 else np.float32)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: slice | Sequence[int] | np.ndarray) -> np.ndarray:
        """Rows as a new, writable float32 array [n, ...].

        Args:
            index: a slice, or integers of one dimension in any order, repeats allowed.

        Raises:
            TypeError: the index is neither.
            IndexError: a row is outside 0..len - 1.
        """
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step == 1:
                raw = self._source[start * self._every : max(start, stop) * self._every : self._every]
                return self._scaled(np.array(raw, dtype=np.float32))
            index = np.arange(start, stop, step)
        rows = np.asarray(index)
        if rows.ndim != 1 or (rows.size and rows.dtype.kind not in "iu"):
            raise TypeError(f"rows are read by a slice or by integers of one dimension, got {index!r}")
        if rows.size and not (rows.min() >= 0 and rows.max() < len(self)):
            raise IndexError(f"rows {rows.min()}..{rows.max()} are out of range for an array of {len(self)} rows")
        rows = rows.astype(np.int64) * self._every
        # One read per row: h5py's own list indexing is 30 times slower on chunked data.
        raw = [self._source[row] for row in rows.tolist()]
        stacked = np.stack(raw) if raw else np.empty((0, *self.shape[1:]))
        return self._scaled(np.asarray(stacked, dtype=np.float32))

    def first(self, count: int) -> Rows:
        """The first `count` rows; nothing is read."""
        return Rows(self._source, every=self._every, scale=self._scale, count=min(count, len(self)))

    def _scaled(self, rows: np.ndarray) -> np.ndarray:
        if self._scale is not None:
            rows *= self._scale
        return rows


class Split:
    """One evaluation or training split, with all its arrays checked.

    An image may have any number of captions, also none. White space at the ends of captions is removed.

    Args:
        features: [I, R, F] region features, `Rows` or a floating-point numpy array.
        captions: T texts, as str or UTF-8 bytes.
        caption_to_image: [T] integers 0..I-1, the image each caption belongs to.
        region_lengths: [I] integers 1..R, the number of regions of each image; None: every image has R.
        boxes: [I, R, 4] boxes of the regions: left, top, right and bottom as parts of the picture, 0 to 1. A model
            that reads them, a gallery and a run of training refuse others.
        image_ids: [I] integers such as COCO's image ids.
        caption_ids: [T] integers such as COCO's annotation ids.
        name: where the split comes from, such as its file; error messages begin with it.

    Attributes:
        features, boxes: `Rows`, read as float32 by slices or index arrays; boxes may be None.
        caption_to_image, image_ids, caption_ids: int64; the ids may be None.
        region_lengths: int32, or None.
        captions, name: as given.

    Raises:
        ValueError: an array has a wrong shape or value; the message names the array, what it must be and what it is.
        TypeError: features or boxes are not floating point, indices are not integers, or captions are not strings.

    >>> import numpy as np
    >>> split = Split(np.zeros((2, 36, 8), np.float32), ["a cat", "a dog", "one dog"], [0, 1, 1])
    >>> split.features[0:1].shape, split.caption_to_image.tolist()
    ((1, 36, 8), [0, 1, 1])
    """

    def __init__(
        self,
        features: Rows | StoredArray | np.ndarray,
        captions: Sequence[str],
        caption_to_image: np.ndarray | Sequence[int],
        region_lengths: np.ndarray | Sequence[int] | None = None,
        boxes: Rows | StoredArray | np.ndarray | None = None,
        image_ids: np.ndarray | Sequence[int] | None = None,
        caption_ids: np.ndarray | Sequence[int] | None = None,
        *,
        name: str = "split",
    ) -> None:
        self.name = name
        self._warned = False  # whether `read` has warned of regions of zeros
        self.features = self._rows("features", features)
        if len(self.features.shape) != 3 or 0 in self.features.shape:
            raise ValueError(
                f"{name}: features must be [I, R, F] (images, regions, feature size), none of them 0, "
                f"got {list(self.features.shape)}"
            )
        I, R, _ = self.features.shape
        self.captions = [caption.strip(WHITE_SPACE) for caption in caption_texts(captions, f"{name}: captions")]
        T = len(self.captions)
        if not T:
            raise ValueError(f"{name}: there are no captions")
        self.caption_to_image = self._integers("caption_to_image", caption_to_image, T, "caption", (0, I - 1))
        self.region_lengths, self.boxes, self.image_ids, self.caption_ids = None, None, None, None
        if region_lengths is not None:
            lengths = self._integers("region_lengths", region_lengths, I, "image", (1, R))
            self.region_lengths = lengths.astype(np.int32)
        if boxes is not None:
            self.boxes = self._rows("boxes", boxes)
            if self.boxes.shape != (I, R, 4):
                raise ValueError(f"{name}: boxes must be {[I, R, 4]} (I, R, 4), got {list(self.boxes.shape)}")
        if image_ids is not None:
            self.image_ids = self._integers("image_ids", image_ids, I, "image")
        if caption_ids is not None:
            self.caption_ids = self._integers("caption_ids", caption_ids, T, "caption")

    def first(self, captions: int) -> Split:
        """The first captions, and the images up to the last one that these describe.

        The published code shortens its `dev` split in this way (to 5,000 captions).

        Args:
            captions: how many captions to keep, at least 1; more than T keeps all.

        Raises:
            ValueError: captions is less than 1.

        >>> import numpy as np
        >>> split = Split(np.zeros((3, 4, 2)), ["a", "b", "c"], [0, 1, 2]).first(2)
        >>> len(split.features), split.captions
        (2, ['a', 'b'])
        """
        if captions < 1:
            raise ValueError(f"{self.name}: the number of captions to keep must be at least 1, got {captions}")
        if captions >= len(self.captions):
            return self
        caption_to_image = self.caption_to_image[:captions]
        I = int(caption_to_image.max()) + 1
        return Split(
            self.features.first(I),
            self.captions[:captions],
            caption_to_image,
            None if self.region_lengths is None else self.region_lengths[:I],
            None if self.boxes is None else self.boxes.first(I),
            None if self.image_ids is None else self.image_ids[:I],
            None if self.caption_ids is None else self.caption_ids[:captions],
            name=self.name,
        )

    def read(self, images: slice | Sequence[int] | np.ndarray) -> np.ndarray:
        """Features of some images for the image encoder: float32 [B, R, F], zero beyond `region_lengths`.

        Warns, once, if the split has no `region_lengths` and the last regions of an image are all zero: this padding
        then takes part in attention, as it does in the published code.

        Args:
            images: as for `Rows`.
        """
        features = self.features[images]
        if self.region_lengths is not None:
            features[np.arange(features.shape[1]) >= self.region_lengths[images][:, None]] = 0.0
        elif not self._warned:
            padded = int((~features[:, -1].any(axis=1)).sum())
            if padded:
                self._warned = True
                warnings.warn(
                    f"{self.name}: {padded} of {len(features)} images read end in regions of zeros, and there are "
                    "no region_lengths, so these regions take part in attention, as in the published code; "
                    "mask_zero_regions=True (--mask-zero-regions) leaves them out",
                    stacklevel=3,
                )
        return features

    def mask_zero_regions(self) -> Split:
        """This split with `region_lengths` that leave out the all-zero regions at the end of each image.

        Reads all features once. A split that has `region_lengths` is returned as it is; an image whose regions are all
        zero keeps one region.

        >>> import numpy as np
        >>> features = np.ones((2, 4, 8), np.float32)
        >>> features[1, 3:] = 0
        >>> Split(features, ["a cat", "a dog"], [0, 1]).mask_zero_regions().region_lengths.tolist()
        [4, 3]
        """
        if self.region_lengths is not None:
            return self
        R = self.features.shape[1]
        lengths = []
        for start in range(0, len(self.features), 128):
            real = np.any(self.features[start : start + 128], axis=2)[:, ::-1]
            lengths.append(np.where(real.any(axis=1), R - real.argmax(axis=1), 1))
        masked = copy.copy(self)
        masked.region_lengths = np.concatenate(lengths).astype(np.int32)
        return masked

    def _rows(self, key: str, array: Any) -> Rows:
        if isinstance(array, Rows):
            return array
        known = isinstance(array, (np.ndarray, StoredArray))
        if not known or array.dtype.kind != "f":
            what = array.dtype if known else type(array).__name__
            raise TypeError(f"{self.name}: {key} must be a numpy array of floating-point numbers, got {what}")
        return Rows(array)

    def _integers(self, key: str, values: Any, n: int, per: str, bounds: tuple[int, int] | None = None) -> np.ndarray:
        try:
            array = np.asarray(values)
        except ValueError as error:  # lists of unequal lengths
            raise TypeError(f"{self.name}: {key} must be integers: {error}") from error
        if array.dtype.kind not in "iu":
            raise TypeError(f"{self.name}: {key} must be integers, got {array.dtype}")
        if array.shape != (n,):
            raise ValueError(f"{self.name}: {key} must have one entry per {per}, [{n}], got shape {list(array.shape)}")
        array = array.astype(np.int64)
        if bounds is not None:
            low, high = bounds
            wrong = np.flatnonzero((array < low) | (array > high))
            if wrong.size:
                i = int(wrong[0])
                raise ValueError(f"{self.name}: {key} must lie in {low}..{high}, got {array[i]} for {per} {i}")
        return array
