"""Scores of a block of images and captions; what depends on one image or one caption alone is computed once."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import _cuda
from .._backends import recorded
from ..nn import image_state
from .counting import require_finite
from .encoding import Encoded, word_rows
from .mapped import Part, Place
from .memory import CHUNK, MemoryPlan


class BlockScorer:
    """A pair scorer with the states of all images and captions of an encoded split.

    The caller puts the scorer into evaluation mode, without gradients, and bounds its workspace.

    Args:
        scorer, encoded: as for `score_all`.
        plan: says where embeddings and states are kept.
        order: int64 [distinct captions], in the order of scoring; columns are positions in it.

    Attributes:
        ran: op -> backend that ran it, as `recorded` finds them.
        seconds: spent on blocks so far; counted by `score_blocks` if it has several scorers.
    """

    def __init__(self, scorer: Any, encoded: Encoded, plan: MemoryPlan, order: NDArray[np.int64]) -> None:
        self.scorer, self.encoded, self.plan, self.order = scorer, encoded, plan, order
        self._home = plan.device if plan.resident else torch.device("cpu")
        self._starts = encoded.cu_seqlens.numpy().astype(np.int64)
        self._edges = np.concatenate([[0], np.cumsum(encoded.lengths[order])])  # of the words of captions in `order`
        self.ran: dict[str, str] = {}
        self.seconds = 0.0
        with recorded(self.ran):
            self._image_state = _image_states(scorer, encoded, plan.device, self._home)
            self._caption_state = _caption_states(scorer, encoded, order, plan.device, self._home)
        self._words = encoded.words.to(self._home)
        self._region_lengths = None if encoded.region_lengths is None else encoded.region_lengths.to(plan.device)
        self._images = slice(0, 0)
        self._block_images: tuple[Tensor, ...] = ()

    def score(self, images: slice, columns: slice | NDArray[np.int64], *, stay: bool = False) -> PendingScores:
        """Score some images with the captions in these columns.

        The result is copied to the host while the caller goes on, unless it is to `stay` on the device.
        """
        device = self.plan.device
        if images != self._images:
            self._images, self._block_images = images, tuple(state[images].to(device) for state in self._image_state)
        captions = self.order[columns]
        place: Any = columns
        if isinstance(columns, slice):
            rows: Any = slice(int(self._edges[columns.start]), int(self._edges[columns.stop]))
        else:
            rows = torch.from_numpy(word_rows(self._edges, columns)).to(self._home)
            place = torch.from_numpy(columns).to(self._home)
        lengths = self._starts[captions + 1] - self._starts[captions]
        index = torch.from_numpy(word_rows(self._starts, captions)).to(self._home)
        per_word = _per_word(self.scorer)
        with recorded(self.ran):
            score = self.scorer.score(
                self._block_images,
                self._words[index].to(device),
                torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)).to(device),
                tuple(state[rows if k < per_word else place].to(device) for k, state in enumerate(self._caption_state)),
                None if self._region_lengths is None else self._region_lengths[images],
            )
        return PendingScores(score, images.start, captions, self, stay)


def score_blocks(
    scorers: Sequence[BlockScorer], numbers: Iterable[int], *, stay: bool = False
) -> Iterator[tuple[int, slice, slice, list[Any]]]:
    """Yield these blocks of the plan, which all scorers share: number, rows, columns, and the scores of each scorer.

    The scores are float32 arrays or, if they are to `stay` on the device, tensors. The images of a block are scored
    with all captions before the next images, so that a file is filled band by band.
    """
    plan = scorers[0].plan
    before: tuple[int, slice, slice, list[PendingScores]] | None = None  # copied while the next block is computed
    for number in numbers:
        rows, columns = plan.block(number)
        try:
            scores = [_timed(scorer, rows, columns, len(scorers) > 1, stay) for scorer in scorers]
        except KeyboardInterrupt:  # keep the block that is scored already
            if before is not None:
                yield *before[:3], [score.checked() for score in before[3]]
            raise
        if before is not None:
            yield *before[:3], [score.checked() for score in before[3]]
        before = number, rows, columns, scores
    if before is not None:
        yield *before[:3], [score.checked() for score in before[3]]
    _cuda.warn_of_fault(plan.device, "they may do so again; the scores here have been checked, and none is NaN")


def _timed(scorer: BlockScorer, rows: slice, columns: slice, several: bool, stay: bool) -> PendingScores:
    start = time.perf_counter()
    found = scorer.score(rows, columns, stay=stay)
    if several:
        if scorer.plan.device.type == "cuda":
            torch.cuda.synchronize(scorer.plan.device)
        scorer.seconds += time.perf_counter() - start
    return found


class PendingScores:
    """The scores of a block, while they are copied to the host, or on the device if they are to `stay` there."""

    def __init__(
        self, score: Tensor, first_image: int, captions: NDArray[np.int64], source: BlockScorer, stay: bool
    ) -> None:
        self.first_image, self.captions, self.source, self.stay = first_image, captions, source, stay
        self.event = None
        if stay:
            self.score = score.to(torch.float32, copy=True)  # the next block may be scored into the same tensor
        elif score.device.type == "cuda":
            self.score = torch.empty(score.shape, dtype=torch.float32, pin_memory=True)
            self.score.copy_(score, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record(torch.cuda.current_stream(score.device))
        else:
            self.score = score.float().cpu()

    def checked(self) -> Any:
        """The scores as `score_blocks` yields them; scores that are not finite are refused."""
        if not self.stay:
            return self.on_host()
        if not self.score.isfinite().all():
            self._require_finite(self.score.cpu().numpy())
        return self.score

    def on_host(self) -> NDArray[np.float32]:
        """Wait for the copy and refuse scores that are not finite."""
        if self.event is not None:
            self.event.synchronize()
        block = self.score.cpu().numpy()
        self._require_finite(block)
        return block

    def _require_finite(self, block: NDArray[np.float32]) -> None:
        _require_finite(block, self.first_image, self.captions, self.source)


def _image_states(scorer: Any, encoded: Encoded, device: torch.device, home: torch.device) -> tuple[Tensor, ...]:
    def state(start: int, stop: int) -> tuple[Tensor, ...]:
        more = [None if x is None else x[start:stop].to(device) for x in (encoded.region_lengths, encoded.boxes)]
        return image_state(scorer, encoded.image[start:stop].to(device), *more)[1:]

    return encoded.image.to(home), *_in_chunks(state, np.arange(len(encoded.image) + 1), 0, home, encoded.place)


def _caption_states(
    scorer: Any, encoded: Encoded, order: NDArray[np.int64], device: torch.device, home: torch.device
) -> tuple[Tensor, ...]:
    starts = encoded.cu_seqlens.numpy().astype(np.int64)
    edges = np.concatenate([[0], np.cumsum(encoded.lengths[order])])

    def state(start: int, stop: int) -> tuple[Tensor, ...]:
        words = encoded.words[torch.from_numpy(word_rows(starts, order[start:stop]))].to(device)
        bounds = (edges[start : stop + 1] - edges[start]).astype(np.int32)
        return scorer.caption_state(words, torch.from_numpy(bounds).to(device))

    return _in_chunks(state, edges, _per_word(scorer), home, encoded.place)


def _per_word(scorer: Any) -> int:
    return getattr(scorer, "per_word", 0)


def _in_chunks(
    state: Any, edges: NDArray[np.integer], per_row: int, home: torch.device, place: Place
) -> tuple[Tensor, ...]:
    """Call `state(start, stop)` for chunks of all items and concatenate the results, without holding them twice.

    The first `per_row` results have edges[i + 1] - edges[i] rows for item i, one per word; the others have one row.
    """
    count = len(edges) - 1

    def produce(step: int) -> list[Part]:
        start, stop = step * CHUNK, min((step + 1) * CHUNK, count)
        words = slice(int(edges[start]), int(edges[stop]))
        return [(words if k < per_row else slice(start, stop), part) for k, part in enumerate(state(start, stop))]

    def rows(first: Sequence[Tensor]) -> list[int]:
        return [int(edges[-1]) if k < per_row else count for k in range(len(first))]

    place = place if home.type == "cpu" else Place()  # each device has its own
    return tuple(place.fill(-(-count // CHUNK), produce, rows, home))


def _require_finite(block: NDArray[np.float32], first: int, captions: NDArray[np.int64], source: BlockScorer) -> None:
    encoded, scorer = source.encoded, source.scorer
    try:
        require_finite(block, first, captions)
    except ValueError as error:
        row, column = np.argwhere(~np.isfinite(block))[0]
        caption = int(captions[column])
        rows = slice(int(encoded.cu_seqlens[caption]), int(encoded.cu_seqlens[caption + 1]))
        culprits = {
            "the scorer's weights": [*scorer.parameters(), *scorer.buffers()],
            "that image's embedding": [encoded.image[first + int(row)]],
            "that caption's embedding": [encoded.words[rows]],
        }
        bad = [name for name, tensors in culprits.items() if not all(t.isfinite().all() for t in tensors)]
        if not bad and np.isnan(block[row, column]) and _cuda.cluster_fault(source.plan.device):
            raise ValueError(
                f"the score of image {first + int(row)} and caption {caption} is NaN, as the GPU's blocks gave up "
                "waiting for each other; run the command again"
            ) from None
        found = " and ".join(bad) or "no input"
        raise ValueError(f"{error}. Not finite: {found}") from None
