"""Named evaluation workloads of known size, so that a memory plan needs no data.

Caption lengths count NLTK Treebank tokens of the lower-cased captions, and `<start>` and `<end>`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_COCO_TESTALL = """
6:2 7:105 8:1292 9:4272 10:5281 11:4904 12:3530 13:2174 14:1291 15:805 16:441 17:293 18:186 19:125 20:72 21:46 22:42
23:33 24:29 25:16 26:14 27:9 28:5 29:3 30:6 31:4 32:3 34:2 35:3 36:1 37:1 38:3 43:2 45:2 47:1 48:1 50:1
"""
_F30K_TEST = """
2:2 3:2 4:10 5:33 6:113 7:239 8:338 9:442 10:443 11:484 12:441 13:400 14:383 15:330 16:269 17:184 18:174 19:126 20:94
21:87 22:76 23:68 24:37 25:32 26:36 27:26 28:22 29:24 30:15 31:11 32:8 33:13 34:1 35:1 36:5 37:4 38:5 39:2 40:3 41:1
42:2 43:2 44:1 45:3 49:1 51:2 52:1 54:1 55:1 59:1 75:1
"""


@dataclass(frozen=True)
class Workload:
    """Sizes of one published evaluation.

    Attributes:
        images: I.
        histogram: tokens -> captions, `<start>` and `<end>` not counted.
        regions: R.
        features: F, the size of a precomputed feature.
        dim: D.
        similarity: S.
    """

    images: int
    histogram: str
    regions: int = 36
    features: int = 2048
    dim: int = 1024
    similarity: int = 256

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Words per caption, `<start>` and `<end>` included, shortest first, [T].

        >>> len(WORKLOADS["coco-eval-5k"].lengths), int(WORKLOADS["coco-eval-5k"].lengths.sum())
        (25000, 331916)
        """
        pairs = [entry.split(":") for entry in self.histogram.split()]
        return np.repeat([int(tokens) + 2 for tokens, _ in pairs], [int(count) for _, count in pairs])


WORKLOADS = {
    "coco-eval-5k": Workload(5000, _COCO_TESTALL),
    "f30k-eval-1k": Workload(1000, _F30K_TEST),
}
