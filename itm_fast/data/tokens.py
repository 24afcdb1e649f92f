"""Split captions into tokens as the published data readers of SCAN and SGRAF do."""

from __future__ import annotations

import functools
import re
import string
import warnings
from collections.abc import Callable
from pathlib import Path

from .texts import caption_text

_LOWER = str.maketrans(string.ascii_uppercase, string.ascii_lowercase)
# A full stop that is not at the end of the caption. The tokens depend on where sentences end only there and, rarely, at
# unpaired quotes.
_SEVERAL = re.compile(r"""(?<!\.)\.(?=[^\w.])(?![\s\])}>"'\u00bb\u201d\u2019]*$)""")


def tokenize(text: str) -> list[str]:
    """Tokens of one caption, as `nltk.word_tokenize` finds them on the lower-cased text.

    Only A-Z are lowered: the published readers lower the caption's UTF-8 bytes. If NLTK's punkt data are missing or
    damaged, the caption is not split into sentences before its words are found. Tokens then differ only for captions of
    several sentences, whose inner full stops stay with their words; the first such caption gives a warning.

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
    except Exception as error:  # LookupError without the data, anything for damaged data
        reason = _why_no_punkt(error)
    warn_once = functools.cache(lambda: warnings.warn(reason, stacklevel=4))

    def without_sentences(text: str) -> list[str]:
        if _SEVERAL.search(text):
            warn_once()
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
