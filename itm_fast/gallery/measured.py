"""The recall of two-stage searches on sample captions, measured once and kept in the gallery's recall.json."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import files
from .found import Recall

SAMPLE = 100  # captions
_KINDS = {"float": float, "int": int, "str": str}
_FIELDS = {field.name: _KINDS[str(field.type)] for field in dataclasses.fields(Recall)}


def drawn(captions: list[str]) -> list[str]:
    """A sample of distinct captions that are not blank, the same at every call.

    >>> drawn(["a cat", "", "a cat"])
    ['a cat']
    """
    distinct = [caption for caption in dict.fromkeys(captions) if caption.strip()]
    chosen = np.random.default_rng(0).permutation(len(distinct))[:SAMPLE]
    return [distinct[index] for index in np.sort(chosen)]


class Measured:
    """What was measured before, in this process or in another.

    Args:
        path: the gallery's recall.json; None keeps it in this process alone.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._kept: dict[str, Any] = {}
        if path is not None and path.exists():
            with contextlib.suppress(ValueError):  # damaged: measured again
                self._kept = files.read_json(path)

    def exact(self, key: str, k: int, search: Callable[[], NDArray[np.int64]]) -> NDArray[np.int64]:
        """The exact k best [n, k] of the sample captions that `key` names; `search` is called if they are not kept."""
        kept = self._kept.get(f"exact {key}")
        found = np.array(kept) if _table(kept) else np.empty((0, 0), np.int64)
        if found.shape[1] < k:
            found = search()
            self._keep(f"exact {key}", found.tolist())
        return found[:, :k]

    def recall(self, key: str, measure: Callable[[], Recall]) -> Recall:
        """The recall that `key` names; `measure` is called if it is not kept."""
        kept = self._kept.get(f"recall {key}")
        if isinstance(kept, dict) and {name: type(value) for name, value in kept.items()} == _FIELDS:
            return Recall(**kept)
        found = measure()
        self._keep(f"recall {key}", dataclasses.asdict(found))
        return found

    def _keep(self, key: str, value: Any) -> None:
        self._kept[key] = value
        if self._path is not None:
            with contextlib.suppress(OSError):  # a gallery that cannot be written to is measured in each process
                files.write_json(self._path, self._kept)


def _table(value: Any) -> bool:
    """Whether this is a list of lists of integers, all of one length."""
    if not isinstance(value, list) or not value or not all(isinstance(row, list) for row in value):
        return False
    return len({len(row) for row in value}) == 1 and all(type(item) is int for row in value for item in row)
