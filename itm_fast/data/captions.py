"""Turn captions into word ids as the published data readers of SCAN and SGRAF do."""

from __future__ import annotations

from .tokens import tokenize
from .vocabulary import Vocabulary


def encode_caption(text: str, vocabulary: Vocabulary) -> list[int]:
    """The ids of `<start>`, of a caption's words and of `<end>`; unknown words get the id of `<unk>`.

    >>> vocabulary = Vocabulary.build(["a cat", "a dog"], min_count=2)
    >>> encode_caption("A zebra", vocabulary), encode_caption("", vocabulary)
    ([1, 4, 3, 2], [1, 2])
    """
    return [vocabulary("<start>"), *map(vocabulary, tokenize(text)), vocabulary("<end>")]
