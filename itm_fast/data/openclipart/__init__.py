"""Public-domain pictures with captions: a test split, a vocabulary and three trained checkpoints.

`ATTRIBUTION.md` in this folder says where they come from, and `MANIFEST.json` has the SHA-256 sum of each file. The
scripts in `benchmarks/demo` of the repository made them. The folder has SCAN's form, so every command can read it:

    itm-fast evaluate --checkpoint FOLDER/saf.pth.tar --data FOLDER --split test

>>> from itm_fast.data import Vocabulary, open_split
>>> split = open_split(FOLDER, "test")
>>> split.features.shape[1:], len(split.captions) > len(split.features) > 500
((36, 128), True)
>>> len(Vocabulary.load(VOCABULARY)) > 500
True
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

FOLDER = Path(__file__).resolve().parent
VOCABULARY = FOLDER / "openclipart_vocab.json"
CHECKPOINTS = {name: FOLDER / f"{name}.pth.tar" for name in ("sgr", "saf", "scan")}
GRID = 6  # regions a side: region r is row r // GRID, column r % GRID of the picture
THUMBNAIL = 128  # pixels a side
_COLUMNS = 32


def thumbnails(images: list[int]) -> list[Image]:
    """Pictures of the test split, 128 x 128 pixels, on white.

    Args:
        images: row numbers of the split's features.

    Raises:
        IndexError: a number is out of range.

    >>> [picture.size for picture in thumbnails([0, 7])]
    [(128, 128), (128, 128)]
    """
    from PIL import Image

    found = []
    with Image.open(FOLDER / "test_thumbnails.jpg") as sheet:
        for number in images:
            top, left = number // _COLUMNS * THUMBNAIL, number % _COLUMNS * THUMBNAIL
            if not 0 <= top < sheet.height:
                raise IndexError(f"there is no thumbnail {number}; there are {sheet.height // THUMBNAIL * _COLUMNS}")
            found.append(sheet.crop((left, top, left + THUMBNAIL, top + THUMBNAIL)))
    return found
