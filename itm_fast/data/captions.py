"""Captions to tokens to word ids, as the published SCAN and SGRAF readers do it."""

from __future__ import annotations

import functools
import string
import warnings
from collections.abc import Callable

from .texts import caption_text
from .vocabulary import Vocabulary

_LOWER = str.maketrans(string.ascii_uppercase, string.ascii_lowercase)


def tokenize(text: str) -> list[str]:
    """Tokens of one caption, as `nltk.word_tokenize` finds them on the lower-cased text.

    Only A-Z are lowered: the published readers lower the caption's UTF-8 bytes. Without NLTK's punkt data
    the same word rules run without splitting the caption into sentences, and one warning says so; the tokens
    then differ only in captions of several sentences, where a full stop inside stays with its word.

    >>> tokenize("A man's dog can't swim.")
    ['a', 'man', "'s", 'dog', 'ca', "n't", 'swim', '.']
    """
    return _word_tokenizer()(caption_text(text, "tokenize: text").translate(_LOWER))


def encode_caption(text: str, vocabulary: Vocabulary) -> list[int]:
    """Word ids of one caption between those of `<start>` and `<end>`; unknown words become `<unk>`.

    >>> vocabulary = Vocabulary.build(["a cat", "a dog"], min_count=2)
    >>> encode_caption("A zebra", vocabulary), encode_caption("", vocabulary)
    ([1, 4, 3, 2], [1, 2])
    """
    return [vocabulary("<start>"), *map(vocabulary, tokenize(text)), vocabulary("<end>")]


@functools.cache
def _word_tokenizer() -> Callable[[str], list[str]]:
    from nltk.tokenize import word_tokenize

    try:
        word_tokenize("one. two.")
    except LookupError:
        warnings.warn(
            "NLTK's punkt data are not installed, so captions are not split into sentences before words: "
            "'a cat. it sits.' gives 'cat.' where the published tokens are 'cat' and '.'; "
            "`python -m nltk.downloader punkt_tab` installs them",
            stacklevel=3,
        )
        return functools.partial(word_tokenize, preserve_line=True)
    return word_tokenize
