"""Small pictures of a split for `report.html`, where the pictures can be found."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..data import Split

_SIDE = 144  # pixels of the longer side
_KINDS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")


def pictures_of(folder: str | None, data: str, name: str, split: Split) -> Callable[[int], bytes | None] | None:
    """A function from an image's number to a small JPEG file, or None where there is no picture that can be read.

    Args:
        folder: of the pictures; None: only the demo's pictures are known.
        data: the folder or HDF5 file of the features. If `<name>_pictures.txt` lies in or beside it, the first word of
            its line i names picture i, with or without its ending; else files are found by the split's image ids.
        name: of the split.
        split: the split.

    Returns:
        The function; None if no pictures are known.

    Raises:
        ValueError: `folder` is given, and nothing says which picture belongs to which image.
    """
    from ..data.openclipart import FOLDER, thumbnails

    if folder is None:
        if Path(data).resolve() != FOLDER or name != "test":
            return None
        return lambda number: _jpeg(thumbnails([number])[0])
    if not Path(folder).is_dir():
        raise ValueError(f"--pictures {folder} is no folder")
    root, count = Path(folder).resolve(), len(split.features)
    path = Path(data) if Path(data).is_dir() else Path(data).parent
    names = path / f"{name}_pictures.txt"
    if names.is_file():
        found = [line.split()[0] if line.split() else "" for line in names.read_text(encoding="utf-8").splitlines()]
        if len(found) < count:
            raise ValueError(f"{names} has {len(found):,} lines, and the {name} split {count:,} images")
        return lambda number: _read(root, found[number])
    if split.image_ids is None:
        raise ValueError(
            f"--pictures: the {name} split has no image ids, and there is no {names} with a file name for each image"
        )
    by_id = {}
    for file in root.iterdir():
        if file.suffix.lower() in _KINDS and (digits := re.search(r"\d+$", file.stem)):
            by_id[int(digits[0])] = file.name
    ids = split.image_ids.tolist()
    if not any(each in by_id for each in ids):
        raise ValueError(f"--pictures {folder}: no file name ends in an image id of the split, such as {ids[0]}")
    return lambda number: _read(root, by_id.get(ids[number], ""))


def _read(root: Path, name: str) -> bytes | None:
    from PIL import Image

    for ending in ("", *_KINDS):
        file = (root / f"{name}{ending}").resolve()
        if file.is_file() and root in file.parents:  # a name such as ../../x leads out of the folder
            try:
                with Image.open(file) as picture:
                    return _jpeg(picture)
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
                return None
    return None


def _jpeg(picture) -> bytes:
    small = picture.convert("RGB")
    small.thumbnail((_SIDE, _SIDE))
    file = io.BytesIO()
    small.save(file, "JPEG", quality=80)
    return file.getvalue()
