"""SCAN's folder of .npy and .txt files, and optional files for what SCAN's files cannot express.

For a split called `test` the folder holds

- `test_ims.npy`: [I, R, F] float32, float16, float64 or int8; or [T, R, F], each image five times;
- `test_caps.txt`: one caption a line, UTF-8;

and may hold

- `test_ims_scale.npy`: [F] float32, with int8 features and only then: feature = int8 * scale;
- `test_caption_to_image.npy`: [T] integers, for each caption the row of its image in `test_ims.npy`; without this
  file the captions must be in the order of the images, the same number for each;
- `test_region_lengths.npy`: [I] integers 1..R, the number of regions of each image; later ones are padding;
- `test_boxes.npy`: [I, R, 4] floating point, the regions' left, top, right and bottom as parts of the picture, 0 to 1;
  or [T, R, 4], where `test_ims.npy` has each image five times;
- `test_ids.txt`: image ids, one a line, for each image or for each caption;
- `test_capids.txt`: caption ids, one a line.

SCAN and SGRAF read the first two; SCAN's COCO data also have the id files.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np

from .split import Rows, Split
from .stored import StoredArray, open_npy
from .texts import text_lines

FILES = (
    "ims.npy",
    "caps.txt",
    "ims_scale.npy",
    "caption_to_image.npy",
    "region_lengths.npy",
    "boxes.npy",
    "ids.txt",
    "capids.txt",
)


def split_names(folder: Path) -> list[str]:
    """The splits in a folder: every `{split}_ims.npy`, sorted."""
    return sorted(path.name.removesuffix("_ims.npy") for path in folder.glob("?*_ims.npy"))


def read(folder: Path, split: str, captions_per_image: int | None = None) -> Split:
    """Open one split of a folder; see the head of this file for what is read.

    Args:
        folder: the data folder, such as `data/f30k_precomp`.
        split: `train`, `dev`, `test`, `testall`, or whatever the files are called.
        captions_per_image: for folders without a caption-to-image file; None: it follows from the counts.

    Raises:
        FileNotFoundError: the folder has no such split, or one of its files is missing.
        ValueError: a file is damaged, or the numbers of images and captions do not fit; the message has both.
        TypeError: a .npy file has numbers of the wrong type.
    """
    name = f"{folder}: {split}"
    path = {file: folder / f"{split}_{file}" for file in FILES}
    for file in ("ims.npy", "caps.txt"):
        if not path[file].exists():
            known = ", ".join(split_names(folder)) or "none"
            inner = [str(each) for each in sorted(folder.iterdir()) if each.is_dir() and split_names(each)]
            if inner and known == "none":
                listed = ", ".join(inner[:5]) + ", ..." * (len(inner) > 5)
                known += f"; there are some in {listed}; give that folder"
            raise FileNotFoundError(f"{path[file]} does not exist; splits in this folder: {known}{one_each(folder)}")
    ims = StoredArray(path["ims.npy"], open_npy)
    if len(ims.shape) != 3:
        raise ValueError(f"{path['ims.npy']} must be [I, R, F] (images, regions, feature size), got {list(ims.shape)}")
    captions = text_lines(path["caps.txt"])
    blank = _blank_lines(path["caps.txt"], captions)
    scale = _scale(path["ims_scale.npy"], ims)
    T = len(captions)
    every = 1
    if path["caption_to_image.npy"].exists():
        if captions_per_image is not None:
            raise ValueError(
                f"{path['caption_to_image.npy']} says which image each caption belongs to; leave captions_per_image out"
            )
        caption_to_image = np.array(open_npy(path["caption_to_image.npy"]))
        if blank and len(caption_to_image) != T:
            raise ValueError(
                f"{path['caption_to_image.npy']} is for {len(caption_to_image)} captions, not {T}; {blank}"
            )
    else:
        per_image, every = _captions_per_image(path["ims.npy"], ims, T, captions_per_image, blank)
        caption_to_image = np.arange(T) // per_image
    if blank:
        warnings.warn(f"{blank}; as in the published code, each counts as a caption without words", stacklevel=3)
    boxes: Rows | StoredArray | None = None
    if path["boxes.npy"].exists():
        boxes = StoredArray(path["boxes.npy"], open_npy)
        if every > 1 and boxes.shape[:1] == ims.shape[:1] and boxes.dtype.kind == "f":
            boxes = Rows(boxes, every=every)
    opened = Split(
        Rows(ims, every=every, scale=scale),
        captions,
        caption_to_image,
        open_npy(path["region_lengths.npy"]) if path["region_lengths.npy"].exists() else None,
        boxes,
        caption_ids=_ids(path["capids.txt"], (T,)),
        name=name,
    )
    opened.image_ids = _image_ids(path["ids.txt"], len(opened.features), opened.caption_to_image)
    return opened


def one_each(folder: Path) -> str:
    """The end of an error message for a folder that has other .npy files, such as one per image; "" if it has none."""
    named = tuple(f"_{file}" for file in FILES)
    others = sorted(path.name for path in folder.glob("*.npy") if not path.name.endswith(named))
    if not others:
        return ""
    return (
        f". It holds {len(others)} other .npy files, such as {others[0]}: if each is an image, [regions, features], "
        "stack them in the order of the captions into one array SPLIT_ims.npy (numpy.stack), shorter ones filled up "
        "with zeros and read with mask_zero_regions=True (--mask-zero-regions)"
    )


def needs_map(split: Split) -> bool:
    """Whether a folder needs a caption-to-image file for this split."""
    I, T = len(split.features), len(split.captions)
    # In a folder without that file, as many rows as captions mean that each image is repeated.
    return T == I or T % I != 0 or not np.array_equal(split.caption_to_image, np.arange(T) // (T // I))


def check_writable(split: Split) -> None:
    """Raise ValueError if a caption cannot be a line of a text file."""
    for t, caption in enumerate(split.captions):
        if "\n" in caption:
            raise ValueError(
                f"{split.name}: caption {t} has a line break, and in a folder a caption is one line; "
                f"take it out: {caption!r}"
            )


def write(folder: Path, name: str, split: Split, images_written: Callable[[int], object], block: int) -> None:
    """Write one split's files, features last; `images_written(n)` is called after each n images."""
    optional = {
        "caption_to_image.npy": split.caption_to_image if needs_map(split) else None,
        "region_lengths.npy": split.region_lengths,
        "boxes.npy": None if split.boxes is None else split.boxes[:],
    }
    for file, array in optional.items():
        if array is not None:
            np.save(folder / f"{name}_{file}", array, allow_pickle=False)
    texts = {"caps.txt": split.captions, "ids.txt": split.image_ids, "capids.txt": split.caption_ids}
    for file, lines in texts.items():
        if lines is not None:
            with open(folder / f"{name}_{file}", "w", encoding="utf-8", newline="\n") as out:
                out.writelines(f"{line}\n" for line in lines)
    features = split.features
    dtype = features.stored_dtype
    # Not a memory map: on a full disk, writing to a map kills the process instead of raising an exception.
    with open(folder / f"{name}_ims.npy", "wb") as out:
        header = {
            "descr": np.lib.format.dtype_to_descr(dtype),
            "fortran_order": False,
            "shape": features.shape,
        }
        np.lib.format.write_array_header_1_0(out, header)
        for start in range(0, len(features), block):
            rows = features[start : start + block]
            out.write(rows.astype(dtype, copy=False).data)
            images_written(len(rows))


def _blank_lines(path: Path, captions: list[str]) -> str:
    """Half a sentence that names the captions without words; nothing where there are none."""
    blank = [number for number, caption in enumerate(captions, 1) if not caption.strip()]
    if not blank:
        return ""
    shown = ", ".join(map(str, blank[:5])) + (", ..." if len(blank) > 5 else "")
    return f"blank lines in {path}: {shown}"


def _scale(path: Path, ims: StoredArray) -> np.ndarray | None:
    if ims.dtype != np.int8:
        if ims.dtype.kind != "f":
            raise TypeError(f"{path.parent}: features must be float32, float16, float64 or int8, got {ims.dtype}")
        if path.exists():
            raise ValueError(f"{path} is for int8 features, and these are {ims.dtype}; remove it")
        return None
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; int8 features need this scale, float32 [F]")
    scale = open_npy(path)
    if scale.shape != ims.shape[2:] or scale.dtype.kind != "f":
        raise ValueError(f"{path} must be float32 [{ims.shape[2]}], got {scale.dtype} {list(scale.shape)}")
    return np.array(scale, dtype=np.float32)


def _captions_per_image(path: Path, ims: StoredArray, T: int, given: int | None, blank: str) -> tuple[int, int]:
    """The number of captions per image, and of rows of `ims` per image (more than 1 if each image is repeated)."""
    rows = ims.shape[0]
    counts = f"{path}: {rows} rows of features and {T} captions"
    remedy = f"write the image of each caption to {path.name.replace('_ims', '_caption_to_image')}"
    if blank:
        counts, remedy = f"{counts} ({blank})", f"remove blank lines that are not captions, or {remedy}"
    if given is not None:
        if given < 1 or T not in (rows * given, rows) or T % given:
            raise ValueError(f"{counts} do not fit captions_per_image={given}")
        return given, 1 if rows * given == T else given
    if rows == T:
        if T % 5 == 0 and all(_one_image(ims, t) for t in (0, T // 10 * 5, T - 5)):
            return 5, 5
        raise ValueError(
            f"{counts}, but the rows do not repeat each image five times; give captions_per_image=1 (each row is a "
            f"different image) or 5 (take every fifth row, as the published code does), or {remedy}"
        )
    if not rows or T % rows:
        raise ValueError(f"{counts}: the captions do not divide evenly among the images; {remedy}")
    return T // rows, 1


def _one_image(ims: StoredArray, row: int) -> bool:
    first = ims[row].tobytes()
    return all(ims[other].tobytes() == first for other in range(row + 1, row + 5))


def _image_ids(path: Path, I: int, caption_to_image: np.ndarray) -> np.ndarray | None:
    T = len(caption_to_image)
    ids = _ids(path, (I, T))
    if ids is None or len(ids) == I:
        return ids
    first = np.full(I, -1, dtype=np.int64)
    first[caption_to_image] = ids
    if np.array_equal(first[caption_to_image], ids) and len(np.unique(caption_to_image)) == I:
        return first
    _ignored(path, "captions of one image have different ids, or an image has no caption")
    return None


def _ids(path: Path, counts: tuple[int, ...]) -> np.ndarray | None:
    if not path.exists():
        return None
    try:
        ids = np.array([int(line) for line in text_lines(path) if line.strip()], dtype=np.int64)
    except (ValueError, OverflowError) as error:
        _ignored(path, f"it is not one whole number a line ({error})")
        return None
    if len(ids) not in counts:
        _ignored(path, f"it has {len(ids)} ids where {' or '.join(map(str, counts))} were expected")
        return None
    return ids


def _ignored(path: Path, why: str) -> None:
    # Only metrics that need ids fail on a bad id file: the published code never opens these files.
    warnings.warn(f"{path} is ignored: {why}; metrics that need these ids are not available", stacklevel=2)
