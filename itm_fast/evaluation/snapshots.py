"""Snapshots of an evaluation in a folder, from which the same command goes on after an interruption."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._lock import Lock, LockedError
from .tally import Tally, named_blocks

NAME = "tally.npz"
_LOCK = "tally.lock"
PROCESS = "process-"  # begins the names of the folders in which other processes of the same run keep theirs
_EVERY = 60.0  # seconds between snapshots
_SHARE = 0.02  # of the time that writing snapshots may take, if they are large


class Snapshots:
    """The snapshot in a folder, which this process alone may write until `release`.

    Args:
        folder: created if it does not exist.

    Raises:
        LockedError: another run writes there.
        OSError: the folder cannot be written.
        ValueError: the snapshot there is damaged.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = Lock(self.folder / _LOCK, str(self.folder / NAME))
        self._tally: Tally | None = None
        self._written, self._took = time.monotonic(), 0.0

    def begin(self, make: Callable[[], Tally], identity: Mapping[str, str], about: dict[str, Any]) -> Tally:
        """The snapshot, or what `make` returns if there is none.

        Args:
            make: begins a tally.
            identity: what the snapshot must have.
            about: for the tally; `resumed` is set, and the `backends` of the snapshot are added.

        Raises:
            ValueError: the snapshot is damaged, or of another evaluation or part; the message says what differs.
        """
        path = self.folder / NAME
        if not path.exists():
            self._tally = make()
            return self._tally
        try:
            found = Tally.load(path)
        except ValueError as error:
            raise ValueError(f"{error}; delete it to begin again") from error
        theirs = {**found.identity, "--part": str(found.about.get("part"))}
        mine = {**identity, "--part": str(about["part"])}
        differing = [key for key in mine | theirs if mine.get(key) != theirs.get(key)]
        if differing:
            raise ValueError(
                f"{path} is of an evaluation with other {', '.join(differing)}; give another --state, or delete it to "
                "begin again"
            )
        about["resumed"] = bool(found.done.any())
        for ran, before in zip(about["backends"], found.about["backends"], strict=True):
            ran.update(before)
        found.about = about
        self._tally = found
        return found

    def collect(self) -> Tally:
        """Add what the other processes of a run have kept, write the sum, and delete their files.

        When a band is found to be too narrow, all processes begin again with a wider one. If they were killed then,
        what some have kept without it is dropped.

        Returns:
            The sum.

        Raises:
            ValueError: a file is damaged, or of another evaluation; the message names it.
        """
        assert self._tally is not None
        paths = sorted(self.folder.glob(f"{PROCESS}*/{NAME}"))
        for path in paths:
            try:
                other = Tally.load(path)
                if other.band > self._tally.band:
                    self._tally = self._tally.widened(other.band)
                # Without a block that is new it was added before an interruption.
                if np.any(other.done & ~self._tally.done) and other.band == self._tally.band:
                    self._tally.merge(other)
            except ValueError as error:
                raise ValueError(f"{path}: {error}; delete it to count its blocks again") from error
        self.save()
        for path in paths:
            path.unlink()
            with contextlib.suppress(LockedError, OSError):  # a process that has not ended removes its folder itself
                Lock(path.parent / _LOCK, str(path)).release()
                path.parent.rmdir()
        return self._tally

    def after(self, tally: Tally) -> None:
        """Write a snapshot if the last one is old."""
        self._tally = tally
        if time.monotonic() - self._written > max(_EVERY, self._took / _SHARE):
            self.save()

    def save(self) -> None:
        """Write a snapshot now."""
        assert self._tally is not None
        start = time.monotonic()
        self._tally.save(self.folder / NAME)
        self._written = time.monotonic()
        self._took = self._written - start

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Write a snapshot at the end; after an interruption its message says what is kept."""
        try:
            yield
        except KeyboardInterrupt as interrupt:
            raise type(interrupt)(f"interrupted; {self._kept()}: the same command goes on") from None
        self.save()

    def _kept(self) -> str:
        assert self._tally is not None
        if self._tally.whole:
            self.save()
            done = self._tally.done
            return f"{done.sum():,} of {len(done):,} blocks are kept in {self.folder}"
        return f"the last snapshot is kept in {self.folder}"  # the interruption came while a block was counted

    def release(self) -> None:
        """Let other processes write there; further calls do nothing."""
        self._lock.release()
        if self.folder.name.startswith(PROCESS):
            with contextlib.suppress(OSError):  # its snapshot is still there, as the run was not finished
                self.folder.rmdir()

    def __enter__(self) -> Snapshots:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def merged(folders: Sequence[str | os.PathLike[str]]) -> Tally:
    """The sum of the snapshots in these folders, which must have every block of one evaluation once.

    Raises:
        OSError: a folder has no snapshot, or it cannot be read.
        ValueError: a snapshot is damaged or of another evaluation, two have the same block, or a block is in none; the
            message names folders and blocks.
    """
    if not folders:
        raise ValueError("merge: name the folders of at least one snapshot")
    total, seen = None, list[tuple[Path, NDArray[np.bool_]]]()
    for folder in map(Path, folders):
        try:
            tally = Tally.load(folder / NAME)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise FileNotFoundError(
                f"{folder} is no --state folder of a part; run `--part k/n --state {folder}` first"
            ) from error
        for other, done in seen:
            if done.shape == tally.done.shape and np.any(done & tally.done):
                both = named_blocks(done & tally.done)
                raise ValueError(f"{other} and {folder} both have {both}; leave one of them out")
        seen.append((folder, tally.done.copy()))
        if total is None:
            total = tally
            continue
        try:
            total.merge(tally)
        except ValueError as error:
            raise ValueError(f"{seen[0][0]} and {folder} cannot be merged: {error}") from error
    assert total is not None
    if not total.done.all():
        names = ", ".join(str(folder) for folder, _ in seen)
        lacking = named_blocks(~total.done)
        raise ValueError(f"missing in {names}: {lacking} of {len(total.done)}; run the other parts first")
    return total
