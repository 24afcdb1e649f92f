"""The share of the captions' words that a vocabulary lacks: large for a wrong vocabulary or another language."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .encoding import CaptionBatches

if TYPE_CHECKING:
    from ..data import Vocabulary

TOKENS = "unknown_tokens_percent"
CAPTIONS = "captions_without_known_word_percent"
_SUSPICIOUS = 20.0  # percent; the published vocabularies lack 1 to 2 % of the words of their test sets


def unknown_words(captions: CaptionBatches, vocabulary: Vocabulary) -> dict[str, float]:
    """Count the words that the vocabulary lacks, and warn if a share is 20 % or more.

    Args:
        captions: `list(caption_batches(split.captions, vocabulary))`.
        vocabulary: the model's vocabulary.

    Returns:
        Percentages: `unknown_tokens_percent` of all tokens, `<start>` and `<end>` left out, and
        `captions_without_known_word_percent` of all captions, empty ones included.

    >>> from itm_fast.data import Vocabulary, caption_batches
    >>> vocabulary = Vocabulary.build(["a cat", "a dog"], min_count=2)
    >>> with warnings.catch_warnings(action="ignore"):
    ...     unknown_words(list(caption_batches(["a zebra", "cats"], vocabulary)), vocabulary)
    {'unknown_tokens_percent': 66.66666666666667, 'captions_without_known_word_percent': 50.0}
    """
    tokens = unknown = count = lost = 0
    for _, ids, lengths in captions:
        absent = (ids == vocabulary("<unk>")).sum(1)
        words = ids.new_tensor(lengths) - 2
        tokens, unknown = tokens + int(words.sum()), unknown + int(absent.sum())
        count, lost = count + len(words), lost + int((absent == words).sum())
    found = {TOKENS: 100.0 * unknown / max(tokens, 1), CAPTIONS: 100.0 * lost / max(count, 1)}
    if max(found.values()) >= _SUSPICIOUS:
        warnings.warn(
            f"the vocabulary lacks {_percent(found[TOKENS])} of the captions' words, and {_percent(found[CAPTIONS])} "
            "of the captions have no word in it: are these captions and this vocabulary (--vocab) those that the model "
            "was trained for?",
            stacklevel=3,
        )
    return found


def unknown_words_line(settings: Mapping[str, Any]) -> str:
    """The report's line about unknown words, from its settings; "" if all words are known."""
    tokens, captions = settings.get(TOKENS, 0.0), settings.get(CAPTIONS, 0.0)
    if not tokens and not captions:
        return ""
    return f"unknown words: {_percent(tokens)} of the words; {_percent(captions)} of the captions have no known word"


def _percent(value: float) -> str:
    return f"{value:.1f} %" if value == 0 or value >= 0.05 else "under 0.1 %"
