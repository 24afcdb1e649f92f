"""Pretrained word vectors, which training does not change."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..data import Vocabulary


def word_vectors(opt: argparse.Namespace, vocabulary: Vocabulary, progress: bool) -> Tensor | None:
    """The fixed vectors [vocab_size, E] from the file `opt.word_vectors`; None for a model or run without them."""
    if not hasattr(opt, "word_vectors"):
        return None
    if opt.word_vectors is None:
        if progress:
            print("no file of word vectors is given: all word vectors are learned", file=sys.stderr)
        return None
    from ..data import load_word_vectors

    vectors, found = load_word_vectors(opt.word_vectors, vocabulary)
    if progress:
        print(
            f"{opt.word_vectors} has {int(found.sum()):,} of {len(found):,} words, {vectors.shape[1]} numbers each; "
            "the other words have learned vectors only",
            file=sys.stderr,
        )
    return torch.from_numpy(vectors)
