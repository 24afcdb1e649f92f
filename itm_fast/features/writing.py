"""Make a split of SCAN's folder from pictures and a network, or from arrays; an interrupted call can go on."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._files import atomic_write
from .._lock import Lock
from ..data import Split
from ..data.folder import FILES, needs_map
from ..data.stored import damaged
from ..gallery.files import journal, names_checksum, read_json, write_rows
from . import arrays, pictures
from .backbones import Backbone, cells, regions
from .captions import Caption
from .detectors import Detector

_WRITTEN = (*FILES, "pictures.txt")
_BOXES = "boxes.npy"  # of the images that are written already, in the folder of an unfinished split


@dataclass
class Images:
    """The images of a split: where their features come from.

    Attributes:
        names: of their files.
        shape: R, F.
        produce: `produce(start, stop)` returns these images' features [n, R, F]; and their boxes [n, R, 4] where they
            are known only then, else None. Regions that an image lacks are zeros in both.
        origin: what the features are computed from, as plain values; when it differs, a begun split is refused.
        boxes: [I, R, 4] or, if all images have the same, [1, R, 4]; None if unknown, or known to `produce` alone.
        lengths: [I] regions of each image; None if all have R, or if it follows from the boxes of `produce`.
        without_boxes: names of the images in which `produce` has found no box so far; the whole image is their region.
    """

    names: Sequence[str]
    shape: tuple[int, int]
    produce: Callable[[int, int], tuple[NDArray[np.floating], NDArray[np.float32] | None]]
    origin: Mapping[str, Any] = field(default_factory=dict)
    boxes: NDArray[np.float32] | None = None
    lengths: NDArray[np.int32] | None = None
    without_boxes: list[str] = field(default_factory=list)


def from_pictures(
    folder: Path, names: Sequence[str], backbone: Backbone, grid: int, *, origin: Mapping[str, Any], workers: int
) -> Images:
    """The grid features of pictures: the backbone's last feature map, pooled to grid x grid regions.

    Raises:
        ValueError: the backbone cannot take pictures of its size, or its feature map is smaller than the grid.
    """
    with damaged(f"the backbone has no feature map of a picture of {' x '.join(map(str, backbone.size))} pixels"):
        empty = backbone.map(np.zeros((1, *backbone.size, 3), np.uint8))
    _, F, height, width = empty.shape
    boxes = cells(height, width, grid)[None]

    def produce(start: int, stop: int) -> tuple[NDArray[np.floating], None]:
        def pixels(name: str) -> NDArray[np.uint8]:
            return backbone.pixels(pictures.open_rgb(folder / name))

        read = np.stack(pictures.each(pixels, names[start:stop], "", False, workers))
        return regions(backbone.map(read), grid).cpu().numpy(), None

    return Images(names, (grid * grid, F), produce, {**origin, "grid": grid, "size": list(backbone.size)}, boxes)


def from_detector(
    folder: Path, names: Sequence[str], detector: Detector, *, origin: Mapping[str, Any], workers: int
) -> Images:
    """The features of the boxes that a detector is surest of; an image may have fewer than `detector.count`.

    An image in which it proposes no box has one region, the whole image.
    """
    shape = (detector.count, detector.feature_size)
    without_boxes: list[str] = []

    def produce(start: int, stop: int) -> tuple[NDArray[np.floating], NDArray[np.float32]]:
        features = np.zeros((stop - start, *shape), np.float32)
        boxes = np.zeros((stop - start, detector.count, 4), np.float32)
        opened = pictures.each(lambda name: pictures.open_rgb(folder / name), names[start:stop], "", False, workers)
        for row, picture in enumerate(opened):
            found, where = detector.regions(picture)
            if not len(found):
                found, where = detector.whole(picture)
                without_boxes.append(names[start + row])
            features[row, : len(found)], boxes[row, : len(found)] = found, where
        return features, boxes

    settings = {"regions": detector.count, "sides": detector.sides}
    return Images(names, shape, produce, {**origin, **settings}, without_boxes=without_boxes)


def from_arrays(folder: Path, names: Sequence[str], *, progress: bool) -> Images:
    """The features of one file per image; shorter ones are filled up with zeros, and the regions counted.

    Raises:
        ValueError: a file is damaged, or files do not fit each other; the message names it.
    """

    def shape(name: str) -> tuple[tuple[int, ...], NDArray[np.float32] | None]:
        features, found = arrays.read(folder / name)
        return features.shape, found

    seen = pictures.each(shape, names, "checking", progress, workers=1)
    F = seen[0][0][1]
    for name, ((_, size), found) in zip(names, seen, strict=True):
        if size != F:
            raise ValueError(f"{folder / name} has {size} features for each region, and {names[0]} has {F}")
        if (found is None) != (seen[0][1] is None):
            with_boxes, without = (names[0], name) if found is None else (name, names[0])
            raise ValueError(f"{folder / with_boxes} has boxes, and {without} has none")
    lengths = np.array([length for (length, _), _ in seen], np.int32)
    R = int(lengths.max())
    boxes = None
    if seen[0][1] is not None:
        boxes = np.zeros((len(names), R, 4), np.float32)
        for row, (_, found) in enumerate(seen):
            boxes[row, : lengths[row]] = found

    def produce(start: int, stop: int) -> tuple[NDArray[np.floating], None]:
        block = np.zeros((stop - start, R, F), np.float32)
        for row, name in enumerate(names[start:stop]):
            features = arrays.read(folder / name)[0]
            if features.shape != (lengths[start + row], F):
                raise ValueError(f"{folder / name} has changed while it was read; do the same again")
            block[row, : len(features)] = features
        return block, None

    return Images(names, (R, F), produce, {"regions": R}, boxes, None if (lengths == R).all() else lengths)


def write(
    output: Path,
    split: str,
    folder: Path,
    images: Images,
    captions: Sequence[Sequence[Caption]],
    *,
    dtype: str,
    batch_size: int,
    progress: bool,
) -> None:
    """Write the split's files into `output`. Features appear there last, when everything is complete.

    Until then they lie in `output/.SPLIT.unfinished`, where the next call with the same images goes on.

    Args:
        output: SCAN's folder; made if it does not exist.
        split: the split's name.
        folder: of the images.
        images: what to write.
        captions: of each image.
        dtype: float32 or float16, in which features are stored.
        batch_size: images computed at once.
        progress: show a progress bar.

    Raises:
        FileExistsError: `output` has files of this split already.
        ValueError: an interrupted call was made with other images or settings, or features are not finite.
        OSError: there is no room on the disk (this is checked first), or writing fails.
        KeyboardInterrupt: after Ctrl-C; the message says what is kept.
    """
    output.mkdir(parents=True, exist_ok=True)
    unfinished = _unfinished(output, split)
    rows = unfinished / "ims.npy"
    with Lock(output / f".{split}.lock", str(output)):
        require_new(output, split)
        unfinished.mkdir(exist_ok=True)
        identity = {**_identity(folder, images), "precision": dtype}
        _require_same(unfinished, rows, identity)

        def produce(start: int, stop: int) -> tuple[NDArray[np.floating], NDArray]:
            found, boxes = images.produce(start, stop)
            if boxes is not None:
                _keep_boxes(unfinished / _BOXES, (len(images.names), *boxes.shape[1:]), start, boxes)
            with np.errstate(over="ignore"):
                good = np.isfinite(found.astype(dtype)).reshape(stop - start, -1).all(axis=1)
            if not good.all():
                name = folder / images.names[start + int(np.argmin(good))]
                remedy = "leave out --half" if dtype == "float16" else "correct or remove it, or correct the weights"
                raise ValueError(
                    f"the features of {name} have a value that is not finite in {dtype}; {remedy}, and delete "
                    f"{unfinished}, since the features of all images must then be computed anew"
                )
            return found, np.empty(0)  # a checksum of the pictures is not needed: their sizes and dates are known

        write_rows(
            rows, (len(images.names), *images.shape), dtype, identity, produce, step=batch_size, what="images",
            progress=progress,
        )  # fmt: skip
        if (unfinished / _BOXES).exists():
            boxes = np.load(unfinished / _BOXES, allow_pickle=False)
            lengths = (boxes[..., 2:] > boxes[..., :2]).all(axis=2).sum(axis=1, dtype=np.int32)
            images = replace(images, boxes=boxes, lengths=None if (lengths == boxes.shape[1]).all() else lengths)
        try:
            _write_rest(output, split, images, captions)
        except OSError as error:
            raise OSError(
                error.errno or 0,
                f"{error.strerror or error}; all features are kept in {unfinished}: do the same again to go on",
                error.filename,
            ) from error
        os.replace(rows, output / f"{split}_ims.npy")
        shutil.rmtree(unfinished)


def require_new(output: Path, split: str) -> None:
    """Refuse to replace files of a split, except those of a call that was interrupted.

    Raises:
        FileExistsError: there are such files.
    """
    there = [name for name in (f"{split}_{file}" for file in _WRITTEN) if (output / name).exists()]
    if there and (f"{split}_ims.npy" in there or not _unfinished(output, split).exists()):
        raise FileExistsError(
            f"{output / there[0]} exists already; delete the files of {split}, or give another folder or --split"
        )


def _unfinished(output: Path, split: str) -> Path:
    return output / f".{split}.unfinished"


def _keep_boxes(path: Path, shape: tuple[int, ...], start: int, boxes: NDArray[np.float32]) -> None:
    """Write boxes of images from `start` on. This comes before their features, so that each written row has them."""
    if not path.exists():
        with atomic_write(path, "wb") as out:
            np.save(out, np.zeros(shape, np.float32))
    kept = np.load(path, mmap_mode="r+", allow_pickle=False)
    kept[start : start + len(boxes)] = boxes
    kept.flush()


def _write_rest(output: Path, split: str, images: Images, captions: Sequence[Sequence[Caption]]) -> None:
    owner = np.repeat(np.arange(len(captions)), [len(own) for own in captions])
    flat = [caption for own in captions for caption in own]
    lines = [caption.text for caption in flat]
    whole = Split(np.broadcast_to(np.float16(0), (len(images.names), *images.shape)), lines, owner)  # takes no memory
    boxes = images.boxes
    if boxes is not None and len(boxes) < len(images.names):
        boxes = np.repeat(boxes, len(images.names), axis=0)
    optional = {
        "caption_to_image.npy": owner if needs_map(whole) else None,
        "region_lengths.npy": images.lengths,
        "boxes.npy": boxes,
    }
    for file, array in optional.items():
        (output / f"{split}_{file}").unlink(missing_ok=True)  # of a call that was interrupted here
        if array is not None:
            with atomic_write(output / f"{split}_{file}", "wb") as out:
                np.save(out, array, allow_pickle=False)
    # A name with a space ends at the tab, where readers would take the first word.
    names = [f"{name}\t" if " " in name else name for name in map(arrays.label, images.names)]
    texts = {"caps.txt": lines, "pictures.txt": names}
    if not any(caption.id is None for caption in flat):  # COCO's ids, for CxC and ECCV metrics
        texts |= {"ids.txt": [str(own[0].image_id) for own in captions], "capids.txt": [str(each.id) for each in flat]}
    for file in ("ids.txt", "capids.txt"):
        (output / f"{split}_{file}").unlink(missing_ok=True)
    for file, content in texts.items():
        with atomic_write(output / f"{split}_{file}") as out:
            out.writelines(f"{line}\n" for line in content)


def _identity(folder: Path, images: Images) -> dict[str, Any]:
    states = [(folder / name).stat() for name in images.names]
    files = [
        f"{name} {state.st_size} {state.st_mtime_ns}" for name, state in zip(images.names, states, strict=True)
    ]
    return {**images.origin, "images": [len(files), *images.shape, names_checksum(files)]}


def _require_same(unfinished: Path, rows: Path, identity: Mapping[str, Any]) -> None:
    if not journal(rows).exists():
        return
    begun = read_json(journal(rows)).get("identity") or {}
    differ = sorted(name for name in {*identity, *begun} if identity.get(name) != begun.get(name))
    if not differ:
        return
    causes = [f"another {name}" for name in differ if name != "images"]
    old, new = begun.get("images") or [0, None], identity["images"]  # their number first, a checksum last
    if old[0] != new[0]:
        causes.append(f"{old[0]:,} images, now {new[0]:,}")
    elif old[-1] != new[-1] or not causes:
        causes.append("other images, or before one of them changed, or in another order")
    raise ValueError(
        f"{unfinished} holds features that an interrupted command made with {', and with '.join(causes)}; give that "
        "command again for the same images, or delete this folder to begin anew"
    )
