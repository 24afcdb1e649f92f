"""Small pictures for `report.html` and for pages of search results, where the pictures can be found."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ..features.pictures import KINDS, open_rgb

if TYPE_CHECKING:
    from PIL import Image

    from ..data import Split

_SIDE = 144  # pixels of the longer side


def pictures_of(folder: str | None, data: str, name: str, split: Split) -> Callable[[int], bytes | None] | None:
    """A function from an image's number to a small JPEG file, or None where there is no picture that can be read.

    Args:
        folder: of the pictures; None: only the demo's pictures are known.
        data: the folder or HDF5 file of the features. If `<name>_pictures.txt` lies in or beside it, its line i
            names picture i, up to a tab or else by its first word, with or without its ending; else files are found by
            the split's image ids.
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
        return lambda number: _jpeg(thumbnails([number])[0], _SIDE)
    if not Path(folder).is_dir():
        raise ValueError(f"--pictures {folder} is no folder")
    root = Path(folder).resolve()
    names, found = _list(data, name), listed_names(data, name, split)
    if found is not None:
        return lambda number: _read(root, found[number], _SIDE)
    if split.image_ids is None:
        raise ValueError(
            f"--pictures: the {name} split has no image ids, and there is no {names} with a file name for each image"
        )
    by_id = _numbered(root)
    ids = split.image_ids.tolist()
    if not any(each in by_id for each in ids):
        raise ValueError(f"--pictures {folder}: no file name ends in an image id of the split, such as {ids[0]}")
    return lambda number: _read(root, by_id.get(ids[number], ""), _SIDE)


def pictures_by_name(folder: str, side: int) -> Callable[[str], bytes | None]:
    """A function from the name of a picture to a small JPEG file, or None where there is none that can be read.

    A name may lack its ending. A number, such as an image id of COCO, may also be the number in which a file's name
    ends.

    Args:
        folder: of the pictures; or that of the demo's data, for its thumbnails.
        side: pixels of the longer side.
    """
    from ..data.openclipart import FOLDER, thumbnails

    root = Path(folder).resolve()
    if root == FOLDER:
        rows = {name: row for row, name in enumerate(_first_words(_list(FOLDER, "test")))}
        return lambda name: _jpeg(thumbnails([rows[name]])[0], side) if name in rows else None
    numbered = _numbered(root)

    def find(name: str) -> bytes | None:
        found = _read(root, name, side)
        return _read(root, numbered.get(int(name), ""), side) if found is None and name.isdecimal() else found

    return find


def listed_names(data: str | Path, name: str, split: Split) -> list[str] | None:
    """The name of each image, from `<name>_pictures.txt` in or beside the data; None if there is no such file.

    Raises:
        ValueError: the file has fewer lines than there are images.
    """
    names, count = _list(data, name), len(split.features)
    if not names.is_file():
        return None
    found = _first_words(names)
    if len(found) < count:
        raise ValueError(f"{names} has {len(found):,} lines, and the {name} split {count:,} images")
    return found[:count]


def _list(data: str | Path, name: str) -> Path:
    path = Path(data) if Path(data).is_dir() else Path(data).parent
    return path / f"{name}_pictures.txt"


def _first_words(path: Path) -> list[str]:
    """Of each line what stands before the first tab, or else the first word."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [line.split("\t")[0].strip() if "\t" in line else "".join(line.split()[:1]) for line in lines]


def _numbered(root: Path) -> dict[int, str]:
    """File names of pictures by the number in which they end."""
    found = {}
    for file in root.iterdir():
        if file.suffix.lower() in KINDS and (digits := re.search(r"\d+$", file.stem)):
            found[int(digits[0])] = file.name
    return found


def _read(root: Path, name: str, side: int) -> bytes | None:
    for ending in ("", *KINDS):
        file = (root / f"{name}{ending}").resolve()
        if file.is_file() and root in file.parents:  # a name such as ../../x leads out of the folder
            try:
                return _jpeg(open_rgb(file), side)
            except (OSError, ValueError):
                return None
    return None


def _jpeg(picture: Image.Image, side: int) -> bytes:
    """A small copy of an RGB picture."""
    picture.thumbnail((side, side))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=80)
    return file.getvalue()
