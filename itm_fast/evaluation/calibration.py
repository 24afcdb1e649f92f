"""How long an evaluation will take, by scoring a small block of it."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from .block_scores import BlockScorer
from .encoding import Encoded, encode, evaluation_mode
from .memory import GB, MemoryPlan
from .scoring import columns_of, plan_encoded, with_equal_captions

if TYPE_CHECKING:
    from ..data import Split, Vocabulary
    from .encoding import CaptionBatches

_IMAGES, _CAPTIONS = 32, 128
_LEAST = 0.1  # seconds to measure for, so that a fast scorer is measured as well


class Speed(NamedTuple):
    """What a small block took.

    Attributes:
        pair: seconds to score a pair.
        encode: seconds to encode all images and captions; 0 if it was not measured.
    """

    pair: float
    encode: float = 0.0


def calibrate_on(model: Any, split: Split, vocab: Vocabulary, captions: CaptionBatches, batch_size: int = 128) -> Speed:
    """Encode and score some images and captions of a split, whose lengths are typical of it.

    Args:
        model, split, vocab, batch_size: as for `evaluate`.
        captions: `list(caption_batches(split.captions, vocab, batch_size))`.
    """
    from ..data import Split

    lengths = np.zeros(len(split.captions), np.int64)
    for index, _, found in captions:
        lengths[index.numpy()] = found
    chosen = _typical(lengths)
    images = min(_IMAGES, len(split.features))
    regions = None if split.region_lengths is None else split.region_lengths[:images]
    texts = [split.captions[caption] for caption in chosen]
    boxes = None if split.boxes is None else split.boxes[:images]
    some = Split(split.read(slice(0, images)), texts, np.arange(len(texts)) % images, regions, boxes, name=split.name)
    encoded = encode(model, some, vocab, batch_size=batch_size, progress=False)
    words = lengths.sum() / max(int(encoded.lengths.sum()), 1)
    share = max(len(split.features) / images, words)
    return Speed(_pair(model.scorer, encoded), encoded.seconds * share)


def calibrate(scorer: Any, regions: int, dim: int, lengths: NDArray[np.int64], device: torch.device) -> Speed:
    """Score some random images and captions of typical lengths; arguments as for `plan`."""
    chosen = lengths[_typical(lengths)]
    edges = torch.from_numpy(np.concatenate([[0], np.cumsum(chosen)])).int()
    normal = torch.Generator().manual_seed(0)
    image, words = (torch.randn(*size, dim, generator=normal) for size in ((_IMAGES, regions), (int(edges[-1]),)))
    unit = [torch.nn.functional.normalize(tensor, dim=-1) for tensor in (image, words)]
    owner = np.arange(len(chosen)) % _IMAGES
    boxes = torch.rand(_IMAGES, regions, 2, 2, generator=normal).sort(2).values.flatten(2)  # left, top, right, bottom
    return Speed(_pair(scorer, Encoded(unit[0], None, unit[1], edges, owner, device, boxes=boxes)))


def time_line(speed: Speed, pairs: int) -> str:
    """One sentence.

    >>> time_line(Speed(1e-5, 30.0), 125_000_000)
    'time: about 21 min to score (100,000 pairs/s in a small block here), 30 s to encode'
    """
    encoding = f", {_span(speed.encode)} to encode" if speed.encode else ""
    scoring = f"{_span(speed.pair * pairs)} to score ({1 / speed.pair:,.0f} pairs/s in a small block here)"
    return f"time: about {scoring}{encoding}"


def disk_line(plan: MemoryPlan, folder: str | os.PathLike[str] | None = None) -> str:
    """What the temporary files of a plan need, and what is free; "" if there are none."""
    if not plan.on_disk:
        return ""
    place, free, short = _room(plan.on_disk, folder)
    return f"disk: {plan.on_disk / GB:.3f} GB of temporary files, {free / GB:.3f} GB are free in {place}{short}"


def torchrun_line(plan: MemoryPlan, folder: str | os.PathLike[str] | None = None) -> str:
    """What the file that the processes of torchrun on a machine share needs, and what is free.

    Args:
        plan: of an evaluation whose encoded splits are in files.
        folder: of --state.
    """
    place, free, short = _room(plan.on_disk, folder)
    return f"under torchrun: {plan.on_disk / GB:.3f} GB of disk in {place}, {free / GB:.3f} GB free{short}"


def _room(size: int, folder: str | os.PathLike[str] | None) -> tuple[Path, int, str]:
    """Where files of this size would lie, the bytes free there, and a warning if they do not suffice."""
    place = Path(folder or tempfile.gettempdir())
    there = next(one for one in (place.absolute(), *place.absolute().parents) if one.is_dir())
    free = shutil.disk_usage(there).free
    how = "--state" if folder else "the environment variable TMPDIR"
    return place, free, "" if free > size else f"; NOT ENOUGH: name another folder by {how}"


def _typical(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Captions whose lengths are spread as all are."""
    order = np.argsort(lengths, kind="stable")
    return order[np.unique(np.linspace(0, len(order) - 1, min(_CAPTIONS, len(order))).astype(np.int64))]


def _pair(scorer: Any, encoded: Encoded) -> float:
    """Seconds per pair of one block of all these; the first time does not count."""
    encoded = with_equal_captions(encoded)
    order, _ = columns_of(encoded)
    with evaluation_mode(scorer), torch.no_grad():
        member = BlockScorer(scorer, encoded, plan_encoded(scorer, encoded, GB, 0), order)
        rows, columns = slice(0, len(encoded.image)), slice(0, len(order))
        member.score(rows, columns).on_host()
        start, times = time.perf_counter(), 0
        while times == 0 or time.perf_counter() - start < _LEAST:
            member.score(rows, columns).on_host()
            times += 1
    return (time.perf_counter() - start) / times / (len(encoded.image) * len(order))


def _span(seconds: float) -> str:
    for size, name in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:,.0f} {name}"
    return f"{seconds:,.0f} s"
