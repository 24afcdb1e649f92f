"""What else SCAN's and SGRAF's `evaluation.py` define: meters, encoding of a data loader, the whole evaluation.

`i2t` and `t2i` are in `_recall`, the scoring of all pairs beside the models.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ._lengths import whole_numbers

DEV = 5000  # captions of the dev split that the published loaders keep
FOLDS = 5  # of COCO's 5,000 test images: "COCO 1K"


class AverageMeter:
    """The last value and the weighted mean of a quantity.

    Attributes:
        val: the last value.
        sum: of the values times their weights.
        count: of the weights.
        avg: `sum / (0.0001 + count)`, as published.

    >>> meter = AverageMeter()
    >>> meter.update(0.5, 2)
    >>> print(meter)
    0.5000 (0.5000)
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget all values."""
        self.val, self.avg, self.sum, self.count = 0.0, 0.0, 0.0, 0.0

    def update(self, val: float, n: float = 0) -> None:
        """Add a value with weight `n`; without weight it only becomes the last one."""
        self.val = val
        self.sum += val * n
        self.count += n
        self.avg = self.sum / (0.0001 + self.count)

    def __str__(self) -> str:
        return f"{self.val:.4f} ({self.avg:.4f})" if self.count else str(self.val)


class LogCollector:
    """Meters by name; a model's `logger` may be one.

    >>> log = LogCollector()
    >>> log.update("Eit", 3)
    >>> log.update("Loss", 0.25, 8)
    >>> print(log)
    Eit 3  Loss 0.2500 (0.2500)
    """

    def __init__(self) -> None:
        self.meters: dict[str, AverageMeter] = {}

    def update(self, k: str, v: float, n: float = 0) -> None:
        """Add value `v` with weight `n` to meter `k`, which is made at its first value."""
        self.meters.setdefault(k, AverageMeter()).update(v, n)

    def __str__(self) -> str:
        return "  ".join(f"{name} {meter}" for name, meter in self.meters.items())

    def tb_log(self, tb_logger: Any, prefix: str = "", step: int | None = None) -> None:
        """Pass every meter's last value to `tb_logger.log_value(name, value, step=step)`."""
        for name, meter in self.meters.items():
            tb_logger.log_value(prefix + name, meter.val, step=step)


@torch.no_grad()
def encode_data(
    model: Any, data_loader: Any, log_step: int = 10, logging: Callable[[str], object] = print
) -> tuple[NDArray, NDArray, list[int]]:
    """Encode all rows of a data loader with a model in evaluation mode.

    Args:
        model: an object with `val_start` and `forward_emb`, as the models here and the published ones.
        data_loader: as published: an iterable of (images [B, R, F], captions [B, W], lengths, row numbers), with the
            number of rows as `len(data_loader.dataset)`. It is read once.
        log_step: a line is logged for the first of every `log_step` batches.
        logging: called with that line.

    Returns:
        img_embs [N, R, D], cap_embs [N, longest caption, D] with zeros beyond each caption, and cap_lens, a list of N
        integers. The arrays have the model's dtype (published: float64, which takes twice the memory).

    Raises:
        ValueError: the loader leaves out a row.
    """
    model.val_start()
    model.logger = LogCollector()
    count = len(data_loader.dataset)
    images: NDArray | None = None
    words: list[NDArray | None] = [None] * count
    meter, start = AverageMeter(), time.perf_counter()
    for number, (features, captions, lengths, rows) in enumerate(data_loader):
        found, embedded, _ = model.forward_emb(features, captions, lengths)
        found, embedded = found.cpu().numpy(), embedded.cpu().numpy()
        rows = np.asarray(rows)
        if images is None:
            images = np.zeros((count, *found.shape[1:]), found.dtype)
        images[rows] = found
        for row, length, caption in zip(rows, whole_numbers(lengths).tolist(), embedded, strict=True):
            words[row] = caption[:length].copy()
        meter.update(time.perf_counter() - start, 1)
        start = time.perf_counter()
        if number % log_step == 0:
            logging(f"Test: [{number}/{len(data_loader)}]\t{model.logger}\tTime {meter.val:.3f} ({meter.avg:.3f})\t")
    lost = [row for row, caption in enumerate(words) if caption is None]
    if images is None or lost:
        raise ValueError(f"encode_data: the data loader left out {len(lost)} of {count} rows, the first one {lost[0]}")
    lengths = [len(caption) for caption in words if caption is not None]
    captions = np.zeros((count, max(lengths), images.shape[2]), images.dtype)
    for row, caption in enumerate(words):
        captions[row, : lengths[row]] = caption
    return images, captions, lengths


def evalrank(
    model_path: str | os.PathLike[str],
    data_path: str | os.PathLike[str] | None = None,
    split: str = "dev",
    fold5: bool = False,
) -> dict[str, float]:
    """Evaluate a checkpoint on a split and print the recalls as the published function does.

    Nothing in the checkpoint is executed; the published function unpickles it. `itm-fast evaluate` has more options.

    Args:
        model_path: the checkpoint file, or its folder.
        data_path: the folder that holds the data folder `{data_name}`; None: the training options' `data_path`.
        split: "dev", "test", "testall", ...
        fold5: print the mean over five folds of the images (COCO 1K) instead of the whole split's recalls.

    Returns:
        The numbers printed, in percent: "rsum"; "i2t_r1", "i2t_r5", "i2t_r10" and the same of "t2i".

    Raises:
        OSError: a file is missing or cannot be read.
        ValueError: as `itm_fast.models.load` and `itm_fast.evaluation.evaluate`, or no vocabulary was found.
    """
    from pathlib import Path

    from ..data import open_split
    from ..evaluation import evaluate
    from . import checkpoint
    from ._load import load

    opt = checkpoint.load(model_path).opt
    loaded = load(model_path)
    if loaded.vocab is None:
        raise ValueError(f"{model_path}: no vocabulary file was found; put {opt.data_name}_vocab.json in its folder")
    folder = Path(opt.data_path if data_path is None else data_path) / opt.data_name
    report = evaluate(
        loaded.model,
        open_split(folder, split, limit_captions=DEV if split == "dev" else None),
        loaded.vocab,
        names=[loaded.name],
        folds=FOLDS if fold5 else None,
        ties="published",
        keep_scores=False,
    )
    found = report.systems[0].pools[0].metrics
    numbers = {"rsum": found.rsum}
    print(f"rsum: {found.rsum:.1f}")
    for name, title, side in ("i2t", "Image to text", found.i2t), ("t2i", "Text to image", found.t2i):
        numbers |= {f"{name}_r{k}": recall for k, recall in zip((1, 5, 10), side.recalls, strict=True)}
        print(f"Average {name} Recall: {sum(side.recalls) / 3:.1f}")
        print(f"{title}: " + " ".join(f"{x:.1f}" for x in (*side.recalls, side.medr, side.meanr)))
    return numbers
