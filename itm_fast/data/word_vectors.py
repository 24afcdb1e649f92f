"""Read pretrained word vectors: GloVe or word2vec text, word2vec binary, or a .npy array."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO, TypeAlias

import numpy as np
from numpy.typing import NDArray

from .._files import open_regular
from .stored import open_npy
from .texts import BOM
from .vocabulary import Vocabulary

Entries: TypeAlias = Iterator[tuple[bytes, Callable[[], NDArray[np.float32]]]]  # word, function that parses its numbers
_WANTED = "word vectors are GloVe or word2vec text (a word and its numbers a line), word2vec binary, or a .npy file"


def load_word_vectors(
    path: str | os.PathLike[str], vocabulary: Vocabulary
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Read the vectors of a vocabulary's words from a file, of which only these vectors are kept in memory.

    The content decides which form the file is. A .npy array [words, E] has a row for each id of the vocabulary. In the
    other forms each line, or binary record, is a word and its E numbers; word2vec begins with a line "words E", GloVe
    does not. If a word appears twice, its first vector is used.

    Args:
        path: the file, not compressed.
        vocabulary: the words; upper and lower case are different.

    Returns:
        Vectors float32 [len(vocabulary), E], zeros for words that the file lacks, and bool [len(vocabulary)], True for
        words that it has.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is of another form or damaged, has none of the words, or has a number that is not finite.

    >>> import tempfile
    >>> vocabulary = Vocabulary.build(["a cat", "a dog"], min_count=1)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = Path(f"{folder}/glove.txt").write_text("cat 1.5 2\\nfox 3 4\\n")
    ...     vectors, found = load_word_vectors(f"{folder}/glove.txt", vocabulary)
    >>> vectors[vocabulary("cat")].tolist(), int(found.sum())
    ([1.5, 2.0], 1)
    """
    path = Path(path)
    with open_regular(path) as file:
        head = file.read(1 << 16)
        if head.startswith(b"\x93NUMPY"):
            return _rows(path, vocabulary)
        if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise ValueError(f"{path}, line 1: this is UTF-16 or UTF-32; convert the file to UTF-8")
        mark = BOM.encode()
        file.seek(len(mark) if head.startswith(mark) else 0)
        head = head.removeprefix(mark)
        if not head.strip():
            raise ValueError(f"{path} is empty; {_WANTED}")
        first = head.split(b"\n", 1)[0].split()
        headed = len(first) == 2 and all(part.isdigit() for part in first)
        if headed and _is_binary(head, int(first[1])):
            entries = _binary(path, file, int(first[1]))
            size = int(first[1])
        else:
            size = int(first[1]) if headed else min(_trailing(first), len(first) - 1)
            if size < 1:
                raise ValueError(f"{path} does not begin with a word and its numbers; {_WANTED}")
            entries = _text(path, file, size, headed)
        vectors = np.zeros((len(vocabulary), size), np.float32)
        found = np.zeros(len(vocabulary), bool)
        for name, numbers in entries:
            index = vocabulary.word2idx.get(name.decode("utf-8", "replace"))
            if index is None or found[index]:
                continue
            vectors[index], found[index] = numbers(), True
    if not found.any():
        raise ValueError(f"{path} has none of the vocabulary's {len(vocabulary)} words; is it of another language?")
    return _finite(path, vectors, vocabulary), found


def _rows(path: Path, vocabulary: Vocabulary) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    array = open_npy(path)
    if array.ndim != 2 or len(array) != len(vocabulary) or not array.shape[1] or array.dtype.kind != "f":
        raise ValueError(
            f"{path} must hold numbers [words, E] with a row for each of the vocabulary's {len(vocabulary)} words, "
            f"got {array.dtype} {list(array.shape)}"
        )
    return _finite(path, array.astype(np.float32), vocabulary), np.ones(len(array), bool)


def _finite(path: Path, vectors: NDArray[np.float32], vocabulary: Vocabulary) -> NDArray[np.float32]:
    bad = np.flatnonzero(~np.isfinite(vectors).all(1))
    if len(bad):
        raise ValueError(f"{path}: the vector of {vocabulary.idx2word[int(bad[0])]!r} holds NaN or infinity")
    return vectors


def _is_binary(head: bytes, size: int) -> bool:
    """Whether word2vec's binary form follows the first line: the second line then does not end in numbers."""
    lines = head.split(b"\n", 2)
    return len(lines) < 2 or not _numbers(lines[1].split()[-size:])


def _numbers(parts: list[bytes]) -> bool:
    try:
        np.array(parts, dtype="S").astype(np.float64)
    except ValueError:
        return False
    return True


def _trailing(parts: list[bytes]) -> int:
    """How many of the last parts are numbers."""
    return next((n for n, part in enumerate(reversed(parts)) if not _numbers([part])), len(parts))


def _text(path: Path, file: BinaryIO, size: int, headed: bool) -> Entries:
    for n, line in enumerate(file, 1):
        if n == 1 and headed:
            continue
        parts = line.split()
        if not parts:
            continue
        if len(parts) <= size:
            raise ValueError(f"{path}, line {n}: must be a word and {size} numbers, got {len(parts)} parts")
        # GloVe's largest file names some "words" with spaces in them.
        yield b" ".join(parts[:-size]), partial(_parsed, path, n, parts[-size:])


def _parsed(path: Path, n: int, parts: list[bytes]) -> NDArray[np.float32]:
    try:
        return np.array(parts, dtype="S").astype(np.float64).astype(np.float32)
    except ValueError:
        raise ValueError(f"{path}, line {n}: {len(parts)} numbers must follow the word") from None


def _binary(path: Path, file: BinaryIO, size: int) -> Entries:
    count, buffer = int(file.readline().split()[0]), b""
    for n in range(count):
        while (at := buffer.find(b" ")) < 0 or len(buffer) < at + 1 + 4 * size:
            more = file.read(1 << 20)
            if not more:
                raise ValueError(f"{path} ends within record {n + 1} of {count}; download it again")
            buffer += more
        # Some writers end a record with a newline, some do not.
        yield buffer[:at].lstrip(b"\n"), partial(_floats, buffer, size, at + 1)
        buffer = buffer[at + 1 + 4 * size :]


def _floats(buffer: bytes, size: int, start: int) -> NDArray[np.float32]:
    return np.frombuffer(buffer, np.dtype("<f4"), size, start).astype(np.float32)
