"""Exact search: every image of a gallery is scored with every caption; and the scores of chosen images alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .._workspace import GIB, workspace
from ..evaluation.best import Best
from ..evaluation.block_scores import BlockScorer, score_blocks
from ..evaluation.encoding import Encoded, device_of, evaluation_mode
from ..evaluation.scoring import columns_of, plan_encoded
from ..nn import image_state

_CHUNK = 256 << 20  # bytes of rows, as the model takes them, that are in memory at once


class Images:
    """The encoded images of a gallery, on disk until they are scored.

    Args:
        rows: [I, R, D] float32 or float16, memory-mapped.
        region_lengths: int32 [I], or None.
        model: whose scorer, device and dtype are used.
        boxes: [I, R, 4], memory-mapped, or None.
    """

    def __init__(
        self,
        rows: NDArray[np.floating],
        region_lengths: NDArray[np.int32] | None,
        model: Any,
        boxes: NDArray[np.floating] | None = None,
    ) -> None:
        self.rows, self.region_lengths, self.boxes, self.scorer = rows, region_lengths, boxes, model.scorer
        self.device = device_of(model.img_enc)
        floats = (p.dtype for p in model.img_enc.parameters() if p.is_floating_point())
        self.dtype = next(floats, torch.float32)
        self.chunk = max(1, _CHUNK // max(1, int(np.prod(rows.shape[1:])) * self.dtype.itemsize))

    def __len__(self) -> int:
        return len(self.rows)

    def read_boxes(self, images: slice | NDArray[np.int64]) -> Tensor | None:
        """Boxes [n, R, 4] of these images' regions, or None; in host memory."""
        return None if self.boxes is None else torch.from_numpy(np.array(self.boxes[images]))

    def read(self, images: slice | NDArray[np.int64]) -> tuple[Tensor, Tensor | None]:
        """Rows [n, R, D] in the model's dtype, and their region counts [n] or None; in host memory."""
        lengths = None if self.region_lengths is None else torch.from_numpy(self.region_lengths[images])
        return torch.from_numpy(np.array(self.rows[images])).to(self.dtype), lengths


class Captions:
    """Encoded captions.

    Attributes:
        words: [N, D] in host memory.
        cu_seqlens: int32 [T + 1].
        first_of_equals: int64 [T]; see `Encoded`.
    """

    def __init__(self, words: Tensor, cu_seqlens: Tensor, first_of_equals: NDArray[np.int64]) -> None:
        self.words, self.cu_seqlens, self.first_of_equals = words, cu_seqlens, first_of_equals

    def __len__(self) -> int:
        return len(self.first_of_equals)

    def one(self, caption: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """The words [W, D] of one caption and their bounds [2], on a device."""
        words = self.words[int(self.cu_seqlens[caption]) : int(self.cu_seqlens[caption + 1])].to(device)
        return words, torch.tensor([0, len(words)], dtype=torch.int32, device=device)


def search_all(
    images: Images, captions: Captions, k: int, *, memory_gb: float | None = None, progress: bool = False
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The k best of all images, for each caption.

    A part of the images is in memory at a time, each with all captions; only the k best of what was scored are kept.

    Returns:
        int64 [T, k] and their scores, float32 [T, k], best first.

    Raises:
        ValueError: `memory_gb` is too small, or a score is not finite.
    """
    from tqdm import tqdm

    none = np.zeros(len(captions), np.int64)  # which images the captions belong to is not known, nor asked
    with (
        evaluation_mode(images.scorer),
        torch.no_grad(),
        tqdm(total=len(images), desc="scored", unit="image", unit_scale=True, disable=not progress) as bar,
    ):
        for start in range(0, len(images), images.chunk):
            chunk = slice(start, min(start + images.chunk, len(images)))
            image, lengths = images.read(chunk)
            encoded = Encoded(
                image, lengths, captions.words, captions.cu_seqlens, none, images.device,
                first_of_equals=captions.first_of_equals, boxes=images.read_boxes(chunk),
            )  # fmt: skip
            order, column = columns_of(encoded)
            if not start:
                best = Best(len(order), len(images), k)
            plan = plan_encoded(images.scorer, encoded, memory_gb, 0)
            with workspace(plan.workspace / GIB):
                blocks = score_blocks([BlockScorer(images.scorer, encoded, plan, order)], range(plan.blocks))
                try:
                    for _, rows, place, (scores,) in blocks:
                        items = np.arange(start + rows.start, start + rows.stop)
                        best.add(scores.T, np.arange(place.start, place.stop), items)
                except ValueError as error:
                    raise ValueError(f"of the gallery's images from {start} on, counted from there: {error}") from error
            bar.update(chunk.stop - chunk.start)
    items, found = best.ranked()
    return items[column], found[column]


def search_among(
    images: Images, captions: Captions, candidates: list[NDArray[np.int64]], k: int, *, progress: bool = False
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The k best of each caption's own candidates.

    Args:
        images, captions, k, progress: as for `search_all`.
        candidates: T arrays of at least k images each, without repetition.

    Returns:
        As `search_all`.
    """
    from tqdm import tqdm

    found = [np.empty((len(captions), k), kind) for kind in (np.int64, np.float32)]
    with evaluation_mode(images.scorer), torch.no_grad():
        for caption in tqdm(range(len(captions)), desc="scored", unit="caption", disable=not progress):
            words, bounds = captions.one(caption, images.device)
            state = images.scorer.caption_state(words, bounds)
            best = Best(1, len(images), k)
            chosen = np.sort(candidates[caption])  # read in the order of the file
            for start in range(0, len(chosen), images.chunk):
                part = chosen[start : start + images.chunk]
                image, lengths = images.read(part)
                more = [None if x is None else x.to(images.device) for x in (lengths, images.read_boxes(part))]
                of_images = image_state(images.scorer, image.to(images.device), *more)
                scores = images.scorer.score(of_images, words, bounds, state, more[0])[:, 0].float().cpu().numpy()
                if not np.isfinite(scores).all():
                    bad = int(part[np.argmin(np.isfinite(scores))])
                    raise ValueError(f"the score of image {bad} and caption {caption} is not finite")
                best.add(scores[None], np.zeros(1, np.int64), part)
            found[0][caption], found[1][caption] = (one[0] for one in best.ranked())
    return found[0], found[1]
