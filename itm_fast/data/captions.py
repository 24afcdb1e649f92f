"""Captions to word ids, as the published SCAN and SGRAF readers do it."""

from __future__ import annotations

from .tokens import tokenize
from .vocabulary import Vocabulary


def encode_caption(text: str, vocabulary: Vocabulary) -> list[int]:
    """Word ids of one caption between those of `<start>` and `<end>`; unknown words become `<unk>`.

    >>> vocabulary = Vocabulary.build(["a cat", "a dog"], min_count=2)
    >>> encode_caption("A zebra", vocabulary), encode_caption("", vocabulary)
    ([1, 4, 3, 2], [1, 2])
    """
    return [vocabulary("<start>"), *map(vocabulary, tokenize(text)), vocabulary("<end>")]
