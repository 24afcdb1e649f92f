"""Check captions that a caller gives, and read the lines of text files."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

from .._files import open_regular

BOM = "\ufeff"  # byte-order mark, which some editors write at the start of a file; it is not part of a word
# Three times the longest captions of data sets with long descriptions. A file that has lost its line breaks is one long
# caption; the encoder would pad a whole batch to it, and take hours and all memory.
MOST_CHARACTERS = 10_000
_MARKS = re.compile(rf"\A[\s{BOM}]*{BOM}")


def caption_texts(captions: Any, argument: str) -> list[str]:
    """A list of str from any sequence of texts: list, tuple, numpy array, table column, generator.

    bytes are decoded as UTF-8, and byte-order marks before a caption are dropped.

    Args:
        captions: one text for each caption.
        argument: the argument's name in error messages.

    Raises:
        TypeError: `captions` is a single text or not a one-dimensional sequence, or an entry is not a text.
        ValueError: an entry is not valid UTF-8, has half a surrogate pair, or has more than 10,000 characters.

    >>> caption_texts(("a cat", b"a dog"), "captions")
    ['a cat', 'a dog']
    >>> caption_texts("a cat", "captions")
    Traceback (most recent call last):
    TypeError: captions must be a list of texts, got the single text 'a cat'; write ['a cat'] for one caption
    """
    if isinstance(captions, (str, bytes)):
        raise TypeError(
            f"{argument} must be a list of texts, got the single text {_short(captions)}; "
            f"write [{_short(captions)}] for one caption"
        )
    unordered = isinstance(captions, (Mapping, set, frozenset))
    if unordered or not isinstance(captions, Iterable) or getattr(captions, "ndim", 1) != 1:
        raise TypeError(f"{argument} must be a list of texts, one for each caption, got {_what(captions)}")
    return [caption_text(caption, argument, row) for row, caption in enumerate(captions)]


def caption_text(text: Any, argument: str, row: int | None = None) -> str:
    """Check one caption and return it as str; see `caption_texts`.

    Args:
        text: str, or UTF-8 bytes.
        argument: the argument's name in error messages.
        row: the caption's index in that argument; None if the argument is a single caption.
    """
    where = argument if row is None else f"{argument}[{row}]"
    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{where} is not UTF-8 ({error.reason}): {_short(text)}") from error
    if isinstance(text, str):
        if len(text) > MOST_CHARACTERS:
            raise ValueError(
                f"{where} has {len(text):,} characters, and a caption may have {MOST_CHARACTERS:,}; is a line break "
                f"missing? It begins {_short(text)}"
            )
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{where} holds {text[error.start]!r}, half of a surrogate pair; correct how the text was decoded"
            ) from error
        return without_marks(text)
    remedy = "leave that caption out, or give an empty text"
    if isinstance(text, Iterable):
        remedy = "give one flat list of texts; caption_to_image says which image each belongs to"
    raise TypeError(f"{where} must be a text (str), got {_what(text)}; {remedy}")


def without_marks(text: str) -> str:
    """Remove byte-order marks at the start of a text, and white space before them.

    >>> without_marks("\\ufeff \\ufeffdog"), without_marks(" dog")
    ('dog', ' dog')
    """
    return _MARKS.sub("", text)


def text_lines(path: str | os.PathLike[str]) -> list[str]:
    """The lines of a UTF-8 file with their line ends; byte-order marks at the start of a line are removed.

    Raises:
        OSError: the file cannot be opened, or is not a regular file.
        ValueError: the file is not UTF-8; the message names the line.
    """
    lines = []
    with open_regular(path) as file:
        for number, line in enumerate(file, 1):
            if number == 1 and line[:2] in (b"\xff\xfe", b"\xfe\xff"):
                raise ValueError(f"{path}, line 1: this is UTF-16 or UTF-32; convert the file to UTF-8")
            try:
                lines.append(without_marks(line.decode("utf-8")))
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{path}, line {number}: not UTF-8 ({error.reason}); convert the file to UTF-8"
                ) from error
            if b"\0" in line:
                raise ValueError(
                    f"{path}, line {number}: holds a NUL character, as UTF-16 and damaged files do; "
                    "convert the file to UTF-8"
                )
    return lines


def _short(text: str | bytes) -> str:
    return repr(text) if len(text) <= 60 else f"{text[:57]!r}..."


def _what(value: Any) -> str:
    name = type(value).__name__
    if value is None:
        return "None"
    if isinstance(value, (int, float)):
        return f"{name} {value!r}"
    if hasattr(value, "shape"):
        return f"{name} {list(value.shape)}"
    return f"{name} of {len(value)}" if hasattr(value, "__len__") else name
