"""The first stage of a two-stage search: the cosine of an image's mean region and a caption's mean word.

This is the score of `DualEncoder`. The means of a SCAN checkpoint rank much as its scores do. Those of models that
learn a head on top of the cosines (SGRAF, SHAN, ...) do not, so these need the vectors of a SCAN or DualEncoder
checkpoint.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray

from ..evaluation.encoding import device_of, evaluation_mode, weights_checksum
from . import files
from .identity import require_words
from .measured import Measured
from .scoring import Captions

if TYPE_CHECKING:
    from ..models import Loaded

MANY = 1_000_000  # images above which faiss is used, if it is installed
_CHUNK = 1 << 26  # cosines in memory at once


class Index(Protocol):
    """What a first stage is searched with, such as an index of faiss."""

    def search(self, queries: NDArray[np.float32], k: int, /) -> tuple[Any, Any]:
        """Scores and row numbers [T, k] of the k vectors with the largest products with queries [T, D'], best first;
        a row number is -1 where fewer were found."""


def usable(first: Loaded) -> bool:
    """Whether a model's pooled vectors can be a first stage."""
    from ..models.dual_encoder import DualEncoder
    from ..models.scan import SCAN

    return isinstance(first.model, (SCAN, DualEncoder))


def require_usable(first: Loaded) -> None:
    """Refuse a first stage of another model."""
    if not usable(first):
        raise ValueError(
            f"first must be a SCAN or DualEncoder checkpoint, got {first.name}: pooled vectors of a model with a head "
            "on top of the cosines find few of its best images"
        )


def write(
    folder: Path,
    about: files.About,
    first: Loaded,
    produce: files.Produce,
    source: str,
    step: int,
    progress: bool,
) -> None:
    """Write the pooled vectors of all images, unless they are there.

    Args:
        folder, about: of the gallery.
        first: the model that they are of.
        produce: `produce(start, stop)` returns these images' vectors [n, D'], and what they are computed from.
        source: what the checksum of all that they are computed from must be.
        step: images whose vectors are computed at once.
        progress: show a bar on standard error.

    Raises:
        ValueError: the images are others than those of the gallery.
        OSError, KeyboardInterrupt: as `files.write_rows`.
    """
    path = _path(folder, first)
    if path.with_suffix(".json").exists():
        return
    dim = produce(0, 1)[0].shape[1]
    shape, identity = (about.images, dim), {"first checkpoint": path.stem, "images": source}
    _, read = files.write_rows(
        path, shape, "float32", identity, produce, step=step, what="pooled vectors", progress=progress
    )
    if read != source:
        path.unlink()
        files.finished(path)
        raise ValueError(f"{folder} is a gallery of other images than those given: their features differ")
    files.write_json(path.with_suffix(".json"), {"first": first.name, "dim": dim})
    files.finished(path)


def of_images(first: Loaded, image: torch.Tensor, lengths: torch.Tensor | None) -> NDArray[np.float32]:
    """The pooled vectors [n, D'] of images [n, R, D'], of length 1."""
    from ..models.dual_encoder import MeanCosine

    device = device_of(first.model.img_enc)
    lengths = None if lengths is None else lengths.to(device)
    with torch.no_grad():
        return MeanCosine().image_state(image.to(device), lengths)[1].float().cpu().numpy()


def _of_captions(first: Loaded, captions: Captions) -> NDArray[np.float32]:
    """The pooled vectors [T, D'] of captions, of length 1."""
    from ..models.dual_encoder import MeanCosine

    device = device_of(first.model.img_enc)
    with evaluation_mode(first.model.txt_enc), torch.no_grad():
        state = MeanCosine().caption_state(captions.words.to(device), captions.cu_seqlens.to(device))
    return state[0].float().cpu().numpy()


def _path(folder: Path, first: Loaded) -> Path:
    """Where the vectors by this model's image encoder are kept."""
    return folder / f"pooled-{weights_checksum(first.model.img_enc)}.npy"


def _open_vectors(folder: Path, about: files.About, first: Loaded) -> NDArray[np.float32]:
    path = _path(folder, first)
    if not path.with_suffix(".json").exists():
        raise ValueError(
            f"{folder} has no pooled vectors of this {first.name} checkpoint; build it again from the same images with "
            "first= (--first): what is there is kept"
        )
    dim = files.read_json(path.with_suffix(".json")).get("dim")
    if type(dim) is not int:
        raise ValueError(
            f"{path.with_suffix('.json')} is damaged; delete it and build the gallery again: its rows stay"
        )
    return files.open_rows(path, (about.images, dim), "float32")


class ProductIndex:
    """All products, in parts; exact, and the index unless there are more than a million images.

    >>> index = ProductIndex(np.eye(4, 3, dtype=np.float32), torch.device("cpu"))
    >>> index.search(np.array([[0.1, 0.9, 0.2]], np.float32), 2)[1]
    array([[1, 2]])
    """

    name = "all products"

    def __init__(self, vectors: NDArray[np.float32], device: torch.device) -> None:
        # On a device all vectors stay there; on the CPU they stay on the disk and are read part by part.
        self._vectors: Any = vectors if device.type == "cpu" else torch.from_numpy(np.array(vectors)).to(device)
        self._device = device

    def search(self, queries: NDArray[np.float32], k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """As `Index.search`."""
        asked = torch.from_numpy(queries).to(self._device)
        best: tuple[torch.Tensor, torch.Tensor] | None = None
        step = max(1, _CHUNK // max(1, len(queries), queries.shape[1]))
        for start in range(0, len(self._vectors), step):
            part = self._vectors[start : start + step]
            if isinstance(part, np.ndarray):
                part = torch.from_numpy(np.array(part))
            scores, items = (asked @ part.T).topk(min(k, len(part)))
            items += start
            if best is not None:
                scores, items = torch.cat([best[0], scores], 1), torch.cat([best[1], items], 1)
                scores, order = scores.topk(min(k, scores.shape[1]))
                items = items.gather(1, order)
            best = scores, items
        assert best is not None
        return best[0].cpu().numpy(), best[1].cpu().numpy()


class FaissIndex:
    """faiss' inverted lists: a sixteenth of the vectors is compared with a query; made anew in each process.

    Args:
        vectors: [I, D'], of length 1.
    """

    name = "faiss"

    def __init__(self, vectors: NDArray[np.float32]) -> None:
        import faiss

        lists = max(1, int(4 * len(vectors) ** 0.5))
        kind = f"IVF{lists},Flat"
        self._index = cast(Any, faiss.index_factory(vectors.shape[1], kind, faiss.METRIC_INNER_PRODUCT))
        self._index.nprobe = max(1, lists // 16)
        rng = np.random.default_rng(0)
        sample = np.sort(rng.choice(len(vectors), min(len(vectors), 64 * lists), replace=False))
        self._index.train(np.array(vectors[sample]))
        for start in range(0, len(vectors), 1 << 16):
            self._index.add(np.array(vectors[start : start + (1 << 16)]))

    def search(self, queries: NDArray[np.float32], k: int) -> tuple[Any, Any]:
        """As `Index.search`."""
        return self._index.search(queries, k)


def index_over(vectors: NDArray[np.float32], device: torch.device) -> ProductIndex | FaissIndex:
    """The index for this many vectors: all products, or faiss above a million if it is installed."""
    if len(vectors) > MANY and device.type == "cpu" and find_spec("faiss") is not None:
        return FaissIndex(vectors)
    return ProductIndex(vectors, device)


class Stage:
    """A first stage: a checkpoint, and the index over the pooled vectors that its image encoder gives.

    Args:
        folder, about: of the gallery.
        first: the checkpoint.
        index: the caller's; None: one over the gallery's own vectors.

    Attributes:
        first, index: as given, or the gallery's own.
        name: of the index.
        key: tells this stage from others, in the file of measured recalls.
        measured: what was measured with the caller's index, which has no name in that file; else None.

    Raises:
        ValueError: the gallery has no vectors of this checkpoint, or they are damaged.
    """

    def __init__(self, folder: Path, about: files.About, first: Loaded, index: Index | None) -> None:
        self.first, self._images = first, about.images
        self.index: Index = index or index_over(_open_vectors(folder, about, first), device_of(first.model.img_enc))
        self.name: str = getattr(self.index, "name", type(self.index).__name__)
        encoders = weights_checksum(first.model.img_enc, first.model.txt_enc)
        self.key = f"{encoders} {require_words(first).checksum()} {self.name}"
        self.measured = None if index is None else Measured(None)

    def search(self, captions: Captions, candidates: int, k: int) -> list[NDArray[np.int64]]:
        """The candidates of each caption, each once and at least k.

        Raises:
            ValueError: an index found too few, or row numbers that are not of this gallery.
        """
        queries = _of_captions(self.first, captions)
        found = np.asarray(self.index.search(queries, candidates)[1])
        if found.shape[:1] != (len(queries),) or found.ndim != 2 or not np.issubdtype(found.dtype, np.integer):
            raise ValueError(
                f"index.search must return scores and row numbers [{len(queries)}, {candidates}], got row numbers "
                f"{found.dtype} {list(found.shape)}"
            )
        if not -1 <= found.min(initial=-1) <= found.max(initial=-1) < self._images:
            raise ValueError(
                f"index.search returned rows {found.min()} to {found.max()}, and the gallery has {self._images:,} "
                "images: the index is of another gallery"
            )
        rows = [np.unique(row[row >= 0]).astype(np.int64) for row in found]
        fewest = min(map(len, rows))
        if fewest < k:
            raise ValueError(
                f"the index found {fewest} images for a caption, and the {k} best are asked for; give more candidates"
            )
        return rows
