"""The HDF5 form: one file, a group per split, read lazily.

The file carries the attribute `itm_fast_format` = 1. A group, named as its split, holds

- `features`: [I, R, F] float32 or float16, one chunk per image;
- `captions`: [T] variable-length UTF-8 strings;
- `caption_to_image`: [T] int64, 0..I-1;

and may hold

- `region_lengths`: [I] int32, 1..R;
- `boxes`: [I, R, 4] float32 or float16;
- `image_ids`: [I] int64;
- `caption_ids`: [T] int64.

A reader accepts any layout, compression and integer or float width that HDF5 has for these.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from .split import Rows, Split

FORMAT = 1
_INTEGERS = ("caption_to_image", "region_lengths", "image_ids", "caption_ids")
_REQUIRED = ("features", "captions", "caption_to_image")


def split_names(path: Path) -> list[str]:
    """The splits in a file: its groups, sorted."""
    with _open(path) as file:
        return _groups(file)


def read(path: Path, split: str) -> Split:
    """Open one split of a file; the file stays open as long as the split's features are held.

    Args:
        path: the HDF5 file.
        split: the group's name.

    Raises:
        OSError: not an HDF5 file, or a damaged one.
        ValueError: HDF5, but not of this form; the message names the data set.
        FileNotFoundError: no such split in the file.
    """
    import h5py

    file = _open(path)
    name = f"{path}: {split}"
    if split not in _groups(file):
        known = ", ".join(_groups(file)) or "none"
        raise FileNotFoundError(f"{name}: no such split; splits in this file: {known}")
    group = file[split]
    found = {key: _dataset(name, group, key) for key in (*_REQUIRED, *_INTEGERS[1:], "boxes")}
    if h5py.check_string_dtype(found["captions"].dtype) is None or found["captions"].ndim != 1:
        raise ValueError(
            f"{name}: captions must be [T] UTF-8 strings, got {found['captions'].dtype} {list(found['captions'].shape)}"
        )
    captions = []
    for t, caption in enumerate(found["captions"][:]):
        try:
            captions.append(bytes(caption).decode("utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(f"{name}: caption {t} is not UTF-8 ({error.reason})") from error
    arrays: dict[str, Any] = {key: found[key][()] for key in _INTEGERS if found[key] is not None}
    for key in ("features", "boxes"):
        if found[key] is not None:
            if found[key].dtype.kind != "f" or not found[key].shape:
                raise TypeError(f"{name}: {key} must be an array of floating-point numbers, got {found[key]}")
            arrays[key] = Rows(found[key])
    return Split(captions=captions, name=name, **arrays)


def check_writable(split: Split) -> None:
    """Raise ValueError for captions that an HDF5 string cannot hold."""
    for t, caption in enumerate(split.captions):
        if "\0" in caption:
            raise ValueError(
                f"{split.name}: caption {t} has a NUL character, where an HDF5 string ends; take it out: {caption!r}"
            )


def write(file: Any, name: str, split: Split, images_written: Callable[[int], object], block: int) -> None:
    """Write one split as a group of an open file; `images_written(n)` is called after each n images."""
    import h5py

    group = file.create_group(name)
    captions = np.array(split.captions, dtype=object)
    group.create_dataset("captions", data=captions, dtype=h5py.string_dtype("utf-8"))
    for key in _INTEGERS:
        array = getattr(split, key)
        if array is not None:
            group.create_dataset(key, data=array)
    for key, rows in (("boxes", split.boxes), ("features", split.features)):
        if rows is None:
            continue
        out = group.create_dataset(key, rows.shape, rows.stored_dtype, chunks=(1, *rows.shape[1:]))
        for start in range(0, len(rows), block):
            part = rows[start : start + block]
            out[start : start + len(part)] = part
            if key == "features":
                images_written(len(part))


def create(path: Path) -> Any:
    """A new, empty file of this form, open for writing."""
    import h5py

    file = h5py.File(path, "w")
    file.attrs["itm_fast_format"] = FORMAT
    return file


def _open(path: Path) -> Any:
    import h5py

    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise OSError(f"{path} is not an HDF5 file, or a damaged one: {error}") from error
    version = file.attrs.get("itm_fast_format")
    if version is None:
        raise ValueError(
            f"{path} is an HDF5 file without the attribute itm_fast_format; "
            "make one in this form with itm_fast.data.save_splits or `itm-fast convert`"
        )
    if np.ndim(version) or version != FORMAT:
        raise ValueError(f"{path} has itm_fast_format {version}; this version of itm-fast reads {FORMAT}")
    return file


def _groups(file: Any) -> list[str]:
    import h5py

    return sorted(name for name in file if file.get(name, getclass=True) is h5py.Group)


def _dataset(name: str, group: Any, key: str) -> Any:
    import h5py

    if key not in group:
        if key in _REQUIRED:
            raise ValueError(f"{name}: the data set {key} is missing; required are {', '.join(_REQUIRED)}")
        return None
    if group.get(key, getclass=True) is not h5py.Dataset:
        raise ValueError(f"{name}: {key} must be a data set, got a {type(group[key]).__name__}")
    return group[key]
