"""Opening, saving and converting splits: which form a path is, and outputs that are whole or not there."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

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
    """Open one split of a data set; features stay on disk until their rows are asked for.

    Args:
        path: SCAN's folder (`{split}_ims.npy`, `{split}_caps.txt`, ...) or an HDF5 file; the heads of
            `itm_fast.data.folder` and `itm_fast.data.hdf5` list what each may hold.
        split: its name, such as `dev` or `testall`.
        limit_captions: keep the first captions and their images only. The published code does so with 5,000
            on `dev`; here nothing is cut unless asked.
        captions_per_image: for folders only, when counts alone do not tell: 1 or 5 where features have as
            many rows as there are captions.
        mask_zero_regions: where the data have no region lengths, leave out the all-zero regions at each image's end;
            reads all features once.

    Raises:
        FileNotFoundError: no such path or split; the message lists the splits there are.
        ValueError: a damaged file or one of another form, shapes or counts that do not fit.
        TypeError: numbers of the wrong kind.
        OSError: not an HDF5 file, a damaged one, or one that is open for writing.

    >>> import tempfile
    >>> import numpy as np
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     np.save(f"{folder}/dev_ims.npy", np.zeros((2, 36, 8), np.float32))
    ...     _ = open(f"{folder}/dev_caps.txt", "w").write("a cat\\n" * 10)
    ...     open_split(folder, "dev").caption_to_image.tolist()
    [0, 0, 0, 0, 0, 1, 1, 1, 1, 1]
    """
    path = _existing(path)
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
        FileNotFoundError: no such path.
        OSError: not an HDF5 file, a damaged one, or one that is open for writing.
        ValueError: an HDF5 file of another form.
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

    Everything is written under another name and renamed when whole; what is replaced comes back when that is
    interrupted. float16 features stay float16; every other kind becomes float32, which is what reading gives.

    Args:
        path: the file or folder to write. An existing folder keeps its other splits; an existing file is
            replaced as a whole.
        splits: the splits by name.
        force: overwrite the file, or splits of these names in the folder.
        images_written: called with a number of images after each block of them, for a progress bar.

    Raises:
        FileExistsError: without force, the file or a split is there already.
        FileNotFoundError: the folder that is to hold the result does not exist.
        RuntimeError: another process is writing there.
        ValueError: no splits, or a caption that the form cannot hold.
        OSError: not enough room on the disk (found out before writing), or a failing disk.

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
    """Turn a folder into an HDF5 file or an HDF5 file into a folder.

    Images that a folder repeats for each caption are written once; int8 features are written as float32.

    Args:
        source: the folder or file.
        destination: a name ending in `.h5` or `.hdf5` for a folder source, any other name for a file.
        splits: which to convert; None converts all.
        force: as for `save_splits`.
        captions_per_image, mask_zero_regions: as for `open_split`.
        images_written: as for `save_splits`.

    Raises:
        ValueError: the destination is of the source's own form, or there is nothing to convert.
        Exception: everything that `open_split` and `save_splits` raise.
    """
    source, destination = _existing(source), Path(destination)
    if source.is_dir() != (destination.suffix in SUFFIXES):
        raise ValueError(
            f"{source} is a {'folder' if source.is_dir() else 'file'}, so {destination} must "
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
            raise FileExistsError(f"{path} exists; force (--force) replaces the whole file")
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
            if not path.exists():  # another process may have made it meanwhile
                with _written(_partial(path), splits, images_written) as partial:
                    os.rename(partial, path)
                return
    with Lock(path / ".convert.lock", str(path)):
        old = [[path / f"{name}_{file}" for name in splits] for file in folder_form.FILES]
        there = [name for name, *files in zip(splits, *old, strict=True) if any(file.exists() for file in files)]
        if there and not force:
            raise FileExistsError(f"{path} has files of {', '.join(there)} already; force (--force) replaces them")
        files = [file for row in old for file in row]
        for file in files:
            if file.is_dir():
                raise IsADirectoryError(errno.EISDIR, "is a folder, which is not replaced by a file", str(file))
        # Inside the folder, which may be a mount of its own: a rename cannot leave its file system.
        with _written(_partial(path / "split"), splits, images_written) as partial:
            _exchange(files, partial)


@contextlib.contextmanager
def _written(partial: Path, splits: Mapping[str, Split], images_written: Callable[[int], object]) -> Iterator[Path]:
    """A folder of the files of these splits, removed in the end."""
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        for name, split in splits.items():
            folder_form.write(partial, name, split, images_written, _block(split))
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _exchange(files: list[Path], partial: Path) -> None:
    """Put the new files of `partial` in the place of these: all of them, or after an exception none.

    The first files leave first and arrive last, so that no split can be read meanwhile: its features come first.

    Args:
        files: what is to be replaced, or removed where there is no new file.
        partial: a folder of the same file system with new files of the same names.
    """
    new = {file for file in files if (partial / file.name).exists()}
    # Beside `partial`, which is removed whatever happens: a second interrupt must not lose what was to come back.
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
        # What has moved is read from the disk: an interrupt may come between a move and a note of it.
        for file in files:
            if file in new and not (partial / file.name).exists():
                file.unlink(missing_ok=True)
        for file in reversed(files):
            if os.path.lexists(kept / file.name):
                os.replace(kept / file.name, file)
        kept.rmdir()
        raise
    shutil.rmtree(kept)
