"""What each query's rank follows from, kept in a small file, so that two runs can be compared query by query."""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .._files import atomic_write, require_regular
from .counting import Counts, Standings
from .tie_rules import chance_at, hit_probability, ranks_by

RANKS = "ranks.npz"
_FORMAT = 1


@dataclass(frozen=True, eq=False)
class KeptRanks:
    """The counts of one evaluation, by model.

    Attributes:
        names: the models, the ensemble last.
        counts: of each of them.
        pairs: int64 [2, P], the right pairs: images, captions.
        data: checksum of the captions' texts; "" if they are not known.
        path: the file that they were read from, or "".
    """

    names: tuple[str, ...]
    counts: tuple[Counts, ...]
    pairs: NDArray[np.int64]
    data: str = ""
    path: str = ""

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write a compressed .npz of integers, completely or not at all: about 0.2 MB for COCO's 5,000 test images."""
        arrays = {
            "format": np.array(_FORMAT),
            "names": np.array(self.names),
            "data": np.array(self.data),
            "size": np.array([self.counts[0].images, self.counts[0].captions]),
            "pairs": self.pairs.astype(np.int32),
            "query_images": self.counts[0].query_images.astype(np.int32),
        }
        for number, found in enumerate(self.counts):
            for side in ("i2t", "t2i"):
                arrays[f"{side}_{number}"] = np.stack(getattr(found, side)).astype(np.int32)
        with atomic_write(path, "wb") as file:
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
        return Path(path)


def load_ranks(path: str | os.PathLike[str]) -> KeptRanks:
    """Read what `KeptRanks.save` wrote.

    Args:
        path: the file, or the folder of `itm-fast evaluate --output` that it lies in.

    Raises:
        OSError: there is no such file.
        ValueError: the file is not one of these, or is damaged.

    >>> import tempfile
    >>> from itm_fast.evaluation.counting import count
    >>> found = count(np.eye(3, dtype=np.float32), [0, 1, 2], "example")
    >>> kept = KeptRanks(("SCAN",), (found,), np.array([[0, 1, 2], [0, 1, 2]]))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = kept.save(f"{folder}/ranks.npz")
    ...     load_ranks(folder).counts[0].t2i.above
    array([0, 0, 0])
    """
    path = Path(path)
    if path.is_dir():
        path = path / RANKS
    require_regular(path)
    try:
        with np.load(path, allow_pickle=False) as file:
            if int(file["format"]) != _FORMAT:
                raise ValueError(f"format {file['format']}")
            images, captions = map(int, file["size"])
            names = tuple(map(str, file["names"]))
            query_images = file["query_images"].astype(np.int64)
            counts = []
            for number in range(len(names)):
                i2t, t2i = (Standings(*file[f"{side}_{number}"].astype(np.int64)) for side in ("i2t", "t2i"))
                if len(i2t.above) != len(query_images) or len(t2i.above) != captions:
                    raise ValueError("the sizes in it disagree")
                counts.append(Counts(i2t, t2i, query_images, images, captions))
            pairs = file["pairs"].astype(np.int64)
            if not counts or pairs.ndim != 2 or len(pairs) != 2:
                raise ValueError("the sizes in it disagree")
            return KeptRanks(names, tuple(counts), pairs, str(file["data"]), str(path))
    except (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(
            f"{path} is not the {RANKS} of `itm-fast evaluate --output`, or is damaged ({error}); evaluate again"
        ) from error


def texts_checksum(captions: Sequence[str]) -> str:
    """A checksum of captions, by which two runs know that they have the same ones.

    >>> texts_checksum(["a cat"]) == texts_checksum(["a dog"])
    False
    """
    checksum = 0
    for text in captions:
        checksum = zlib.crc32(text.encode(errors="surrogatepass") + b"\n", checksum)
    return f"{checksum:08x}"


def hits(side: Standings, k: int, ties: str) -> NDArray[np.float64]:
    """For each query, whether a right item is among the first k: 0 or 1, or its probability under "expected".

    >>> one = np.array([1])
    >>> side = Standings(np.array([0]), one, one, one, one)      # one wrong item has the right one's score
    >>> hits(side, 1, "pessimistic"), hits(side, 1, "optimistic"), hits(side, 1, "expected")
    (array([0.]), array([1.]), array([0.5]))
    """
    return hit_probability(side, k) if ties == "expected" else (ranks_by(side, ties) < k).astype(np.float64)


def recall_at(side: Standings, k: int, ties: str) -> float:
    """Recall at k in percent, to the bit that of `metrics`."""
    found = hits(side, k, ties)
    return 100.0 * float(found.mean()) if ties == "expected" else 100.0 * float(found.sum()) / len(found)


def chance(side: Standings, pool: int, k: int) -> float:
    """Recall at k, in percent, of a random order of a pool of this many items."""
    totals, times = np.unique(side.right_total, return_counts=True)
    return sum(chance_at(total[None], pool, k) * n for total, n in zip(totals, times)) / len(side.right_total)
