"""Captions by the name of their image: CSV, TSV, JSON, and the files of COCO, Karpathy's splits and Flickr30K."""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from ..data.stored import damaged
from ..data.texts import caption_text, text_lines

_NAMES = ("image", "file_name", "filename")  # of the entry that names the picture
_FORMS = (
    'it must be a list of {"image": NAME, "caption": TEXT} or {"image": NAME, "captions": [TEXT, ...]}, an object '
    "{NAME: [TEXT, ...]}, an annotation file of COCO, or a file of Karpathy's splits (dataset_coco.json)"
)
# The parts of Karpathy's splits that SCAN's data call train, dev, ...; any other split is the part of its name.
_PARTS = {"train": ("train", "restval"), "dev": ("val",), "testall": ("test",)}
_TOKEN = (".token", ".token.txt")  # results_20130124.token of Flickr30K, Flickr8k.token.txt


class Caption(NamedTuple):
    """One caption of an image.

    Attributes:
        text: the caption.
        id: COCO's id of the caption; None if there is none.
        image_id: COCO's id of its image; None if there is none.
    """

    text: str
    id: int | None = None
    image_id: int | None = None


def read_captions(
    path: str | os.PathLike[str], split: str | None = None
) -> tuple[dict[str, list[Caption]], int, bool]:
    """The captions of each image of a file.

    White space within a caption, line breaks included, becomes one space: in SCAN's folder a caption is one line.

    Args:
        path: a `.csv` or `.tsv` file with the columns `image` and `caption`; or a `.json` file: a list of
            `{"image": NAME, "caption": TEXT}` or `{"image": NAME, "captions": [TEXT, ...]}`, an object
            `{NAME: [TEXT, ...]}`, COCO's annotation file, or a file of Karpathy's splits, such as `dataset_coco.json`;
            or a `.token` or `.token.txt` file of Flickr30K, whose lines are `NAME#NUMBER`, a tab and a caption.
        split: of Karpathy's splits, which part is read: `train` is train and restval, `dev` is val, `testall` is test;
            None: all parts.

    Returns:
        Captions by the names of images, both in the order of the file; the number of empty captions left out; and
        whether the file is one of Karpathy's splits, whose order of images is part of the data set.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is of another form, or damaged, or has no such split; the message names the line or the entry.
        TypeError: a caption is not a text.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = open(f"{folder}/a.csv", "w").write("image,caption\\nkite.jpg,a red kite\\nkite.jpg,a kite\\n")
    ...     read_captions(f"{folder}/a.csv")[0]["kite.jpg"][1].text
    'a kite'
    """
    path = Path(path)
    kind = path.suffix.lower()
    ordered = False
    if path.name.lower().endswith(_TOKEN):
        rows = _token(path)
    elif kind == ".json":
        rows, ordered = _json(path, split)
    elif kind in (".csv", ".tsv"):
        rows = _table(path, "\t" if kind == ".tsv" else ",")
    else:
        raise ValueError(
            f"{path}: captions are read from a .csv, .tsv, .json, .token or .token.txt file, and this name ends in "
            f"{kind!r}"
        )
    found: dict[str, list[Caption]] = {}
    empty = 0
    for where, name, caption in rows:
        if "\0" in (text := caption_text(caption.text, f"{path}, {where}: the caption")):
            raise ValueError(f"{path}, {where}: the caption holds a NUL character; correct it")
        if text := " ".join(text.split()):
            found.setdefault(name, []).append(caption._replace(text=text))
        else:
            empty += 1
    if not found:
        raise ValueError(f"{path} holds no captions")
    return found, empty, ordered


def match(
    captions: Mapping[str, Sequence[Caption]], names: Sequence[str], files: Sequence[str] | None = None
) -> tuple[dict[int, list[Caption]], list[str]]:
    """Give each picture its captions.

    A name in the file of captions may have or lack the picture's folder, and its ending; it may also have an ending
    where the name in `names` has none, as those of arrays.

    Args:
        captions: by name, from `read_captions`.
        names: of the pictures, with their folders and endings.
        files: what messages call them; None: as `names`.

    Returns:
        The captions of pictures that have any, by the picture's place in `names`, in the order of `captions`; and the
        names of `captions` that are no picture's.

    Raises:
        ValueError: a name fits several pictures.

    >>> match({"kite": [Caption("a red kite")], "ball.png": [Caption("a ball")]}, ["toys/kite.jpg", "dog.jpg"])
    ({0: [Caption(text='a red kite', id=None, image_id=None)]}, ['ball.png'])
    """
    known: list[dict[str, list[int]]] = [{}, {}, {}, {}]
    for row, name in enumerate(names):
        pure = PurePosixPath(name)
        for forms, form in zip(known, (name, pure.name, str(pure.with_suffix("")), pure.stem), strict=True):
            forms.setdefault(form, []).append(row)
    found: dict[int, list[Caption]] = {}
    lost = []
    for name, own in captions.items():
        short = name.replace("\\", "/").removeprefix("./")
        bare = str(PurePosixPath(short).with_suffix("")) if PurePosixPath(short).name else short
        tries = [*((forms, short) for forms in known), *((forms, bare) for forms in known[:2])]
        rows: list[int] = next((forms[form] for forms, form in tries if form in forms), [])
        if len(rows) > 1:
            first, second = ((files or names)[row] for row in rows[:2])
            alike = names[rows[0]] == names[rows[1]]
            wanted = "remove one of the two files" if alike else "write its folder and ending"
            raise ValueError(f"the captions name an image {name!r}, which is {first} or {second}; {wanted}")
        if rows:
            found.setdefault(rows[0], []).extend(own)
        else:
            lost.append(name)
    return found, lost


_Rows = Iterator[tuple[str, str, Caption]]  # where it stands in the file, the image's name, the caption as it is there


def _token(path: Path) -> _Rows:
    for number, line in enumerate(text_lines(path), 1):
        name, tab, text = line.rstrip("\r\n").partition("\t")
        image, mark, index = name.rpartition("#")
        if not line.strip():
            continue
        if not (tab and mark and index.strip().isdecimal()):
            raise ValueError(
                f"{path}, line {number}: must be NAME#NUMBER, a tab and a caption, as in Flickr30K's "
                f"results_20130124.token, got {line[:80]!r}"
            )
        yield f"line {number}", _name(image.strip(), path, f"line {number}"), Caption(text)


def _table(path: Path, delimiter: str) -> _Rows:
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
        yield where, _name(row["image"].strip(), path, where), Caption(row["caption"])


def _json(path: Path, split: str | None) -> tuple[_Rows, bool]:
    """The captions, and whether the file is one of Karpathy's splits."""
    with damaged(f"{path} is not JSON"):
        content = json.loads("".join(text_lines(path)))
    if isinstance(content, dict) and {"images", "annotations"} <= set(content):
        return _coco(path, content), False
    if isinstance(content, dict) and isinstance(content.get("images"), list) and "dataset" in content:
        return _karpathy(path, content["images"], split), True
    return _plain(path, content), False


def _plain(path: Path, content: Any) -> _Rows:
    if isinstance(content, dict):
        for name, texts in content.items():
            for text in _texts(texts):
                yield f"image {name!r}", name, Caption(text)
    elif isinstance(content, list):
        for number, entry in enumerate(content):
            where = f"entry {number}"
            if not isinstance(entry, dict) or not {"caption", "captions"} & set(entry):
                raise ValueError(f"{path}, {where}: has no caption; {_FORMS}")
            name = _name(next((entry[key] for key in _NAMES if key in entry), None), path, where)
            for text in _texts(entry.get("captions", entry.get("caption"))):
                yield where, name, Caption(text)
    else:
        raise ValueError(f"{path}: {_FORMS}")


def _coco(path: Path, content: dict[str, Any]) -> _Rows:
    names: dict[Any, str] = {}
    with damaged(f"{path} is no annotation file of COCO"):
        for number, entry in enumerate(content["images"]):
            names[entry["id"]] = _name(entry["file_name"], path, f"images[{number}]")
        annotations = [(entry["image_id"], entry["caption"], entry.get("id")) for entry in content["annotations"]]
    # Other data sets in this form number their images anew; the names of COCO's files end in the ids.
    ends = {image: re.search(r"(\d+)\.\w+$", name) for image, name in names.items()}
    known = all(end is not None and int(end[1]) == image for image, end in ends.items())
    for number, (image, text, own) in enumerate(annotations):
        if image not in names:
            raise ValueError(f"{path}, annotations[{number}]: there is no image with the id {image!r}")
        ids = (own, image) if known and _whole(own) and _whole(image) else ()
        yield f"annotations[{number}]", names[image], Caption(text, *ids)


def _karpathy(path: Path, images: list[Any], split: str | None) -> _Rows:
    for number, entry in enumerate(images):
        for key in ("filename", "split", "sentences"):
            if not isinstance(entry, dict) or key not in entry:
                raise ValueError(f"{path}: images[{number}] has no `{key}`, and those of Karpathy's splits have one")
    entries = [(entry["filename"], str(entry["split"]), entry.get("cocoid"), entry["sentences"]) for entry in images]
    parts = {part for _, part, _, _ in entries}
    wanted = parts if split is None else parts & set(_PARTS.get(split, (split,)))
    if not wanted:
        raise ValueError(
            f"{path} has no images of a split {split!r}; it has {', '.join(sorted(parts)) or 'none'}, and `train` is "
            "train and restval, `dev` is val, `testall` is test"
        )
    for number, (name, part, image, sentences) in enumerate(entries):
        if part not in wanted:
            continue
        with damaged(f"{path}, images[{number}] has no sentences with the key raw"):
            texts = [(sentence["raw"], sentence.get("sentid")) for sentence in sentences]
        for text, own in texts:  # sentids are COCO's ids of the captions where there is a cocoid
            ids = (own, image) if _whole(own) and _whole(image) else ()
            yield f"images[{number}]", _name(name, path, f"images[{number}]"), Caption(text, *ids)


def _whole(number: Any) -> bool:
    return isinstance(number, int) and not isinstance(number, bool)


def _texts(texts: Any) -> Iterable[Any]:
    return texts if isinstance(texts, list) else [texts]


def _name(name: Any, path: Path, where: str) -> str:
    if isinstance(name, int) and not isinstance(name, bool):
        return str(name)
    if not isinstance(name, str) or not name:
        raise ValueError(f"{path}, {where}: names no image, got {name!r}")
    return name
