"""Open, save and convert data sets, in either form; files are written completely or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from .._files import path_of
from .._lock import Lock
from . import folder as folder_form
from . import hdf5 as hdf5_form
from .split import Split

SUFFIXES = (".h5", ".hdf5")
_BLOCK_BYTES = 64 << 20


def open_split(
    path: str | os.PathLike[str],
    split: str,
    *,
    limit_captions: int | None = None,
    captions_per_image: int | None = None,
    mask_zero_regions: bool = False,
) -> Split:
    """Open one split of a data set; features stay on disk until their rows are used.

    Args:
        path: SCAN's folder (`{split}_ims.npy`, `{split}_caps.txt`, ...) or an HDF5 file; the docstrings of
            `itm_fast.data.folder` and `itm_fast.data.hdf5` list what each may contain.
        split: its name, such as `dev` or `testall`.
        limit_captions: keep only the first captions and their images. The published code keeps 5,000 captions of
            `dev`; here None keeps all.
        captions_per_image: for folders with as many rows of features as captions: 1 if every row is a different image,
            5 to use every fifth row.
        mask_zero_regions: if the data have no region lengths, leave out the all-zero regions at the end of each image;
            this reads all features once.

    Raises:
        FileNotFoundError: the path or the split does not exist; the message lists the splits that exist.
        ValueError: a file is damaged or of another form, or shapes or numbers of rows do not fit each other.
        TypeError: an array has numbers of the wrong type.
        OSError: the file is not HDF5, is damaged, or is open for writing.

    >>> import tempfile
    >>> import numpy as np
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     np.save(f"{folder}/dev_ims.npy", np.zeros((2, 36, 8), np.float32))
    ...     _ = open(f"{folder}/dev_caps.txt", "w").write("a cat\\n" * 10)
    ...     open_split(folder, "dev").caption_to_image.tolist()
    [0, 0, 0, 0, 0, 1, 1, 1, 1, 1]
    """
    path = _existing(path_of("open_split", path))
    if path.is_dir():
        opened = folder_form.read(path, split, captions_per_image)
    elif captions_per_image is not None:
        raise ValueError(
            f"{path}: captions_per_image is for folders; an HDF5 file has its own map of captions to images"
        )
    else:
        opened = hdf5_form.read(path, split)
    if limit_captions is not None:
        opened = opened.first(limit_captions)
    return opened.mask_zero_regions() if mask_zero_regions else opened


def split_names(path: str | os.PathLike[str]) -> list[str]:
    """Names of the splits in a folder or an HDF5 file, sorted.

    Raises:
        FileNotFoundError: the path does not exist.
        OSError: the file is not HDF5, is damaged, or is open for writing.
        ValueError: the HDF5 file was not written by this package.
    """
    path = _existing(path)
    return folder_form.split_names(path) if path.is_dir() else hdf5_form.split_names(path)


def save_splits(
    path: str | os.PathLike[str],
    splits: Mapping[str, Split],
    *,
    force: bool = False,
    images_written: Callable[[int], object] = lambda images: None,
) -> None:
    """Write splits as one HDF5 file (`.h5`, `.hdf5`) or as files of a folder (any other name).

    Everything is written under another name and renamed when it is complete; if that is interrupted, the old files are
    put back. float16 features stay float16; all others are written as float32, the dtype in which they are read.

    Args:
        path: the file or folder to write. An existing folder keeps its other splits; an existing file loses them.
        splits: the splits by name.
        force: overwrite the file, or splits of these names in the folder.
        images_written: called with a number of images after each block of them, for a progress bar.

    Raises:
        FileExistsError: the file or a split exists already, and `force` is false.
        FileNotFoundError: the folder that contains `path` does not exist.
        RuntimeError: another process is writing there.
        ValueError: there are no splits, or a caption cannot be written in this form.
        OSError: the disk has no room (this is checked before anything is written) or fails.

    >>> import tempfile
    >>> import numpy as np
    >>> split = Split(np.ones((2, 36, 8), np.float32), ["a cat", "a dog", "one dog"], np.array([0, 1, 1]))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_splits(f"{folder}/pets.h5", {"train": split, "test": split})
    ...     split_names(f"{folder}/pets.h5")
    ['test', 'train']
    """
    path = Path(path)
    if not splits:
        raise ValueError(f"{path}: there are no splits to write")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent} does not exist; make that folder first")
    is_file = path.suffix in SUFFIXES
    if path.exists() and path.is_dir() == is_file:
        raise FileExistsError(
            f"{path} is a {'folder' if is_file else 'file'}: a name ending in {' or '.join(SUFFIXES)} "
            "is an HDF5 file, any other name a folder"
        )
    form = hdf5_form if is_file else folder_form
    for split in splits.values():
        form.check_writable(split)
    _check_room(path, splits)
    (_save_file if is_file else _save_folder)(path, splits, force, images_written)


def convert(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    splits: Sequence[str] | None = None,
    force: bool = False,
    captions_per_image: int | None = None,
    mask_zero_regions: bool = False,
    images_written: Callable[[int], object] = lambda images: None,
) -> None:
    """Convert a folder to an HDF5 file, or an HDF5 file to a folder.

    Images that a folder repeats for each caption are written once; int8 features are written as float32.

    Args:
        source: the folder or file.
        destination: a name ending in `.h5` or `.hdf5` for a folder source, any other name for a file.
        splits: which to convert; None converts all.
        force: as for `save_splits`.
        captions_per_image, mask_zero_regions: as for `open_split`.
        images_written: as for `save_splits`.

    Raises:
        ValueError: source and destination are of the same form, or there is nothing to convert.
        Exception: as `open_split` and `save_splits`.
    """
    source, destination = _existing(source), Path(destination)
    if source.is_dir() != (destination.suffix in SUFFIXES):
        raise ValueError(
            f"{source} is a {'folder' if source.is_dir() else 'file (HDF5 becomes a folder)'}, so {destination} must "
            f"{'' if source.is_dir() else 'not '}end in {' or '.join(SUFFIXES)}"
        )
    names = split_names(source) if splits is None else list(dict.fromkeys(splits))
    if not names:
        found = folder_form.one_each(source) if source.is_dir() else ""
        raise ValueError(f"{source} holds no splits (files named SPLIT_ims.npy, or HDF5 groups){found}")
    opened = {
        name: open_split(source, name, captions_per_image=captions_per_image, mask_zero_regions=mask_zero_regions)
        for name in names
    }
    save_splits(destination, opened, force=force, images_written=images_written)


def _existing(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; give SCAN's data folder or an HDF5 file")
    if path.suffix in (".npy", ".txt") and path.is_file():
        raise ValueError(f"{path} is one file of a split; give its folder, or an HDF5 file")
    return path


def _block(split: Split) -> int:
    _, R, F = split.features.shape
    return max(1, _BLOCK_BYTES // (4 * R * F))


def _check_room(path: Path, splits: Mapping[str, Split]) -> None:
    need = 1 << 16
    for split in splits.values():
        I, R, F = split.features.shape
        need += I * R * F * split.features.stored_dtype.itemsize + 128 * I
        need += 0 if split.boxes is None else I * R * 16
        need += sum(len(caption.encode()) + 48 for caption in split.captions)
    free = shutil.disk_usage(path.parent).free
    if free < need:
        raise OSError(
            f"{path} needs {need / 1e9:.3g} GB and its disk has {free / 1e9:.3g} GB free; "
            "make room or choose another destination"
        )


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial-{os.getpid()}")


def _save_file(path: Path, splits: Mapping[str, Split], force: bool, images_written: Callable[[int], object]) -> None:
    partial = _partial(path)
    with Lock(path.with_name(f".{path.name}.lock"), str(path)):
        if path.exists() and not force:
            raise FileExistsError(f"{path} exists; force=True (--force) replaces the whole file")
        try:
            with hdf5_form.create(partial) as file:
                for name, split in splits.items():
                    hdf5_form.write(file, name, split, images_written, _block(split))
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def _save_folder(path: Path, splits: Mapping[str, Split], force: bool, images_written: Callable[[int], object]) -> None:
    if not path.exists():
        with Lock(path.with_name(f".{path.name}.lock"), str(path)):
            if not path.exists():  # another process may have created it meanwhile
                with _written(_partial(path), splits, images_written) as partial:
                    os.rename(partial, path)
                return
    with Lock(path / ".convert.lock", str(path)):
        old = [[path / f"{name}_{file}" for name in splits] for file in folder_form.FILES]
        there = [name for name, *files in zip(splits, *old, strict=True) if any(file.exists() for file in files)]
        if there and not force:
            raise FileExistsError(f"{path} has files of {', '.join(there)} already; force=True (--force) replaces them")
        files = [file for row in old for file in row]
        for file in files:
            if file.is_dir():
                raise IsADirectoryError(errno.EISDIR, "is a folder, which is not replaced by a file", str(file))
        # The new files are written inside the folder: it may be a mount point, and files are renamed only within one.
        with _written(_partial(path / "split"), splits, images_written) as partial:
            _exchange(files, partial)


@contextlib.contextmanager
def _written(partial: Path, splits: Mapping[str, Split], images_written: Callable[[int], object]) -> Iterator[Path]:
    """Write these splits into the folder `partial`, which is removed at the end of the `with`."""
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        for name, split in splits.items():
            folder_form.write(partial, name, split, images_written, _block(split))
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _exchange(files: list[Path], partial: Path) -> None:
    """Replace files by the new ones in `partial`: all of them, or none if an exception is raised.

    Files are moved away in order and the new ones moved in in reverse order. As features come first, no split can be
    opened in between.

    Args:
        files: the files to replace; those without a new file are removed.
        partial: a folder in the same file system with new files of the same names.
    """
    new = {file for file in files if (partial / file.name).exists()}
    # Not inside `partial`, which is always removed: after a second interrupt the old files are still here.
    kept = partial.with_name(f"{partial.name}.replaced")
    kept.mkdir()
    try:
        for file in files:
            if os.path.lexists(file):
                os.replace(file, kept / file.name)
        for file in reversed(files):
            if file in new:
                os.replace(partial / file.name, file)
    except BaseException:
        # The disk tells which files have moved; a variable would be wrong if the interrupt came just after a move.
        for file in files:
            if file in new and not (partial / file.name).exists():
                file.unlink(missing_ok=True)
        for file in reversed(files):
            if os.path.lexists(kept / file.name):
                os.replace(kept / file.name, file)
        kept.rmdir()
        raise
    shutil.rmtree(kept)
