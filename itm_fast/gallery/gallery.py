"""`Gallery`: a folder of encoded images, and the images in it that score best with a caption."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..evaluation.boxes import warn_of_boxes
from ..evaluation.encoding import encode_captions
from . import files
from .building import build
from .found import Found, Recall, interval, share_found
from .identity import require_loaded, require_model, require_words
from .measured import Measured
from .pooled import Index, Stage, require_usable, usable
from .scoring import Captions, Images, search_all, search_among

if TYPE_CHECKING:
    from ..data import Rows, Split
    from ..models import Loaded

_GROUP = 1024  # captions that are encoded and searched together
_Result = tuple[NDArray[np.int64], NDArray[np.float32]]  # images and scores, [T, k]


class Gallery:
    """Images encoded by a model, in a folder, to be searched by captions.

    `Gallery.build` makes one and `Gallery.open` opens one; `search` finds the best images of captions. By default the
    model scores every image, so that the result is that of `itm_fast.evaluation`; with `candidates=N` it scores only N
    images per caption, which a first stage chooses, and the result says that it is approximate and what it misses.

    Attributes:
        path: the folder.
        model: the model, as `itm_fast.models.load` returns it.
        about: sizes and checksums.
        names: a name for each image, or None.

    >>> import tempfile
    >>> import itm_fast
    >>> from itm_fast.data.openclipart import CHECKPOINTS, FOLDER
    >>> model = itm_fast.models.load(CHECKPOINTS["scan"], "cpu")
    >>> features = itm_fast.data.open_split(FOLDER, "test").features[:50]
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     gallery = Gallery.build(model, features, f"{folder}/clipart", progress=False)
    ...     gallery.search(["a yellow duck", "a penguin"], k=3)
    <2 captions, 3 best images each; exact: SCAN t2i scored all 50 images>
    """

    def __init__(self, path: str | os.PathLike[str], model: Loaded) -> None:
        self.path, self.model = Path(path), require_loaded(model)
        self.about = files.read_about(self.path)
        require_model(self.path, self.about, model)
        rows = files.open_rows(self.path / files.ROWS, self.about.shape, self.about.dtype)
        self.names = files.open_names(self.path, self.about)
        lengths, boxes = files.open_region_lengths(self.path, self.about), files.open_boxes(self.path, self.about)
        self._images = Images(rows, lengths, model.model, boxes)
        self._measured = Measured(self.path / files.RECALL)
        self._stages: dict[tuple[int, int], Stage] = {}  # by the ids of `first` and `index`, which a `Stage` holds

    @classmethod
    def open(cls, path: str | os.PathLike[str], model: Loaded) -> Gallery:
        """Open a gallery; its images stay on the disk.

        Args:
            path: its folder.
            model: the checkpoint that it was built with, as `itm_fast.models.load` returns it.

        Warns if the model reads boxes and the gallery was built without, or the model was trained without and the
        gallery has some.

        Raises:
            FileNotFoundError: the folder is no gallery, or its build was interrupted.
            ValueError: it was built with another model, or a file is missing or damaged. Of the images' rows only the
                size is checked; `build` with the same images checks them whole.
        """
        opened = cls(path, model)
        warn_of_boxes(model.model, str(path), opened.about.boxes)
        return opened

    @classmethod
    def build(
        cls,
        model: Loaded,
        images: Split | Rows | NDArray[np.floating],
        path: str | os.PathLike[str],
        *,
        names: Sequence[str] | None = None,
        pictures: str | os.PathLike[str] | None = None,
        dtype: str = "float32",
        first: Loaded | None = None,
        batch_size: int = 128,
        progress: bool = True,
    ) -> Gallery:
        """Encode images into a folder, and open it.

        An interrupted build goes on when it is called again. If the gallery is finished and of the same images, its
        rows are read and compared with their checksum, and what is new is added: names, pictures, and the vectors of
        another `first`.

        Args:
            model: as `itm_fast.models.load` returns it.
            images: region features: a split, or [I, R, F]. Captions of a split are the sample on which the recall of
                two-stage searches is measured; nothing else is done with them.
            path: the folder; it is made if its parent exists.
            names: [I] a name for each image, such as its file's; None: the image ids of the split if it has some.
            pictures: the folder with the pictures of these names, for pages of results.
            dtype: "float32", or "float16" for half the size; scores then differ in the third or fourth digit.
            first: a SCAN or DualEncoder checkpoint whose pooled vectors are a first stage, for models other than these.
            batch_size: images encoded at once.
            progress: show bars on standard error.

        Returns:
            The gallery.

        Raises:
            ValueError: features do not fit the model; the folder is of another model or other images, or has other
                files; names do not fit; `first` is another kind of model; a value is not finite.
            LockedError: another process builds there.
            OSError: the disk has no room (this is checked first) or fails.
            KeyboardInterrupt: after Ctrl-C; the message says what is kept.
        """
        from ..data import Split

        # A split needs a caption; an empty one is in no sample.
        split = images if isinstance(images, Split) else Split(images, [""], [0], name="images")
        build(
            require_loaded(model), split, Path(path), names=names, pictures=pictures, dtype=dtype, first=first,
            batch_size=batch_size, progress=progress,
        )  # fmt: skip
        return cls(path, model)

    def __len__(self) -> int:
        return self.about.images

    def __repr__(self) -> str:
        return f"<Gallery {self.path}: {len(self):,} images encoded by {self.model.name}, {self.about.dtype}>"

    def search(
        self,
        captions: Sequence[str],
        k: int = 10,
        *,
        candidates: int | None = None,
        first: Loaded | None = None,
        index: Index | None = None,
        sample: Sequence[str] | None = None,
        memory_gb: float | None = None,
        progress: bool = False,
    ) -> Found:
        """Find the images that score best with each caption.

        Args:
            captions: T texts.
            k: how many images to return for each; cut to the number of images.
            candidates: None: score every image. Else score only as many, which the first stage finds: those whose mean
                region has the largest cosine with the caption's mean word. The result is then approximate.
            first: the SCAN or DualEncoder checkpoint whose vectors the first stage compares. A gallery of such a model
                needs none; one of another model must be built with this one.
            index: searched in place of the gallery's own pooled vectors by `first`: any object with
                `search(queries float32 [T, D'], candidates)` that returns scores and row numbers [T, candidates], as
                those of faiss do. None: all products; above a million images on the CPU faiss, if it is installed.
            sample: captions on which the recall of a two-stage search is measured, once; None: those of the split that
                the gallery was built from.
            memory_gb: budget for scoring, as for `itm_fast.evaluation.score_all`.
            progress: show bars on standard error.

        Returns:
            `Found`; `print` it.

        Raises:
            ValueError: a number is out of its range; a caption is blank; the model has no vocabulary; `first` is needed
                or of the wrong kind; there is no sample; or a score is not finite.
            TypeError: captions are not texts, or `k` or `candidates` is no int.
        """
        from ..data import tokenize

        texts, k = _texts(captions, "captions"), self._cut(k)
        start = time.perf_counter()
        if candidates is None:
            if first is not None or index is not None:
                raise ValueError("first and index are for a two-stage search; say how many candidates= it scores")
            recall = None
            images, scores = self._exact(texts, k, memory_gb, progress)
        else:
            recall = self.recall(
                k, candidates=candidates, first=first, index=index, sample=sample, memory_gb=memory_gb,
                progress=progress,
            )  # fmt: skip
            start = time.perf_counter()
            images, scores = self._two_stage(texts, k, candidates, self._stage(first, index), progress)
        names = [[self.name(image) for image in row] for row in images.tolist()]
        seconds = time.perf_counter() - start
        known = require_words(self.model).word2idx
        unknown = [[word for word in tokenize(text) if word not in known] for text in texts]
        return Found(texts, images, scores, names, unknown, self.model.name, len(self), seconds, recall)

    def recall(
        self,
        k: int = 10,
        *,
        candidates: int,
        first: Loaded | None = None,
        index: Index | None = None,
        sample: Sequence[str] | None = None,
        memory_gb: float | None = None,
        progress: bool = False,
    ) -> Recall:
        """Measure how many of the k best images of exact search a two-stage search finds.

        This is no recall of the model, whose right images nobody looks at here. It is measured once and kept in the
        gallery's folder, but for an `index` of the caller's.

        Args and Raises: as `search`.
        """
        k, candidates, stage = self._cut(k), _whole(candidates, "candidates"), self._stage(first, index)
        if not k <= candidates <= len(self):
            raise ValueError(
                f"candidates must be {k} (as many as are returned) to {len(self):,} (all images), got {candidates}"
            )
        texts = self.about.sample if sample is None else _texts(sample, "sample")
        if not texts:
            raise ValueError(
                "the recall of a two-stage search is shown with every result and measured on captions, and this "
                "gallery was built without; give some as sample=[...] (100 are a good number)"
            )
        asked = f"{files.names_checksum(texts)} {require_words(self.model).checksum()}"

        def measure() -> Recall:
            best = self._measured.exact(asked, k, lambda: self._exact(texts, k, memory_gb, progress)[0])
            found, _ = self._two_stage(texts, k, candidates, stage, progress)
            share = share_found(best, found)
            low, high = interval(share, len(texts))
            return Recall(share, low, high, len(texts), k, candidates, len(self), stage.first.name, stage.name)

        return (stage.measured or self._measured).recall(f"{asked} {stage.key} {candidates} {k}", measure)

    def name(self, image: int) -> str:
        """The name of an image; its row number if the gallery has no names."""
        return str(image) if self.names is None else self.names[image]

    def _exact(self, texts: list[str], k: int, memory_gb: float | None, progress: bool) -> _Result:
        def search(group: list[str]) -> _Result:
            captions = _encoded(self.model, group)
            return search_all(self._images, captions, k, memory_gb=memory_gb, progress=progress)

        return _in_groups(texts, search)

    def _two_stage(self, texts: list[str], k: int, candidates: int, stage: Stage, progress: bool) -> _Result:
        def search(group: list[str]) -> _Result:
            captions = _encoded(self.model, group)
            asked = captions if stage.first is self.model else _encoded(stage.first, group)
            rows = stage.search(asked, candidates, k)
            return search_among(self._images, captions, rows, k, progress=progress)

        return _in_groups(texts, search)

    def _stage(self, first: Loaded | None, index: Index | None) -> Stage:
        if first is not None:
            require_usable(require_loaded(first))
        elif not usable(self.model):
            raise ValueError(
                f"a two-stage search of {self.model.name} needs first= (--first): a SCAN or DualEncoder checkpoint, as "
                "the model's own pooled vectors find few of its best images"
            )
        first = first or self.model
        key = id(first), id(index)
        if key not in self._stages:
            self._stages[key] = Stage(self.path, self.about, first, index)
        return self._stages[key]

    def _cut(self, k: int) -> int:
        if _whole(k, "k") < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        return min(k, len(self))


def _whole(value: object, argument: str) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{argument} must be an int, got {value!r}")
    return int(value)


def _texts(captions: Sequence[str], argument: str) -> list[str]:
    from ..data.texts import caption_texts

    texts = [text.strip() for text in caption_texts(captions, argument)]
    if not texts:
        raise ValueError(f"{argument} is empty; give at least one text")
    for number, text in enumerate(texts):
        if not text:
            raise ValueError(f"{argument}[{number}] is blank; leave it out")
    return texts


def _encoded(model: Loaded, texts: list[str]) -> Captions:
    return Captions(*encode_captions(model.model, texts, require_words(model)))


def _in_groups(texts: list[str], search: Callable[[list[str]], _Result]) -> _Result:
    found = [search(texts[start : start + _GROUP]) for start in range(0, len(texts), _GROUP)]
    return np.concatenate([images for images, _ in found]), np.concatenate([scores for _, scores in found])
