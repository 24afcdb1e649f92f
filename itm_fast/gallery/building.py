"""Encode images into the folder of a gallery, and add to a finished one what it lacks."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .._lock import Lock
from ..data.texts import BOM
from ..evaluation.boxes import boxes_for
from ..evaluation.encoding import embed, evaluation_mode
from . import files, pooled
from .identity import checksums, require_loaded, require_model
from .measured import drawn
from .scoring import Images

if TYPE_CHECKING:
    from ..data import Split
    from ..models import Loaded

_STARTS = 8  # images whose features tell whether an interrupted build goes on with the same images
_STEP = 128  # images whose vectors are pooled at once


def build(
    model: Loaded,
    split: Split,
    folder: Path,
    *,
    names: Sequence[str] | None,
    pictures: str | os.PathLike[str] | None,
    dtype: str,
    first: Loaded | None,
    batch_size: int,
    progress: bool,
) -> None:
    """As `Gallery.build`, which has the arguments and errors."""
    if dtype not in ("float32", "float16"):
        raise ValueError(f"dtype must be float32 or float16, got {dtype!r}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if first is not None:
        pooled.require_usable(require_loaded(first))
    _require_names(names, len(split.features))
    boxes = boxes_for(model.model, split)
    _claim(folder)
    with Lock(folder / files.LOCK, str(folder)):
        if (folder / files.ABOUT).exists():
            about = files.read_about(folder)
            require_model(folder, about, model)
            files.settle_names(folder, about)
            _require_same(folder, about, split, dtype, boxes)
            rows = files.open_rows(folder / files.ROWS, about.shape, about.dtype)
            files.verify(rows, about.rows, folder / files.ROWS, progress)
        else:
            about = _encode(model, split, boxes, folder, dtype, batch_size, progress)
        if names is None and about.names is None and split.image_ids is not None:
            names = [str(number) for number in split.image_ids]
        if names is not None:
            files.write_names(folder, names)
            about = dataclasses.replace(about, names=files.names_checksum(names))
        if pictures is not None:
            about = dataclasses.replace(about, pictures=os.path.abspath(pictures))
        if sample := drawn(split.captions):
            about = dataclasses.replace(about, sample=sample)
        files.write_about(folder, about)
        files.settle_names(folder, about)
        files.finished(folder / files.ROWS)
        if pooled.usable(model):
            pooled.write(folder, about, model, _own_vectors(model, folder, about), about.rows, _STEP, progress)
        if first is not None:
            pooled.write(folder, about, first, _vectors(first, split), about.features, batch_size, progress)


def _encode(
    model: Loaded, split: Split, boxes: Tensor | None, folder: Path, dtype: str, batch_size: int, progress: bool
) -> files.About:
    """Write the rows of all images and their region counts."""
    encoder = model.model.img_enc

    def produce(start: int, stop: int) -> tuple[NDArray[np.float32], NDArray]:
        features = split.read(slice(start, stop))
        with evaluation_mode(encoder), torch.no_grad():
            return embed(encoder, features).float().cpu().numpy(), features

    images, regions, feature_size = split.features.shape
    dim = produce(0, 1)[0].shape[2]
    start, parts = _start(split), checksums(model)
    lengths = split.region_lengths
    counts = None if lengths is None else files.checksum(lengths)
    box_sum = _box_sum(boxes)
    identity = {
        "model": parts, "images": [images, regions, feature_size, start], "region counts": counts, "precision": dtype,
    }  # fmt: skip
    if box_sum is not None:
        identity["boxes"] = box_sum
    rows, features = files.write_rows(
        folder / files.ROWS, (images, regions, dim), dtype, identity, produce, step=batch_size, what="images",
        progress=progress,
    )  # fmt: skip
    if lengths is not None:
        np.save(folder / files.REGIONS, lengths, allow_pickle=False)
    if boxes is not None:
        np.save(folder / files.BOXES, boxes.numpy(), allow_pickle=False)
    return files.About(
        parts, images, regions, dim, feature_size, dtype, start, features, rows, counts, None, None, [], box_sum
    )  # fmt: skip


def _own_vectors(model: Loaded, folder: Path, about: files.About) -> files.Produce:
    """The pooled vectors of the gallery's own rows."""
    rows = files.open_rows(folder / files.ROWS, about.shape, about.dtype)
    images = Images(rows, files.open_region_lengths(folder, about), model.model)

    def produce(start: int, stop: int) -> tuple[NDArray[np.float32], NDArray]:
        return pooled.of_images(model, *images.read(slice(start, stop))), rows[start:stop]

    return produce


def _vectors(first: Loaded, split: Split) -> files.Produce:
    """The pooled vectors of a split's images by a first checkpoint."""

    def produce(start: int, stop: int) -> tuple[NDArray[np.float32], NDArray]:
        features, lengths = split.read(slice(start, stop)), split.region_lengths
        with evaluation_mode(first.model.img_enc), torch.no_grad():
            image = embed(first.model.img_enc, features)
        part = None if lengths is None else torch.from_numpy(lengths[start:stop])
        return pooled.of_images(first, image, part), features

    return produce


def _box_sum(boxes: Tensor | None) -> str | None:
    return None if boxes is None else files.checksum(boxes.numpy())


def _require_same(path: Path, about: files.About, split: Split, dtype: str, boxes: Tensor | None) -> None:
    if (about.images, about.regions, about.feature_size) != split.features.shape or about.start != _start(split):
        raise ValueError(
            f"{path} is a gallery of other images ({about.images:,} x {about.regions} regions) than those given "
            f"({split.features.shape[0]:,} x {split.features.shape[1]}); give another folder"
        )
    if about.dtype != dtype:
        raise ValueError(f"{path} is a gallery in {about.dtype}, and {dtype} is asked for; give another folder")
    if about.boxes != _box_sum(boxes):
        if about.boxes is None:
            differ = "without boxes, and boxes are given"
        else:
            differ = "with boxes, and none are given" if boxes is None else "with other boxes than those given"
        raise ValueError(f"{path} is a gallery {differ}; give another folder")


def _require_names(names: Sequence[str] | None, images: int) -> None:
    if names is None:
        return
    if len(names) != images:
        raise ValueError(f"names must have one entry per image, {images:,}, got {len(names):,}")
    for row, name in enumerate(names):
        if not isinstance(name, str) or not name.strip() or len(name.splitlines()) != 1 or {BOM, "\0"} & set(name):
            raise ValueError(f"names[{row}] must be a text of one line, got {name!r}")


def _claim(folder: Path) -> None:
    """Make the folder, or refuse one that holds something else."""
    if not folder.parent.is_dir():
        raise FileNotFoundError(f"{folder.parent} does not exist; make that folder first")
    folder.mkdir(exist_ok=True)
    known = {files.ABOUT, f"{files.ROWS}.journal"}
    others = sorted(path.name for path in folder.iterdir() if path.name != files.LOCK)
    if others and not known & set(others):
        raise ValueError(f"{folder} is no gallery and holds other files, such as {others[0]}; give a new folder")


def _start(split: Split) -> str:
    return files.checksum(split.read(slice(0, _STARTS)))
