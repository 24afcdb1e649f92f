"""Captions to tokens, as the published SCAN and SGRAF readers split them."""

from __future__ import annotations

import functools
import re
import string
import warnings
from collections.abc import Callable
from pathlib import Path

from .texts import caption_text

_LOWER = str.maketrans(string.ascii_uppercase, string.ascii_lowercase)
# A full stop inside a caption: but for stray quotes, nothing else in the word rules depends on where sentences end.
_SEVERAL = re.compile(r"""(?<!\.)\.(?=[^\w.])(?![\s\])}>"'\u00bb\u201d\u2019]*$)""")


def tokenize(text: str) -> list[str]:
    """Tokens of one caption, as `nltk.word_tokenize` finds them on the lower-cased text.

    Only A-Z are lowered: the published readers lower the caption's UTF-8 bytes. Without NLTK's punkt data, or with
    damaged ones, the same word rules run without splitting the caption into sentences; the tokens then differ only in
    captions of several sentences, where a full stop inside stays with its word. The first of these is warned of.

    >>> tokenize("A man's dog can't swim.")
    ['a', 'man', "'s", 'dog', 'ca', "n't", 'swim', '.']
    """
    return _word_tokenizer()(caption_text(text, "tokenize: text").translate(_LOWER))


@functools.cache
def _word_tokenizer() -> Callable[[str], list[str]]:
    from nltk.tokenize import word_tokenize

    try:
        word_tokenize("one. two.")
        return word_tokenize
    except MemoryError:
        raise
    except Exception as error:  # LookupError without the data; a damaged file decides what is raised
        reason = _why_no_punkt(error)
    tell = functools.cache(lambda: warnings.warn(reason, stacklevel=4))

    def without_sentences(text: str) -> list[str]:
        if _SEVERAL.search(text):
            tell()
        return word_tokenize(text, preserve_line=True)

    return without_sentences


def _why_no_punkt(error: Exception) -> str:
    import nltk

    places = (Path(root) / "tokenizers" / name for root in nltk.data.path for name in ("punkt_tab", "punkt_tab.zip"))
    found = next((place for place in places if place.exists()), None)
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    state = "are not installed" if found is None else f"in {found} cannot be read ({reason}; remove them)"
    return (
        f"NLTK's punkt data {state}: captions of several sentences, as 'a cat. it sits.', keep 'cat.' as one word, "
        "where the published tokens are 'cat' and '.'; `python -m nltk.downloader punkt_tab` installs the data"
    )
