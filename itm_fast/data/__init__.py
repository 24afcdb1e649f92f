"""Precomputed region features, captions, vocabulary and batching.

On disk a data set is SCAN's folder of .npy and .txt files (`itm_fast.data.folder`) or one HDF5 file
(`itm_fast.data.hdf5`). `open_split` reads both, `save_splits` writes both, and `convert` turns one into the other.

>>> import tempfile
>>> import numpy as np
>>> split = Split(np.ones((2, 36, 8), np.float16), ["a cat", "a dog", "one dog"], np.array([0, 1, 1]))
>>> with tempfile.TemporaryDirectory() as folder:
...     save_splits(f"{folder}/pets.h5", {"test": split})
...     convert(f"{folder}/pets.h5", f"{folder}/pets")
...     open_split(f"{folder}/pets", "test").captions
['a cat', 'a dog', 'one dog']
"""

from .batching import Batch, TrainingBatches, caption_batches, image_batches
from .captions import encode_caption
from .split import Rows, Split
from .storage import convert, open_split, save_splits, split_names
from .tokens import tokenize
from .vocabulary import Vocabulary
from .word_vectors import load_word_vectors

__all__ = [
    "Batch",
    "Rows",
    "Split",
    "TrainingBatches",
    "Vocabulary",
    "caption_batches",
    "convert",
    "encode_caption",
    "image_batches",
    "load_word_vectors",
    "open_split",
    "save_splits",
    "split_names",
    "tokenize",
]
