"""The vocabulary of a model: build one, and read or write the JSON files of the published repositories."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable
from typing import Any

from .._files import atomic_write, open_regular
from . import pickled_vocabulary
from .texts import caption_texts, text_lines
from .tokens import tokenize

SPECIAL = ("<pad>", "<start>", "<end>", "<unk>")
_UNKNOWN = SPECIAL.index("<unk>")


class Vocabulary:
    """Words and their ids 0..n-1; the first four are `<pad>`, `<start>`, `<end>` and `<unk>`.

    Args:
        words: all words in the order of their ids, the four special ones first.

    Attributes:
        word2idx: word to id.
        idx2word: id to word.

    Raises:
        ValueError: the special words are not the first four, or a word appears twice.

    >>> vocabulary = Vocabulary(["<pad>", "<start>", "<end>", "<unk>", "cat"])
    >>> vocabulary("cat"), vocabulary("zebra"), len(vocabulary)
    (4, 3, 5)
    """

    def __init__(self, words: Iterable[str]) -> None:
        self.idx2word = dict(enumerate(words))
        self.word2idx = {word: i for i, word in self.idx2word.items()}
        start = tuple(self.idx2word.get(i) for i in range(len(SPECIAL)))
        if start != SPECIAL:
            raise ValueError(f"a vocabulary must begin with {', '.join(SPECIAL)} (ids 0 to 3), got {start}")
        if len(self.word2idx) != len(self.idx2word):
            twice = next(word for i, word in self.idx2word.items() if self.word2idx[word] != i)
            raise ValueError(f"a vocabulary names every word once, got {twice!r} twice")

    def __call__(self, word: str) -> int:
        """The word's id, or that of `<unk>`."""
        return self.word2idx.get(word, _UNKNOWN)

    def __len__(self) -> int:
        return len(self.word2idx)

    def checksum(self) -> str:
        """SHA-256 of the words in the order of their ids; it differs for different vocabularies.

        >>> Vocabulary.build(["a cat"], min_count=1).checksum()[:8]
        'ff328185'
        """
        return hashlib.sha256(json.dumps(list(self.idx2word.values())).encode()).hexdigest()

    @classmethod
    def build(cls, captions: Iterable[str], min_count: int = 4) -> Vocabulary:
        """Make a vocabulary of the words seen at least `min_count` times, in the order of their first appearance.

        The published vocabularies are built from the captions of the train and dev splits together.

        Args:
            captions: any captions; tokenised by `tokenize`.
            min_count: how often a word must appear, at least 1.

        Raises:
            ValueError: min_count is less than 1, or no word with a letter or digit appears that often.
            TypeError: a caption is not a text.

        >>> Vocabulary.build(["a cat", "a dog", "the cat"], min_count=2).idx2word
        {0: '<pad>', 1: '<start>', 2: '<end>', 3: '<unk>', 4: 'a', 5: 'cat'}
        """
        if not hasattr(min_count, "__index__") or min_count < 1:
            raise ValueError(f"min_count must be at least 1, got {min_count!r}")
        counts: Counter[str] = Counter()
        captions = caption_texts(captions, "Vocabulary.build: captions")
        for caption in captions:
            counts.update(tokenize(caption))
        words = [word for word, count in counts.items() if count >= min_count and word not in SPECIAL]
        if not any(character.isalnum() for word in words for character in word):
            raise ValueError(
                f"no word appears {min_count} times in these {len(captions)} captions, which have "
                f"{counts.total() / max(len(captions), 1):.1f} words each, so every word would be unknown; lower "
                "min_count (--min-count), and put spaces between the words where the language has none"
            )
        return cls([*SPECIAL, *words])

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Vocabulary:
        """Read a vocabulary file such as the published `f30k_precomp_vocab.json`.

        Args:
            path: JSON with `word2idx`, `idx2word` and `idx` (the number of words), or the older pickle of an object
                with these. Code in a pickle is not run.

        Raises:
            OSError: the file does not exist or is not a regular file.
            ValueError: the file is neither JSON nor such a pickle, is not a vocabulary, or its three parts disagree.
        """
        content = _content(path)
        kinds = (("word2idx", dict), ("idx2word", dict), ("idx", int))
        if not isinstance(content, dict) or not all(isinstance(content.get(key), kind) for key, kind in kinds):
            raise ValueError(
                f"{path} is not a vocabulary: it must hold objects word2idx and idx2word and a number idx, "
                "as the published vocab.py writes them"
            )
        word2idx, idx2word, n = content["word2idx"], content["idx2word"], content["idx"]
        words: list[Any] = [idx2word.get(str(i)) for i in range(n)] if n == len(idx2word) == len(word2idx) else [None]
        if not all(isinstance(word, str) and word2idx.get(word) == i for i, word in enumerate(words)):
            raise ValueError(
                f"{path} is not a consistent vocabulary: idx is {n}, and word2idx ({len(word2idx)} words) "
                f"and idx2word ({len(idx2word)} words) must name the same words with ids 0 to idx - 1"
            )
        try:
            return cls(words)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the published JSON form; the file is written completely or not at all.

        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Vocabulary.build(["a cat"], min_count=1).save(f"{folder}/vocab.json")
        ...     Vocabulary.load(f"{folder}/vocab.json").word2idx["cat"]
        5
        """
        with atomic_write(path) as file:
            json.dump({"word2idx": self.word2idx, "idx2word": self.idx2word, "idx": len(self)}, file)


def _content(path: str | os.PathLike[str]) -> Any:
    with open_regular(path) as file:
        head = file.read(1)
    if head in pickled_vocabulary.STARTS:
        return pickled_vocabulary.read(path)
    lines = text_lines(path)
    try:
        return json.loads("".join(lines))
    except (ValueError, RecursionError) as error:  # brackets nested too deeply
        raise ValueError(f"{path} is not a JSON file: {error}") from error
