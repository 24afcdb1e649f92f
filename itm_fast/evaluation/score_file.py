"""A score matrix on disk that survives an interruption.

While a run lasts, finished blocks stand one after another in `x.npy.partial`, and `x.npy.journal` names each with its
checksum; a block that is not named, or whose bytes do not match, is computed again. When all are there, `x.npy`
is put together row band by row band and renamed into place, `x.npy.json` tells what it was computed from, and
the other two go.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from .._files import atomic_write

STRIPE = 64  # rows put into the captions' own order at once


class ScoreFile:
    """The [I, T] float32 matrix at `path`, filled block by block.

    Args:
        path: the .npy file to make.
        shape: (I, T).
        order: [T] the caption behind each column of the blocks.
        block: (images, captions) of a block.
        identity: what the scores are computed from, as plain strings; compared on resume.
        resume: continue an interrupted run of the same identity, or take a finished file.

    Attributes:
        finished: whether `path` already holds the whole matrix.

    Raises:
        FileExistsError: a finished or interrupted file is there and `resume` is false.
        ValueError: it was computed from something else; names what differs.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        shape: tuple[int, int],
        order: NDArray[np.int64],
        block: tuple[int, int],
        identity: Mapping[str, str],
        resume: bool,
    ) -> None:
        self.path = score_path(path)
        self.shape, self.order, self.block, self.identity = shape, order, block, dict(identity)
        self._partial, self._journal, self._about = _neighbours(self.path)
        self._row_starts = range(0, shape[0], block[0])
        self._column_starts = range(0, shape[1], block[1])
        self._done: dict[int, int] = {}
        self.finished = False
        if self.path.exists():
            if not resume:
                raise FileExistsError(f"{self.path} exists; give another name, delete it, or resume to use it again")
            self._compare(self._about, _read_json(self._about).get("identity", {}))
            self.finished = True
        elif self._journal.exists():
            if not resume:
                raise FileExistsError(
                    f"{self.path} was begun and interrupted ({self._journal.name} is there); resume to continue it, or "
                    f"delete {self._partial.name} and {self._journal.name}"
                )
            self._reopen()
        else:
            self._write_header()

    @property
    def done(self) -> frozenset[int]:
        """Numbers of the blocks that need not be computed."""
        return frozenset(self._done)

    def rows(self, number: int) -> tuple[int, int]:
        """First image of block `number` and the one after its last."""
        start = self._row_starts[number % len(self._row_starts)]
        return start, min(start + self.block[0], self.shape[0])

    def columns(self, number: int) -> tuple[int, int]:
        """First column of block `number` (a position in `order`) and the one after its last."""
        start = self._column_starts[number // len(self._row_starts)]
        return start, min(start + self.block[1], self.shape[1])

    def write(self, number: int, scores: NDArray[np.float32]) -> None:
        """Keep a finished block, and only then say so in the journal."""
        raw = np.ascontiguousarray(scores, np.float32).tobytes()
        with open(self._partial, "r+b") as file:
            file.seek(self._offset(number))
            file.write(raw)
        checksum = zlib.crc32(raw)
        with open(self._journal, "a", encoding="utf-8") as file:
            file.write(f"{number} {checksum}\n")
        self._done[number] = checksum

    def finish(self) -> None:
        """Put the matrix together in the captions' own order and rename it into place."""
        count = len(self._row_starts) * len(self._column_starts)
        if len(self._done) != count:
            raise ValueError(f"{self.path}: {count - len(self._done)} of {count} blocks are missing")
        with atomic_write(self.path, "wb") as file:
            header = {"descr": "<f4", "fortran_order": False, "shape": self.shape}
            np.lib.format.write_array_header_1_0(file, header)
            place = np.argsort(self.order)
            with open(self._partial, "rb") as blocks:
                for start in range(0, self.shape[0], self.block[0]):
                    stop = min(start + self.block[0], self.shape[0])
                    for top in range(start, stop, STRIPE):
                        rows = self._stripe(blocks, top, min(top + STRIPE, stop))
                        file.write(np.take(rows, place, axis=1).data)
            with atomic_write(self._about) as about:
                json.dump({"identity": self.identity, "shape": list(self.shape)}, about, indent=1)
        self._partial.unlink()
        self._journal.unlink()

    def _stripe(self, blocks: IO[bytes], top: int, bottom: int) -> NDArray[np.float32]:
        """Rows top:bottom, which lie in one row of blocks, columns in the blocks' order."""
        rows = np.empty((bottom - top, self.shape[1]), "<f4")
        band = len(self._row_starts)
        for number in range(top // self.block[0], band * len(self._column_starts), band):
            first, last = self.columns(number)
            start, _ = self.rows(number)
            blocks.seek(self._offset(number) + 4 * (top - start) * (last - first))
            raw = blocks.read(4 * len(rows) * (last - first))
            rows[:, first:last] = np.frombuffer(raw, "<f4").reshape(len(rows), -1)
        return rows

    def _offset(self, number: int) -> int:
        first, last = self.columns(number)
        start, _ = self.rows(number)
        return 4 * (first * self.shape[0] + start * (last - first))

    def _read(self, number: int) -> NDArray[np.float32]:
        (start, stop), (first, last) = self.rows(number), self.columns(number)
        return np.fromfile(self._partial, "<f4", (stop - start) * (last - first), offset=self._offset(number))

    def _write_header(self) -> None:
        with open(self._partial, "wb") as file:
            file.truncate(4 * self.shape[0] * self.shape[1])
        with atomic_write(self._journal) as file:
            file.write(json.dumps({"identity": self.identity, "shape": self.shape, "block": self.block}) + "\n")

    def _reopen(self) -> None:
        with open(self._journal, encoding="utf-8") as file:
            header = json.loads(file.readline())
            lines = file.readlines()
        self._compare(self._journal, header["identity"])
        if tuple(header["shape"]) != self.shape or tuple(header["block"]) != self.block:
            raise ValueError(f"{self._journal} is of {header['shape']} scores, not {list(self.shape)}; delete it")
        if not self._partial.exists() or self._partial.stat().st_size != 4 * self.shape[0] * self.shape[1]:
            raise ValueError(
                f"{self._partial} does not hold what {self._journal.name} says; delete both and score again"
            )
        for line in lines:
            number, _, checksum = line.strip().partition(" ")
            if line.endswith("\n") and zlib.crc32(self._read(int(number)).tobytes()) == int(checksum):
                self._done[int(number)] = int(checksum)
        if lines and not lines[-1].endswith("\n"):  # cut off while it was written
            with open(self._journal, "a", encoding="utf-8") as file:
                file.write("\n")

    def _compare(self, source: Path, theirs: Mapping[str, str]) -> None:
        differing = [key for key in self.identity if theirs.get(key) != self.identity[key]]
        if differing:
            raise ValueError(
                f"{self.path} cannot be continued or used again: according to {source.name} it was computed with other "
                f"{', '.join(differing)}; give another name or delete it"
            )


def journal_block(path: str | os.PathLike[str]) -> tuple[int, int] | None:
    """The block size of an interrupted run at `path`, which its continuation must keep; None when there is none."""
    _, journal, _ = _neighbours(score_path(path))
    if not journal.exists():
        return None
    try:
        with open(journal, encoding="utf-8") as file:
            images, captions = json.loads(file.readline())["block"]
    except (ValueError, KeyError) as error:
        raise ValueError(f"{journal} is damaged ({error}); delete it and the .partial file beside it") from error
    return int(images), int(captions)


def score_path(path: str | os.PathLike[str]) -> Path:
    """`path`, refused unless it ends in .npy and its folder exists."""
    path = Path(path)
    if path.suffix != ".npy":
        raise ValueError(f"a score file is a .npy file, got {path}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"the folder of the score file does not exist: {path.parent}")
    return path


def _neighbours(path: Path) -> tuple[Path, Path, Path]:
    return tuple(path.with_name(path.name + end) for end in (".partial", ".journal", ".json"))  # type: ignore


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); delete it and the score file") from error
