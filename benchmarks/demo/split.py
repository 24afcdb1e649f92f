"""Split pictures into train, dev and test such that nothing of one split is seen, or read, in another.

Two pictures are bound together, and so land in the same split, when their features nearly agree (the same drawing,
its copy, its recoloured copy), when they carry a caption of the same words, or when their file names differ only
in a number or in words such as "bw" (one author's series). Bound pictures form groups; a whole group goes to one
split. Groups of more than `LARGEST_HELD_OUT` pictures are collections and go to training, and so do the folders
`THEMES`, whose pictures are all alike but for a name or a number that nobody could tell from other pictures.
"""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence

import numpy as np
from openclipart import Picture

NEAR_DUPLICATE = 0.8
LARGEST_HELD_OUT = 6
THEMES = ("signs_and_symbols/led/", "special/patterns/", "computer/buttons/arrow-")
VARIANT_WORDS = frozenset(
    ("bw", "black", "and", "white", "colour", "color", "colored", "coloured", "simple", "big", "small", "left", "right",
     "up", "down", "the", "a")
)  # fmt: skip


def near_duplicates(features: np.ndarray, threshold: float = NEAR_DUPLICATE) -> list[tuple[int, int]]:
    """Pairs of pictures whose mean region features, less the mean of all, have a cosine above `threshold`."""
    pooled = features.mean(1, dtype=np.float64)
    pooled -= pooled.mean(0)
    pooled /= np.linalg.norm(pooled, axis=1, keepdims=True)
    cosine = np.triu(pooled @ pooled.T, 1)
    return [(int(first), int(second)) for first, second in np.argwhere(cosine > threshold)]


def caption_key(caption: str) -> str:
    """What two captions share when they say the same: their words, sorted, without numbers and words of a variant."""
    words = set(re.findall(r"[^\W\d_]+", caption))
    return " ".join(sorted(words - VARIANT_WORDS) or sorted(words))


def series_key(name: str) -> str:
    """File name without folder, numbers and words of a variant: equal in one author's series."""
    words = re.findall(r"[^\W\d_]+", name.rsplit("/", 1)[-1].lower())
    return " ".join(word for word in words if word not in VARIANT_WORDS) or name


def groups(pictures: Sequence[Picture], features: np.ndarray) -> list[list[int]]:
    """Connected components of bound pictures, as lists of indices, in the order of their first picture."""
    parent = list(range(len(pictures)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    for first, second in [*near_duplicates(features), *_sharing(_keys(pictures))]:
        first, second = sorted((root(first), root(second)))
        parent[second] = first
    members: dict[int, list[int]] = defaultdict(list)
    for index in range(len(pictures)):
        members[root(index)].append(index)
    return list(members.values())


def split(found: Sequence[Sequence[int]], test: int, dev: int, seed: int) -> dict[str, list[int]]:
    """Sorted picture indices of "train", "dev" and "test"; at least `test` and `dev` pictures are held out.

    Raises:
        ValueError: the groups small enough to be held out do not suffice.
    """
    order = [group for group in found if len(group) <= LARGEST_HELD_OUT]
    random.Random(seed).shuffle(order)
    parts: dict[str, list[int]] = {"test": [], "dev": []}
    for name, wanted in (("test", test), ("dev", dev)):
        while len(parts[name]) < wanted:
            if not order:
                raise ValueError(f"only {len(parts[name])} of the {wanted} pictures wanted for {name} are left")
            parts[name].extend(order.pop())
    held_out = set(parts["test"]) | set(parts["dev"])
    parts["train"] = [index for group in found for index in group if index not in held_out]
    return {name: sorted(indices) for name, indices in parts.items()}


def _keys(pictures: Sequence[Picture]) -> Iterable[tuple[int, Hashable]]:
    for index, picture in enumerate(pictures):
        yield index, ("series", series_key(picture.name))
        for theme in THEMES:
            if picture.name.startswith(theme):
                yield index, ("theme", theme)
        for caption in picture.captions:
            yield index, ("caption", caption_key(caption))


def _sharing(keys: Iterable[tuple[int, Hashable]]) -> Iterable[tuple[int, int]]:
    first: dict[Hashable, int] = {}
    for index, key in keys:
        if key in first:
            yield first[key], index
        else:
            first[key] = index
