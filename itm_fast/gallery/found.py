"""What a search returns, and the sentence with which it says whether it is exact."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_Z = 1.959964  # of a 95 % interval


@dataclass(frozen=True)
class Recall:
    """How many of the k images of exact search a two-stage search finds. It says nothing of how good the model is.

    Attributes:
        value: the mean over the sample of the share of the exact k best that was found, 0 to 1.
        low, high: 95 % interval of the mean.
        captions: size of the sample.
        k: how many best images are compared.
        candidates: images per caption that the second stage scores.
        images: images of the gallery.
        first: name of the checkpoint whose pooled vectors are the first stage.
        index: name of what they are searched with.
    """

    value: float
    low: float
    high: float
    captions: int
    k: int
    candidates: int
    images: int
    first: str
    index: str

    def __str__(self) -> str:
        return (
            f"{self.value:.1%} of the {self.k} best of exact search are found (95 % interval {self.low:.1%} to "
            f"{self.high:.1%}, {self.captions} sample captions)"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "of_exact_search": self.value, "low": self.low, "high": self.high, "confidence": 0.95,
            "sample_captions": self.captions, "k": self.k, "candidates": self.candidates, "images": self.images,
            "first": self.first, "index": self.index,
        }  # fmt: skip


def interval(share: float, captions: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a mean over captions of shares between 0 and 1.

    The shares of different captions are independent; those of the k images of one caption are not. A share has at most
    the variance of a yes or no with the same mean, so the interval is not too short.

    >>> [round(end, 3) for end in interval(0.99, 100)]
    [0.946, 0.998]
    """
    n, square = captions, _Z * _Z
    middle = (share + square / (2 * n)) / (1 + square / n)
    half = _Z / (1 + square / n) * math.sqrt(share * (1 - share) / n + square / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def share_found(exact: NDArray[np.int64], found: NDArray[np.int64]) -> float:
    """The mean over captions of the share of the exact images that were found: both [T, k].

    >>> share_found(np.array([[1, 2], [3, 4]]), np.array([[2, 7], [4, 3]]))
    0.75
    """
    return float(np.mean([len(np.intersect1d(a, b)) / len(a) for a, b in zip(exact, found, strict=True)]))


@dataclass(frozen=True, eq=False)
class Found:
    """The best images of each caption.

    Attributes:
        captions: T texts.
        images: int64 [T, k], row numbers of the gallery, best first; equal scores stand in the order of the rows.
        scores: float32 [T, k], the model's scores.
        names: T lists of k names; the row numbers if the gallery has no names.
        unknown: T lists of the words of each caption that the model does not know.
        model: name of the model.
        of: images of the gallery.
        seconds: the time of the search, without the measurement of its recall.
        recall: of a two-stage search, as measured; None if every image was scored.
    """

    captions: list[str]
    images: NDArray[np.int64]
    scores: NDArray[np.float32]
    names: list[list[str]]
    unknown: list[list[str]]
    model: str
    of: int
    seconds: float
    recall: Recall | None = None

    @property
    def approximate(self) -> bool:
        """Whether only candidates of a first stage were scored."""
        return self.recall is not None

    @property
    def how(self) -> str:
        """One sentence that says whether the search is exact, and if not, what is known of what it misses."""
        if self.recall is None:
            return f"exact: {self.model} scored all {self.of:,} images"
        return (
            f"APPROXIMATE: {self.model} scored {self.recall.candidates:,} of {self.of:,} images per caption, chosen by "
            f"the pooled vectors of {self.recall.first} ({self.recall.index}); {self.recall}"
        )

    def __repr__(self) -> str:
        return f"<{len(self.captions)} captions, {self.images.shape[1]} best images each; {self.how}>"

    def __str__(self) -> str:
        width = max((len(name) for row in self.names for name in row), default=0)
        lines = []
        for caption, unknown, names, scores in zip(self.captions, self.unknown, self.names, self.scores, strict=True):
            lines += [caption, *([f"      unknown to the model: {', '.join(unknown)}"] if unknown else [])]
            ranked = enumerate(zip(names, scores.tolist(), strict=True), 1)
            lines += [f"{rank:>4}  {name:<{width}}  {score:9.4f}" for rank, (name, score) in ranked]
        return "\n".join([*lines, self.how])

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; how the search was done comes first."""
        return {
            "approximate": self.approximate,
            "how": self.how,
            "recall_of_exact_search": None if self.recall is None else self.recall.to_dict(),
            "model": self.model,
            "images": self.of,
            "seconds": self.seconds,
            "results": [
                {
                    "caption": caption,
                    "unknown_words": unknown,
                    "found": [
                        {"image": int(image), "name": name, "score": float(score)}
                        for image, name, score in zip(images, names, scores, strict=True)
                    ],
                }
                for caption, unknown, images, names, scores in zip(
                    self.captions, self.unknown, self.images, self.names, self.scores, strict=True
                )
            ],
        }
