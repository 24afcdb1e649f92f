"""The files of a gallery, a folder.

    gallery.json            sizes and checksums of the model and of the images; written last, when all else is there
    image.npy               [I, R, D] encoded regions, float32 or float16
    region_lengths.npy      [I] int32 regions of each image, if they differ
    boxes.npy               [I, R, 4] float32 boxes of the regions, if the model reads them
    names.txt               a name for each image, one a line, if names were given
    names.txt.next          names that are to replace these; if gallery.json has their checksum, they have
    pooled-CHECKSUM.npy     [I, D'] pooled vectors by the image encoder of a first checkpoint, with a .json of its own
    recall.json             the recall of two-stage searches, as measured
    *.journal               beside an array that is being written: how far it is, for the next attempt

Nothing is unpickled. Checksums are CRC-32: they find damage and mistakes, not forgery.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from .._files import FULL, atomic_write, open_regular
from ..data.stored import damaged, open_npy
from ..data.texts import text_lines

ABOUT, ROWS, REGIONS, BOXES, NAMES, RECALL, LOCK = (
    "gallery.json", "image.npy", "region_lengths.npy", "boxes.npy", "names.txt", "recall.json", ".gallery.lock",
)  # fmt: skip
FORMAT = "itm-fast gallery 1"
_SECONDS = 20.0  # between two entries of a journal


@dataclass(frozen=True)
class About:
    """What a gallery is of; the content of gallery.json.

    Attributes:
        model: name and checksums of the model, by part.
        images, regions, dim: I, R, D.
        feature_size: F, features per region.
        dtype: of the rows: "float32" or "float16".
        start, features: checksums of the features of the first images, and of all.
        rows, region_lengths, names, boxes: checksums of these files; None if there is no such file.
        pictures: the folder of the pictures, as given, or None.
        sample: captions on which the recall of a two-stage search is measured.
    """

    model: dict[str, str]
    images: int
    regions: int
    dim: int
    feature_size: int
    dtype: str
    start: str
    features: str
    rows: str
    region_lengths: str | None
    names: str | None
    pictures: str | None
    sample: list[str]
    boxes: str | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of image.npy."""
        return self.images, self.regions, self.dim


_KINDS: dict[str, Callable[[Any], bool]] = {
    "dict[str, str]": lambda value: isinstance(value, dict) and all(isinstance(v, str) for v in value.values()),
    "int": lambda value: type(value) is int and value > 0,
    "str": lambda value: isinstance(value, str),
    "str | None": lambda value: value is None or isinstance(value, str),
    "list[str]": lambda value: isinstance(value, list) and all(isinstance(v, str) for v in value),
}


def read_about(folder: Path) -> About:
    """The content of a finished gallery's gallery.json.

    Raises:
        FileNotFoundError: the folder is no gallery, or an unfinished one.
        ValueError: the file is damaged, or of another version.
    """
    if not (folder / ABOUT).exists():
        begun = (folder / f"{ROWS}.journal").exists()
        why = "was begun and is not finished; the command that began it goes on" if begun else "is not a gallery"
        hint = "" if begun else ": `itm-fast gallery` or itm_fast.Gallery.build makes one"
        raise FileNotFoundError(f"{folder} {why if folder.exists() else 'does not exist'}{hint}")
    found = read_json(folder / ABOUT)
    if found.get("format") != FORMAT:
        raise ValueError(
            f"{folder / ABOUT} is of the form {found.get('format')!r}, and this version of itm-fast reads {FORMAT!r}; "
            "build the gallery again"
        )
    values: dict[str, Any] = {field.name: found.get(field.name) for field in fields(About)}
    for field in fields(About):
        if not _KINDS[str(field.type)](values[field.name]):
            raise ValueError(f"{folder / ABOUT} is damaged ({field.name} is {values[field.name]!r}); {_again(folder)}")
    return About(**values)


def write_about(folder: Path, about: About) -> None:
    """Write gallery.json; the gallery is then finished."""
    write_json(folder / ABOUT, {"format": FORMAT, **asdict(about)})


def open_rows(path: Path, shape: Sequence[int], dtype: str) -> NDArray[np.floating]:
    """An array of the gallery, memory-mapped.

    Raises:
        ValueError: the file is missing, damaged, or of another shape or dtype than it should be.
    """
    if not path.exists():
        raise ValueError(f"{path} is missing; {_again(path.parent)}")
    found = open_npy(path)
    if found.shape != tuple(shape) or found.dtype != np.dtype(dtype):
        raise ValueError(
            f"{path} is {found.dtype} {list(found.shape)}, and should be {dtype} {list(shape)}; {_again(path.parent)}"
        )
    return found


def open_region_lengths(folder: Path, about: About) -> NDArray[np.int32] | None:
    """The regions of each image, or None; errors as `open_rows`."""
    if about.region_lengths is None:
        return None
    found = np.array(open_rows(folder / REGIONS, (about.images,), "int32"))
    if checksum(found) != about.region_lengths:
        raise ValueError(f"{folder / REGIONS} is damaged (its checksum differs); {_again(folder)}")
    return found


def open_boxes(folder: Path, about: About) -> NDArray[np.float32] | None:
    """The boxes of each image's regions [I, R, 4], memory-mapped, or None; errors as `open_rows`."""
    if about.boxes is None:
        return None
    found = open_rows(folder / BOXES, (about.images, about.regions, 4), "float32")
    if checksum(found) != about.boxes:
        raise ValueError(f"{folder / BOXES} is damaged (its checksum differs); {_again(folder)}")
    return found


def open_names(folder: Path, about: About) -> list[str] | None:
    """The images' names, or None; errors as `open_rows`."""
    if about.names is None:
        return None
    there = [path for path in (folder / NAMES, _next(folder)) if path.exists()]
    if not there:
        raise ValueError(f"{folder / NAMES} is missing; {_again(folder)}")
    for path in there:
        found = _names(path)
        if names_checksum(found) == about.names:
            return found
    raise ValueError(f"{there[0]} is damaged (its checksum differs); {_again(folder)}")


def write_names(folder: Path, names: Sequence[str]) -> None:
    """Write names beside those of the gallery; once gallery.json has their checksum, `settle_names` replaces those."""
    with atomic_write(_next(folder)) as file:
        file.writelines(f"{name}\n" for name in names)


def settle_names(folder: Path, about: About) -> None:
    """Keep one file of names, names.txt, of those that an interrupted call or `write_names` has left."""
    if _next(folder).exists():
        if names_checksum(_names(_next(folder))) == about.names:
            os.replace(_next(folder), folder / NAMES)
        else:
            _next(folder).unlink()


def _next(folder: Path) -> Path:
    return folder / f"{NAMES}.next"


def _names(path: Path) -> list[str]:
    return [line.rstrip("\n") for line in text_lines(path)]


def names_checksum(names: Sequence[str]) -> str:
    """CRC-32 of the lines of names.txt."""
    return checksum(np.frombuffer("".join(f"{name}\n" for name in names).encode(), np.uint8))


def checksum(array: NDArray, before: str = "0") -> str:
    """CRC-32 of an array's bytes, continued from that of the bytes before.

    >>> checksum(np.arange(4)) == checksum(np.arange(2, 4), checksum(np.arange(2)))
    True
    """
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
    return f"{zlib.crc32(data, int(before, 16)):08x}"


def verify(rows: NDArray, wanted: str, path: Path, progress: bool) -> None:
    """Read an array whole and compare its checksum.

    Raises:
        ValueError: it is damaged.
    """
    from tqdm import tqdm

    found = "0"
    step = max(1, (64 << 20) // max(1, rows[:1].nbytes))
    with tqdm(total=len(rows), desc="checking", unit="image", disable=not progress) as bar:
        for start in range(0, len(rows), step):
            found = checksum(rows[start : start + step], found)
            bar.update(min(step, len(rows) - start))
    if found != wanted:
        raise ValueError(f"{path} is damaged (its checksum differs); {_again(path.parent)}")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ValueError: the file holds none.
    """
    with damaged(f"{path} is damaged; {_again(path.parent)}"), open_regular(path) as file:
        found = json.load(file)
        if not isinstance(found, dict):
            raise ValueError("it holds no JSON object")
    return found


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object, whole or not at all."""
    with atomic_write(path) as file:
        json.dump(content, file, indent=1, allow_nan=False)


def finished(path: Path) -> None:
    """Remove the journal of an array, once a description of the array is written."""
    journal(path).unlink(missing_ok=True)


def journal(path: Path) -> Path:
    """The journal of an array."""
    return path.with_name(f"{path.name}.journal")


Produce = Callable[[int, int], tuple[NDArray[np.floating], NDArray]]


def write_rows(
    path: Path,
    shape: tuple[int, ...],
    dtype: str,
    identity: Mapping[str, Any],
    produce: Produce,
    *,
    step: int,
    what: str,
    progress: bool,
) -> tuple[str, str]:
    """Write a .npy file row by row; what an interrupted call has written is kept, and the next call goes on there.

    The journal stays until `finished` is called.

    Args:
        path: the file.
        shape, dtype: of the array.
        identity: what the rows are computed from, as plain values; the next call must have the same.
        produce: `produce(start, stop)` returns these rows, and what they are computed from.
        step: rows computed at once.
        what: the label of the progress bar.
        progress: show it.

    Returns:
        Checksums of all rows, and of all that they are computed from.

    Raises:
        ValueError: the file was begun from something else, or a row is not finite.
        OSError: there is no room on the disk (this is checked first), or writing fails.
        KeyboardInterrupt: after Ctrl-C; the message says what is kept.
    """
    from tqdm import tqdm

    header = io.BytesIO()
    descr = np.lib.format.dtype_to_descr(np.dtype(dtype))
    np.lib.format.write_array_header_1_0(header, {"descr": descr, "fortran_order": False, "shape": shape})
    size = len(header.getvalue())
    row = int(np.prod(shape[1:])) * np.dtype(dtype).itemsize
    note = _begun(path, identity, size, row)
    _require_room(path, (shape[0] - note["done"]) * row)

    with (
        open(path, "r+b" if note["done"] else "wb") as file,
        tqdm(total=shape[0], initial=note["done"], desc=what, unit="image", disable=not progress) as bar,
    ):
        kept = note

        def save() -> None:
            nonlocal kept
            file.flush()
            os.fsync(file.fileno())
            write_json(journal(path), {"identity": dict(identity), **note})
            kept = note

        if not note["done"]:
            save()  # from now on the folder is known as a gallery that was begun
            file.write(header.getvalue())
        file.seek(size + note["done"] * row)
        file.truncate()
        saved = time.monotonic()
        try:
            for start in range(note["done"], shape[0], step):
                stop = min(start + step, shape[0])
                computed, read = produce(start, stop)
                with np.errstate(over="ignore"):
                    rows = np.ascontiguousarray(computed, dtype)
                _require_finite(rows, start, dtype)
                file.write(rows.data)
                note = {"done": stop, "rows": checksum(rows, note["rows"]), "read": checksum(read, note["read"])}
                bar.update(stop - start)
                if time.monotonic() - saved > _SECONDS:
                    save()
                    saved = time.monotonic()
            save()
        except KeyboardInterrupt as interrupt:
            save()
            raise type(interrupt)(f"interrupted; {_kept(path, note, shape)}: do the same again to go on") from None
        except OSError as error:
            with contextlib.suppress(OSError):
                save()
            cast(io.BufferedWriter, file).raw.close()  # else leaving `with` writes its buffer, and fails too
            room = "free some space and " if error.errno in FULL else ""
            message = f"{error.strerror or error}; {_kept(path, kept, shape)}: {room}do the same again to go on"
            raise OSError(error.errno or 0, message, str(path)) from error
    return note["rows"], note["read"]


def _begun(path: Path, identity: Mapping[str, Any], size: int, row: int) -> dict[str, Any]:
    """How far an earlier call came."""
    fresh = {"done": 0, "rows": "0", "read": "0"}
    if not journal(path).exists():
        return fresh
    note = read_json(journal(path))
    if note.get("identity") != dict(identity):
        other = note.get("identity") or {}
        differ = sorted(name for name in {*identity, *other} if identity.get(name) != other.get(name))
        raise ValueError(f"{path.parent} was begun with another {', '.join(differ)}; {_again(path.parent)}")
    whole = type(note.get("done")) is int and path.exists() and path.stat().st_size >= size + note["done"] * row
    if not whole or not all(isinstance(note.get(name), str) for name in ("rows", "read")):
        return fresh
    return {name: note[name] for name in fresh}


def _kept(path: Path, note: Mapping[str, Any], shape: tuple[int, ...]) -> str:
    return f"{note['done']:,} of {shape[0]:,} images are kept in {path.parent}"


def _require_finite(rows: NDArray, start: int, dtype: str) -> None:
    good = np.isfinite(rows).reshape(len(rows), -1).all(axis=1)
    if not good.all():
        half = " in half precision; use float32" if dtype == "float16" else "; check its features and the weights"
        raise ValueError(f"image {start + int(np.argmin(good))} has a value that is not finite{half}")


def _require_room(path: Path, need: int) -> None:
    free = shutil.disk_usage(path.parent).free
    if free < need:
        raise OSError(
            f"{path} needs {need / 1e9:.3g} GB more and its disk has {free / 1e9:.3g} GB free; make room, choose "
            "another disk, or use half precision"
        )


def _again(folder: Path) -> str:
    return f"delete {folder} and build the gallery again"
