"""A data set as one HDF5 file with a group per split; arrays are read when they are used.

The file carries the attribute `itm_fast_format` = 1. A group, named as its split, holds

- `features`: [I, R, F] float32 or float16, one chunk per image;
- `captions`: [T] variable-length UTF-8 strings;
- `caption_to_image`: [T] int64, 0..I-1;

and may hold

- `region_lengths`: [I] int32, 1..R;
- `boxes`: [I, R, 4] float32 or float16, the regions' left, top, right and bottom as parts of the picture, 0 to 1;
- `image_ids`: [I] int64;
- `caption_ids`: [T] int64.

Any layout, compression, and width of integers and floats is read. What may lead to other files is refused: links other
than hard links, external storage, and virtual data sets.
"""

from __future__ import annotations

import contextlib
import errno
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from .._files import open_regular
from .split import Split
from .stored import StoredArray, damaged

FORMAT = 1
_INTEGERS = ("caption_to_image", "region_lengths", "image_ids", "caption_ids")
_REQUIRED = ("features", "captions", "caption_to_image")


def split_names(path: Path) -> list[str]:
    """The splits in a file: the sorted names of its groups. Links are not followed and not listed."""
    return _groups(path, _open(path))


def read(path: Path, split: str) -> Split:
    """Open one split of a file; the file stays open as long as the split's features exist.

    Args:
        path: the HDF5 file.
        split: the group's name.

    Raises:
        OSError: the file is not HDF5, is damaged, or is open for writing.
        ValueError: the file does not have these groups and data sets, or they lead to other files; the message names
            the data set.
        FileNotFoundError: the file has no such split.
    """
    group = _group(path, split)
    found = {key: _dataset(path, split, group, key) for key in (*_REQUIRED, *_INTEGERS[1:], "boxes")}
    with damaged(f"{path}: {split} is damaged", OSError):
        captions = found["captions"][:]
        arrays: dict[str, Any] = {key: found[key][()] for key in _INTEGERS if found[key] is not None}
    for key in ("features", "boxes"):
        if found[key] is not None:
            arrays[key] = StoredArray(path, _rows, split, key)
    return Split(captions=captions, name=f"{path}: {split}", **arrays)


def check_writable(split: Split) -> None:
    """Raise ValueError if a caption cannot be an HDF5 string."""
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

    open_regular(path).close()
    with damaged(f"{path} is not an HDF5 file, or a damaged one", OSError):
        try:
            file = h5py.File(path, "r")
        except OSError as error:
            if error.errno != errno.EAGAIN and "already open for write" not in str(error):
                raise
            message = (
                "is open for writing in another process, or a program that wrote it ended without closing it; wait "
                "until it is closed, or write it again"
            )
            raise OSError(errno.EAGAIN, message, str(path)) from error
        version = file.attrs.get("itm_fast_format")
    if version is None:
        raise ValueError(
            f"{path} is an HDF5 file without the attribute itm_fast_format; "
            "make one in this form with itm_fast.data.save_splits or `itm-fast convert`"
        )
    if np.ndim(version) or version != FORMAT:
        raise ValueError(f"{path} has itm_fast_format {version}; this version of itm-fast reads {FORMAT}")
    return file


def _groups(path: Path, file: Any) -> list[str]:
    import h5py

    with damaged(f"{path} is damaged", OSError):
        names = sorted(file)
    groups = []
    for name in names:
        with contextlib.suppress(ValueError):  # it is a link; `read` says so if it is asked for
            if isinstance(_member(f"{path}: {name}", file, name), h5py.Group):
                groups.append(name)
    return groups


def _group(path: Path, split: str) -> Any:
    import h5py

    file = _open(path)
    group = _member(f"{path}: {split}", file, split)
    if not isinstance(group, h5py.Group):
        known = ", ".join(_groups(path, file)) or "none"
        raise FileNotFoundError(f"{path}: {split}: no such split; splits in this file: {known}")
    return group


def _member(where: str, group: Any, key: str) -> Any:
    """The member of a group with this name, None if there is none; members in other files are refused.

    Raises:
        OSError: the file is damaged here.
        ValueError: a link, external storage or a virtual data set, any of which may lead to other files.
    """
    import h5py

    with damaged(f"{where}: the file is damaged", OSError):
        # Look in the list of names: `key in group` would open the file that a link names.
        if key not in list(group):
            return None
        elsewhere = group.id.links.get_info(key.encode()).type != h5py.h5l.TYPE_HARD
        if not elsewhere:
            found = group[key]
            if not isinstance(found, h5py.Dataset):
                return found
            made = found.id.get_create_plist()
            elsewhere = made.get_layout() == h5py.h5d.VIRTUAL or made.get_external_count() > 0
    if elsewhere:
        raise ValueError(
            f"{where} is a link, or data stored in other files (external or virtual), which are not followed; copy "
            "the data themselves into the file, with h5copy or h5repack"
        )
    return found


def _rows(path: Path, split: str, key: str) -> Any:
    return _dataset(path, split, _group(path, split), key)


def _dataset(path: Path, split: str, group: Any, key: str) -> Any:
    """A data set of a split; None if it is optional and missing."""
    import h5py

    where = f"{path}: {split}"
    found = _member(f"{where}: {key}", group, key)
    if found is None:
        if key in _REQUIRED:
            raise ValueError(f"{where}: the data set {key} is missing; required are {', '.join(_REQUIRED)}")
        return None
    if not isinstance(found, h5py.Dataset):
        raise ValueError(f"{where}: {key} must be a data set, got a {type(found).__name__}")
    with damaged(f"{where}: {key} is damaged", OSError):
        kind, shape, whole = found.dtype, found.shape, _whole(found)
    if key in ("features", "boxes") and (kind.kind != "f" or not shape):
        raise TypeError(f"{where}: {key} must be an array of floating-point numbers, got {kind} {list(shape or ())}")
    if key == "captions" and (h5py.check_string_dtype(kind) is None or len(shape or ()) != 1):
        raise ValueError(f"{where}: captions must be [T] UTF-8 strings, got {kind} {list(shape or ())}")
    if not whole:  # HDF5 would return zeros for the missing values
        raise ValueError(f"{where}: {key} is declared as {list(shape)}, but not all of it was written; write it again")
    return found


def _whole(dataset: Any) -> bool:
    """Whether every value that a data set declares is stored."""
    if not dataset.shape or 0 in dataset.shape:
        return True
    if dataset.chunks is None:  # stored as one piece
        return dataset.id.get_storage_size() > 0
    counts = (-(-n // size) for n, size in zip(dataset.shape, dataset.chunks, strict=True))
    return dataset.id.get_num_chunks() == math.prod(counts)
