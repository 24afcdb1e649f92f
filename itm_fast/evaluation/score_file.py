"""A score matrix on disk that survives an interruption, has one writer, and is checked before it is used again.

While a run lasts, `x.npy.partial` has the form of the whole matrix already, and `x.npy.journal` names each finished
block with its checksum; a block that is not named, or whose bytes do not match, is computed again. When all are
there, `x.npy.json` tells what the matrix was computed from, with a checksum for each band of rows, and the partial
file is renamed to `x.npy`. So the disk never holds the matrix twice. `x.npy.lock` is held by the process that writes.
"""

from __future__ import annotations

import contextlib
import errno
import io
import itertools
import json
import os
import re
import warnings
import zlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._files import FULL, atomic_write, open_regular, reserve
from .score_claim import Claim, megabytes, read_about

STRIPE = 64  # rows handled at once
_LINE = re.compile(rb"(\d{1,18}) (\d{1,10})")  # of the journal: block number, checksum


class ScoreFile:
    """The [I, T] float32 matrix at `path`, filled block by block.

    Args:
        path: the .npy file to make, or a `Claim` on it.
        shape: (I, T).
        column: [T] the column of the blocks that holds the scores of caption t; identical captions share one.
        block: (images, columns) of a block. Blocks are numbered along the columns first.
        identity: what the scores are computed from, as plain strings; a file that is resumed must have the same.
        resume: continue an interrupted file or reuse a finished one. If `path` is a `Claim`, that decides.

    Attributes:
        finished: whether `path` holds the whole matrix.

    Raises:
        FileExistsError: a finished or interrupted file exists and `resume` is false.
        LockedError: another run writes there.
        ValueError: the file that exists was computed from something else (the message says what differs), or its
            journal or description is damaged.
        OSError: the disk has no room for the matrix, or it cannot be written.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | Claim,
        shape: tuple[int, int],
        column: NDArray[np.integer],
        block: tuple[int, int],
        identity: Mapping[str, str],
        resume: bool = False,
    ) -> None:
        self._claimed_here = not isinstance(path, Claim)
        self.claim = path if isinstance(path, Claim) else Claim(path, resume, identity)
        self.path = self.claim.path
        self.shape, self.block, self.identity = (int(shape[0]), int(shape[1])), tuple(block), dict(identity)
        self._captions = np.argsort(column, kind="stable")  # [T] by column
        self._column = np.asarray(column)[self._captions]
        self._row_starts = range(0, self.shape[0], block[0])
        self._column_starts = range(0, int(self._column[-1]) + 1, block[1])
        self._header = npy_header(self.shape)
        self._size = len(self._header) + 4 * self.shape[0] * self.shape[1]
        self._done: dict[int, int] = {}
        self._open, self._files = contextlib.ExitStack(), dict[Path, Any]()
        self.finished = False
        try:
            if self.path.exists():
                self._use_again()
            elif self.claim.journal.exists():
                self._reopen()
            else:
                self._begin()
        except BaseException:
            self.release()
            raise

    @property
    def done(self) -> frozenset[int]:
        """Numbers of the blocks that need not be computed."""
        return frozenset(self._done)

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return len(self._row_starts) * len(self._column_starts)

    def rows(self, number: int) -> tuple[int, int]:
        """First image of block `number` and the one after its last."""
        start = self._row_starts[number // len(self._column_starts)]
        return start, min(start + self.block[0], self.shape[0])

    def write(self, number: int, scores: NDArray[np.float32]) -> None:
        """Write a block into the matrix, and then its checksum into the journal.

        Raises:
            LockedError: the files on the disk are no longer those of this run.
            OSError: they cannot be written.
        """
        self._require_own()
        start, stop = self.rows(number)
        captions, columns = self._places(number)
        checksum = 0
        for top in range(start, stop, STRIPE):
            stripe = np.take(scores[top - start : top - start + STRIPE], columns, axis=1).astype("<f4", copy=False)
            self._matrix[top : top + len(stripe), captions] = stripe
            checksum = zlib.crc32(stripe.data, checksum)
        line = b"%d %d\n" % (number, checksum)
        if self._files[self.claim.journal].write(line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.claim.journal))
        self._done[number] = checksum

    def finish(self) -> None:
        """Compare every block with its checksum once more and give the matrix its name.

        Raises:
            LockedError: as `write`.
            OSError: a block was changed on the disk, or something cannot be written.
            ValueError: blocks are missing.
        """
        if len(self._done) != self.blocks:
            raise ValueError(f"{self.path}: {self.blocks - len(self._done)} of {self.blocks} blocks are missing")
        self._require_own()
        self._matrix.flush()
        os.fsync(self._files[self.claim.partial].fileno())
        found = self._checksums(self._done)
        if found != self._done:
            self._done = {number: checksum for number, checksum in found.items() if self._done[number] == checksum}
            changed = self.blocks - len(self._done)
            raise OSError(f"{self.claim.partial}: {changed} blocks were changed on the disk after they were written")
        with atomic_write(self.claim.about) as about:
            json.dump({**self._about(), "checksums": self._bands(self._matrix)}, about, indent=1)
        self._require_own()
        os.replace(self.claim.partial, self.path)
        self.claim.journal.unlink()
        self.finished = True
        self._close()

    @contextlib.contextmanager
    def says_what_is_kept(self) -> Iterator[None]:
        """Add the number of blocks that are kept to the message of an interruption or a failed write."""
        try:
            yield
        except KeyboardInterrupt as interrupt:
            raise type(interrupt)(f"interrupted; {self._kept()}: resume (--resume) to go on") from None
        except OSError as error:
            room = "free some space and " if error.errno in FULL else ""
            why = os.strerror(error.errno) if error.errno else str(error)  # the reason without the file's name
            message = f"{why}; {self._kept()}: {room}resume (--resume) to go on"
            raise OSError(error.errno or 0, message, str(self.path)) from error

    def _kept(self) -> str:
        if self.finished:
            return f"{self.path} is finished and kept"
        return f"{len(self.done)} of {self.blocks} blocks are kept beside {self.path}"

    def release(self) -> None:
        """Close the files, and release the `Claim` if it was made here; further calls do nothing."""
        self._close()
        if self._claimed_here:
            self.claim.release()

    def __enter__(self) -> ScoreFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _use_again(self) -> None:
        """Use the finished file; if rows of it are damaged, turn it into an unfinished one that lacks them."""
        about = read_about(self.claim.about, self.path)
        self._compare(self.claim.about, about)
        with open_regular(self.path) as file:
            size = os.fstat(file.fileno()).st_size
            if size != self._size or file.read(len(self._header)) != self._header:
                raise ValueError(
                    f"{self.path} is damaged: it is not a float32 matrix {list(self.shape)} in {self._size:,} bytes; "
                    f"delete it and {self.claim.about.name}, and score again"
                )
            matrix = np.memmap(file, "<f4", "r", len(self._header), self.shape)
        kept = about.get("checksums")
        found = self._bands(matrix)
        if not isinstance(kept, list) or len(kept) != len(found):
            raise ValueError(
                f"{self.claim.about} is damaged (no checksum for each band of rows); delete it and {self.path.name}, "
                "and score again"
            )
        if kept == found:
            for left in (self.claim.journal, self.claim.partial):
                left.unlink(missing_ok=True)
            self.finished = True
            return
        wide = len(self._column_starts)
        good = [number for number in range(self.blocks) if kept[number // wide] == found[number // wide]]
        rows = [self.rows(band * wide) for band in range(len(found)) if kept[band] != found[band]]
        names = ", ".join(f"{start} to {stop - 1}" for start, stop in rows)
        warnings.warn(
            f"{self.path} is damaged: images {names} do not match their checksums and are scored again", stacklevel=2
        )
        self._matrix = matrix
        with atomic_write(self.claim.journal) as file:
            file.write(json.dumps(self._about()) + "\n")
            file.writelines(f"{number} {checksum}\n" for number, checksum in self._checksums(good).items())
        os.replace(self.path, self.claim.partial)
        self._reopen()

    def _begin(self) -> None:
        try:
            with open(self.claim.partial, "wb") as file:
                reserve(file, self._size)
            with atomic_write(self.claim.journal) as journal:
                journal.write(json.dumps(self._about()) + "\n")
        except BaseException as error:
            self.claim.partial.unlink(missing_ok=True)
            if isinstance(error, OSError) and error.errno in FULL:
                message = f"{os.strerror(error.errno)}; {megabytes(self._size)} are needed, and none of it was scored"
                raise OSError(error.errno, message, str(self.path)) from error
            raise
        self._attach()

    def _reopen(self) -> None:
        """Continue an unfinished file; a block counts as done if its bytes match its checksum in the journal."""
        partial, journal = self.claim.partial, self.claim.journal
        self._compare(journal, read_about(journal, self.path))
        if not partial.exists() or partial.stat().st_size != self._size:
            raise ValueError(f"{partial} does not hold what {journal.name} says; delete both and score again")
        self._attach()
        written = journal.read_bytes()
        if not written.endswith(b"\n"):  # cut off while it was written
            self._files[journal].write(b"\n")
        lines = (_LINE.fullmatch(line) for line in written.splitlines()[1:])
        said = {int(line[1]): int(line[2]) for line in lines if line}
        found = self._checksums({number for number in said if number < self.blocks})
        self._done = {number: checksum for number, checksum in found.items() if said[number] == checksum}

    def _attach(self) -> None:
        """Open the partial file and the journal for the whole run; files that replace them are never written."""
        for path, mode in ((self.claim.partial, "r+b"), (self.claim.journal, "ab")):
            self._files[path] = self._open.enter_context(open(path, mode, buffering=0))  # noqa: SIM115
        file = self._files[self.claim.partial]
        # If the disk is full, a write into a hole of a mapped file kills the process; a copied file may have holes.
        try:
            reserve(file, self._size)
        except OSError as error:
            message = f"{error.strerror}; {megabytes(self._size)} are needed: free some space and resume (--resume)"
            raise OSError(error.errno or 0, message, str(self.path)) from error
        file.write(self._header)
        self._matrix = np.memmap(file, "<f4", "r+", len(self._header), self.shape)

    def _close(self) -> None:
        self._matrix = None  # type: ignore[assignment]
        self._open.close()
        self._files = {}

    def _require_own(self) -> None:
        self.claim.check(self._files)

    def _about(self) -> dict[str, Any]:
        return {"identity": self.identity, "shape": list(self.shape), "block": list(self.block)}

    def _places(self, number: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The captions whose scores are in block `number`, and their columns within the block."""
        first = self._column_starts[number % len(self._column_starts)]
        here = slice(*np.searchsorted(self._column, (first, first + self.block[1])))
        return self._captions[here], self._column[here] - first

    def _checksums(self, numbers: Collection[int]) -> dict[int, int]:
        """The checksums of some blocks, computed from the bytes in the file."""
        found = dict.fromkeys(sorted(numbers), 0)
        for _, band in itertools.groupby(found, lambda number: number // len(self._column_starts)):
            chosen = list(band)
            captions = [self._places(number)[0] for number in chosen]
            ends = np.cumsum([len(places) for places in captions])
            start, stop = self.rows(chosen[0])
            for top in range(start, stop, STRIPE):
                stripe = np.take(self._matrix[top : min(top + STRIPE, stop)], np.concatenate(captions), axis=1)
                for number, part in zip(chosen, np.split(stripe, ends[:-1], axis=1), strict=True):
                    found[number] = zlib.crc32(np.ascontiguousarray(part).data, found[number])
        return found

    def _bands(self, matrix: NDArray[np.float32]) -> list[int]:
        """A checksum for each band, the rows that the blocks of one row of blocks share."""
        found = []
        for start in self._row_starts:
            checksum = 0
            for top in range(start, min(start + self.block[0], self.shape[0]), STRIPE):
                checksum = zlib.crc32(matrix[top : min(top + STRIPE, start + self.block[0])].data, checksum)
            found.append(checksum)
        return found

    def _compare(self, source: Path, theirs: Mapping[str, Any]) -> None:
        matrix = self.path if source == self.claim.about else self.claim.partial
        remedy = f"give another name, or delete {matrix.name} and {source.name}"
        keys = dict.fromkeys([*self.identity, *theirs["identity"]])
        differing = [key for key in keys if theirs["identity"].get(key) != self.identity.get(key)]
        if differing:
            raise ValueError(
                f"{self.path} cannot be continued or used again: according to {source.name} it was computed with other "
                f"{', '.join(differing)}; {remedy}"
            )
        mine = self._about()
        if any(theirs[key] != mine[key] for key in ("shape", "block")):
            raise ValueError(
                f"{source} is of {theirs['shape']} scores in blocks of {theirs['block']}, not of {mine['shape']} in "
                f"blocks of {mine['block']}; {remedy}"
            )


def npy_header(shape: tuple[int, int]) -> bytes:
    """The header of a .npy file with a float32 matrix of this shape.

    >>> len(npy_header((2, 3)))
    128
    """
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return file.getvalue()
