"""Captions by the name of their image, from CSV, TSV, JSON and COCO's annotation files."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from ..data.stored import damaged
from ..data.texts import caption_text, text_lines

_NAMES = ("image", "file_name", "filename")  # of the entry that names the picture
_FORMS = (
    'it must be a list of {"image": NAME, "caption": TEXT} or {"image": NAME, "captions": [TEXT, ...]}, an object '
    "{NAME: [TEXT, ...]}, or an annotation file of COCO"
)


def read_captions(path: str | os.PathLike[str]) -> tuple[dict[str, list[str]], int]:
    """The captions of each image of a file.

    White space within a caption, line breaks included, becomes one space: in SCAN's folder a caption is one line.

    Args:
        path: a `.csv` or `.tsv` file with the columns `image` and `caption`; or a `.json` file: a list of
            `{"image": NAME, "caption": TEXT}` or `{"image": NAME, "captions": [TEXT, ...]}`, an object
            `{NAME: [TEXT, ...]}`, or COCO's annotation file.

    Returns:
        Captions by the names of images, both in the order of the file; and the number of empty captions left out.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is of another form, or damaged; the message names the line or the entry.
        TypeError: a caption is not a text.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = open(f"{folder}/a.csv", "w").write("image,caption\\nkite.jpg,a red kite\\nkite.jpg,a kite\\n")
    ...     read_captions(f"{folder}/a.csv")
    ({'kite.jpg': ['a red kite', 'a kite']}, 0)
    """
    path = Path(path)
    kind = path.suffix.lower()
    if kind not in (".csv", ".tsv", ".json"):
        raise ValueError(f"{path}: captions are read from a .csv, .tsv or .json file, and this name ends in {kind!r}")
    found: dict[str, list[str]] = {}
    empty = 0
    for where, name, text in _json(path) if kind == ".json" else _table(path, "\t" if kind == ".tsv" else ","):
        if "\0" in (caption := caption_text(text, f"{path}, {where}: the caption")):
            raise ValueError(f"{path}, {where}: the caption holds a NUL character; correct it")
        if caption := " ".join(caption.split()):
            found.setdefault(name, []).append(caption)
        else:
            empty += 1
    if not found:
        raise ValueError(f"{path} holds no captions")
    return found, empty


def match(captions: Mapping[str, Sequence[str]], names: Sequence[str]) -> tuple[list[list[str]], list[str]]:
    """Give each picture its captions.

    A name in the file of captions may have or lack the picture's folder, and its ending; it may also have an ending
    where the name in `names` has none, as those of arrays.

    Args:
        captions: by name, from `read_captions`.
        names: of the pictures, with their folders and endings.

    Returns:
        For each picture its captions, perhaps none; and the names of `captions` that are no picture's.

    Raises:
        ValueError: a name fits several pictures.

    >>> match({"kite": ["a red kite"], "ball.png": ["a ball"]}, ["toys/kite.jpg", "dog.jpg"])
    ([['a red kite'], []], ['ball.png'])
    """
    known: list[dict[str, list[int]]] = [{}, {}, {}, {}]
    for row, name in enumerate(names):
        pure = PurePosixPath(name)
        for forms, form in zip(known, (name, pure.name, str(pure.with_suffix("")), pure.stem), strict=True):
            forms.setdefault(form, []).append(row)
    found: list[list[str]] = [[] for _ in names]
    lost = []
    for name, texts in captions.items():
        short = name.replace("\\", "/").removeprefix("./")
        bare = str(PurePosixPath(short).with_suffix("")) if PurePosixPath(short).name else short
        tries = [*((forms, short) for forms in known), *((forms, bare) for forms in known[:2])]
        rows: list[int] = next((forms[form] for forms, form in tries if form in forms), [])
        if len(rows) > 1:
            first, second = (names[row] for row in rows[:2])
            raise ValueError(
                f"the captions name an image {name!r}, which is {first} or {second}; write its folder and ending"
            )
        if rows:
            found[rows[0]] += texts
        else:
            lost.append(name)
    return found, lost


def _table(path: Path, delimiter: str) -> Iterator[tuple[str, str, str]]:
    # A quoted caption may have line breaks, so the csv module reads the text, not single lines.
    reader = csv.DictReader(io.StringIO("".join(text_lines(path)), newline=""), delimiter=delimiter, strict=True)
    with damaged(f"{path} cannot be read as a table with quotes"):
        columns = reader.fieldnames or []
    if not {"image", "caption"} <= set(columns):
        raise ValueError(
            f"{path}: the first line must name the columns image and caption"
            f"{' with a tab' if delimiter != ',' else ' with a comma'} between them, and has {', '.join(columns)[:200]}"
        )
    while True:
        with damaged(f"{path}, line {reader.line_num + 1}: cannot be read as a row with quotes"):
            row = next(reader, None)
        if row is None:
            return
        where = f"line {reader.line_num}"
        if row["caption"] is None or None in row:
            raise ValueError(
                f"{path}, {where}: has {'fewer' if row['caption'] is None else 'more'} columns than the first line; "
                "put quotes around a caption that holds the separator"
            )
        yield where, _name(row["image"].strip(), path, where), row["caption"]


def _json(path: Path) -> Iterator[tuple[str, str, Any]]:
    with damaged(f"{path} is not JSON"):
        content = json.loads("".join(text_lines(path)))
    if isinstance(content, dict) and {"images", "annotations"} <= set(content):
        yield from _coco(path, content)
    elif isinstance(content, dict):
        for name, texts in content.items():
            for text in _texts(texts):
                yield f"image {name!r}", name, text
    elif isinstance(content, list):
        for number, entry in enumerate(content):
            where = f"entry {number}"
            if not isinstance(entry, dict) or not {"caption", "captions"} & set(entry):
                raise ValueError(f"{path}, {where}: has no caption; {_FORMS}")
            name = _name(next((entry[key] for key in _NAMES if key in entry), None), path, where)
            for text in _texts(entry.get("captions", entry.get("caption"))):
                yield where, name, text
    else:
        raise ValueError(f"{path}: {_FORMS}")


def _coco(path: Path, content: dict[str, Any]) -> Iterator[tuple[str, str, Any]]:
    names: dict[Any, str] = {}
    with damaged(f"{path} is no annotation file of COCO"):
        for number, entry in enumerate(content["images"]):
            names[entry["id"]] = _name(entry["file_name"], path, f"images[{number}]")
        annotations = [(entry["image_id"], entry["caption"]) for entry in content["annotations"]]
    for number, (image, text) in enumerate(annotations):
        if image not in names:
            raise ValueError(f"{path}, annotations[{number}]: there is no image with the id {image!r}")
        yield f"annotations[{number}]", names[image], text


def _texts(texts: Any) -> Iterable[Any]:
    return texts if isinstance(texts, list) else [texts]


def _name(name: Any, path: Path, where: str) -> str:
    if isinstance(name, int) and not isinstance(name, bool):
        return str(name)
    if not isinstance(name, str) or not name:
        raise ValueError(f"{path}, {where}: names no image, got {name!r}")
    return name
