"""The published evaluators `i2t` and `t2i`: recall of a score matrix with five captions per image.

`itm_fast.evaluation.metrics` takes any number of captions per image, and any rule for ties.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

PER_IMAGE = 5  # captions of image i are 5 i ... 5 i + 4, as in the published data

_Summary = tuple[float, float, float, float, float]
_Array = NDArray[np.float64]


def i2t(
    images: Sequence[Any],
    captions: Any,
    caplens: Any,
    sims: NDArray[np.floating],
    npts: int | None = None,
    return_ranks: bool = False,
) -> _Summary | tuple[_Summary, tuple[_Array, _Array]]:
    """Recall of image-to-text retrieval, as the published evaluators report it.

    Equal scores are ranked in descending order of index, as by the published `np.argsort(...)[::-1]` if the sort is
    stable; numpy's default sort orders equal scores differently on different processors.

    Args:
        images: N images; only their number is used.
        captions: not used, as published.
        caplens: not used, as published.
        sims: scores [N, 5 N]; captions 5 i ... 5 i + 4 describe image i.
        npts: not used, as published.
        return_ranks: also return the ranks, and the item that is ranked first.

    Returns:
        (R@1, R@5, R@10, medr, meanr), recalls in percent; with `return_ranks` also (ranks [N], top1 [N]), float64:
        the 0-based rank of each image's best caption, and the caption ranked first.

    Raises:
        ValueError: sims is not [N, 5 N], or a score is NaN or infinite (published, NaN comes first and raises recall).

    >>> i2t(np.zeros((2, 36, 8)), None, None, np.kron(np.eye(2), np.ones(5)))
    (100.0, 100.0, 100.0, 1.0, 1.0)
    """
    return _recall("i2t", images, sims, return_ranks)


def t2i(
    images: Sequence[Any],
    captions: Any,
    caplens: Any,
    sims: NDArray[np.floating],
    npts: int | None = None,
    return_ranks: bool = False,
) -> _Summary | tuple[_Summary, tuple[_Array, _Array]]:
    """Recall of text-to-image retrieval; arguments, ties and errors as `i2t`.

    Returns:
        (R@1, R@5, R@10, medr, meanr); with `return_ranks` also (ranks [5 N], top1 [5 N]), float64: the 0-based rank
        of each caption's image, and the image ranked first.

    >>> t2i(np.zeros((2, 36, 8)), None, None, np.kron(np.eye(2), np.ones(5)), return_ranks=True)[1][1]
    array([0., 0., 0., 0., 0., 1., 1., 1., 1., 1.])
    """
    return _recall("t2i", images, sims, return_ranks)


def _recall(side: str, images: Sequence[Any], sims: Any, return_ranks: bool) -> Any:
    from ..evaluation import ranks
    from ..evaluation.tie_rules import summary

    count, sims = len(images), np.asarray(sims)
    if sims.shape != (count, PER_IMAGE * count):
        raise ValueError(
            f"{side}: sims must be [N, {PER_IMAGE} N] = [{count}, {PER_IMAGE * count}] for {count} images, got "
            f"{list(sims.shape)}; itm_fast.evaluation.metrics(score, caption_to_image) takes other numbers of captions"
        )
    owner = np.arange(PER_IMAGE * count) // PER_IMAGE
    rank = getattr(ranks(sims, owner, "published"), side)
    if not return_ranks:
        return summary(rank)
    table = sims if side == "i2t" else sims.T
    top = table.shape[1] - 1 - np.argmax(table[:, ::-1], axis=1)
    return summary(rank), (rank.astype(np.float64), top.astype(np.float64))
