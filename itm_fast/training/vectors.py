"""The fixed word vectors that a training run starts with."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..data import Vocabulary


def word_vectors(opt: argparse.Namespace, vocabulary: Vocabulary, progress: bool) -> Tensor | None:
    """The fixed vectors of a model that has them, from the file that its options name."""
    if not hasattr(opt, "word_vectors"):
        return None
    if opt.word_vectors is None:
        if progress:
            print("no file of word vectors is given: words are learned alone", file=sys.stderr)
        return None
    from ..data import load_word_vectors

    vectors, found = load_word_vectors(opt.word_vectors, vocabulary)
    if progress:
        print(
            f"{opt.word_vectors} has {int(found.sum()):,} of {len(found):,} words, {vectors.shape[1]} numbers each; "
            "the other words are learned alone",
            file=sys.stderr,
        )
    return torch.from_numpy(vectors)
