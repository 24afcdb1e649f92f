"""A report on a score matrix that someone already has."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .. import __version__
from .._files import require_regular
from .._names import Ties
from ..data.stored import open_npy
from .many_right import count_pairs, pairs_of
from .plausible import plausible_of, relevance_with_plausible
from .ranking import fold_metrics
from .relevance import ties_of_relevance, why_no_relevance
from .report import Pool, Report, System
from .tie_rules import average, metrics_of
from .worst import rows_of_matrix, worst_queries


def rate(
    score: NDArray[np.floating] | torch.Tensor,
    right: NDArray[np.integer] | Sequence[int],
    *,
    name: str = "scores",
    cutoffs: Sequence[int] = (),
    folds: int | None = None,
    ties: Ties = "pessimistic",
    captions: Sequence[str] | None = None,
    worst: int = 0,
    image_ids: NDArray[np.integer] | None = None,
    caption_ids: NDArray[np.integer] | None = None,
    pmrp: str | os.PathLike[str] | None = None,
) -> Report:
    """Report on a score matrix: recalls, median and mean rank of both directions.

    Args:
        score: [I, T] of any floating dtype, higher is better; a memory-mapped matrix is read once.
        right: [T] the image that each caption describes; or [2, P] all right pairs, images and captions, where a
            caption may be right for several images. A query's rank is that of its best right item.
        name: row title.
        cutoffs: also report R@k for these k.
        folds: as for `evaluate`; every caption must then have one image.
        ties: as for `metrics`.
        captions: T texts, for the report's lists of queries.
        worst: as for `evaluate`.
        image_ids, caption_ids: [I] and [T] COCO ids; with them CxC and ECCV Caption metrics are reported too.
        pmrp: the folder of the plausible matches, as for `plausible.load_plausible`; PMRP is then reported too, and
            the ids must be given.

    Returns:
        `Report`, with `settings` of this computation alone.

    Raises:
        TypeError: a dtype is not as stated.
        ValueError: shapes disagree, an index is out of range, a caption has no right image, a score is NaN or infinite,
            a cut-off is less than 1, the images do not divide into the folds, or ids do not fit.

    >>> score = np.array([[0.9, 0.8], [0.1, 0.2], [0.3, 0.4]], np.float32)
    >>> pairs = np.array([[0, 1, 0], [0, 1, 1]])         # caption 1 is right for images 0 and 1
    >>> rate(score, pairs).systems[0].pools[0].metrics.t2i.r1
    100.0
    """
    given = np.asarray(right)
    if given.ndim not in (1, 2) or (given.ndim == 2 and len(given) != 2) or given.dtype.kind not in "iu":
        raise ValueError(f"rate: right must be integers [T] or [2, P], got {given.dtype} {list(given.shape)}")
    if any(k < 1 for k in cutoffs):
        raise ValueError(f"rate: cut-offs must be at least 1, got {list(cutoffs)}")
    shape = tuple(score.shape)
    for what, ids, size in (("image_ids", image_ids, shape[0]), ("caption_ids", caption_ids, shape[-1])):
        if ids is not None and (np.asarray(ids).shape != (size,) or np.asarray(ids).dtype.kind not in "iu"):
            raise ValueError(f"rate: {what} must be {size:,} integers, got {list(np.asarray(ids).shape)}")
    if captions is not None and len(shape) == 2 and len(captions) != shape[1]:
        raise ValueError(f"rate: there are {len(captions):,} captions, and the scores have {shape[1]:,} columns")
    if given.ndim == 1 and len(shape) == 2 and len(given) != shape[1]:
        raise ValueError(
            f"rate: right has {len(given):,} captions, and the scores have {shape[1]:,} columns ({shape[0]:,} rows); a "
            "transposed score matrix looks like this"
        )
    plausible = None if pmrp is None else plausible_of(pmrp, image_ids, caption_ids)
    pairs = pairs_of(given) if given.ndim == 1 else given.astype(np.int64)
    counts = count_pairs(score, pairs, "rate")
    pools: tuple[Pool, ...] = (Pool(metrics_of(counts, ties)),)
    if folds is not None:
        if not np.array_equal(pairs[1], np.arange(counts.captions)):
            raise ValueError("rate: folds cut captions with their image, and some captions have several right images")
        parts = tuple(fold_metrics(score, pairs[0], folds, ties=ties))
        pools = (Pool(average(parts), parts), *pools)
    settings: dict[str, Any] = {
        "itm_fast": __version__, "numpy": np.__version__, "python": platform.python_version(),
        "images": counts.images, "captions": counts.captions, "right_pairs": pairs.shape[1], "folds": folds,
        "ties": ties,
    }  # fmt: skip
    matrix = score.detach().float().cpu().numpy() if isinstance(score, torch.Tensor) else score
    found = worst_queries(counts, pairs, ties, worst, rows_of_matrix(matrix)) if worst else ()
    missing = why_no_relevance(image_ids, caption_ids)
    by_ties = relevance_with_plausible(matrix, image_ids, caption_ids, missing, plausible)
    relevance = None
    if by_ties:
        settings["relevance_ties"] = ties_of_relevance(ties)
        relevance = by_ties[settings["relevance_ties"]]
    system = System(name, pools, relevance, counts=counts, worst=found, relevance_by_ties=by_ties)
    return Report((system,), settings, missing, None, pairs, captions, tuple(cutoffs))


def open_scores(path: str | os.PathLike[str]) -> NDArray[np.floating]:
    """Map a .npy file of scores into memory.

    Raises:
        OSError: there is no such regular file.
        ValueError: it is not a .npy file of floating-point numbers [I, T]; the message says what it holds.
    """
    path = Path(path)
    try:
        found = open_npy(path)
    except ValueError as error:
        raise ValueError(f"{error}; save the matrix alone: numpy.save(path, scores)") from None
    if found.ndim != 2 or found.dtype.kind != "f" or 0 in found.shape:
        raise ValueError(f"{path} must hold floating-point scores [images, captions], got {found.dtype} {found.shape}")
    return found


def read_ids(path: str | os.PathLike[str]) -> NDArray[np.int64]:
    """Ids from a .npy file of integers [n], or from a text with one a line.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not as stated.
    """
    require_regular(path)
    try:
        if Path(path).suffix.lower() == ".npy":
            found = np.load(path, allow_pickle=False)
        else:
            found = np.array([int(line) for line in Path(path).read_text(encoding="utf-8-sig").split()])
        if found.ndim != 1 or found.dtype.kind not in "iu":
            raise ValueError(f"got {found.dtype} {list(found.shape)}")
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} must hold integers, one for each image or caption ({error})") from None
    return found.astype(np.int64)
