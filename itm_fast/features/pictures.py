"""Find the pictures of a folder, and open them as RGB, upright and on white."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

KINDS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")


def find(folder: str | os.PathLike[str], kinds: Collection[str] = KINDS) -> list[str]:
    """The names of a folder's files of these kinds, sorted; those in folders inside it as `inner/name.jpg`.

    Hidden files and folders are left out.

    Raises:
        NotADirectoryError: there is no such folder.
        ValueError: it holds no such file, or a name is not UTF-8 or has a line break or a tab.
    """
    root = Path(folder)
    if not root.is_dir():
        raise NotADirectoryError(f"{folder} is not a folder")
    found = []
    for inner, folders, files in os.walk(root):
        folders[:] = [each for each in folders if not each.startswith(".")]
        for file in files:
            path = Path(inner) / file
            if not file.startswith(".") and path.suffix.lower() in kinds and path.is_file():
                found.append(path.relative_to(root).as_posix())
    if not found:
        raise ValueError(f"{folder} holds no files that end in {', '.join(kinds)}")
    for name in found:
        if not name.isprintable():  # neither is half of a surrogate pair, by which Python shows what is not UTF-8
            raise ValueError(f"{folder}: the file name {name!r} has characters that cannot be printed; rename the file")
    return sorted(found)


def open_rgb(path: str | os.PathLike[str]) -> Image.Image:
    """A picture as RGB: turned upright by its EXIF tag, on white where it is transparent, the first of an animation.

    Raises:
        ValueError: it is no picture, is damaged, has 32-bit pixels or more of them than Pillow's limit; the message
            names the file.
        OSError: the file cannot be opened.
    """
    import numpy as np
    from PIL import Image, ImageOps

    from ..data.stored import damaged

    with damaged(f"{path} is no whole picture"), Image.open(path) as opened:
        opened.load()
        upright = ImageOps.exif_transpose(opened)
        if upright.mode in ("I", "F"):
            raise ValueError(f"it has 32-bit pixels (mode {upright.mode}), whose range is unknown; save it with 8 bits")
        if upright.mode.startswith("I;16"):
            upright = Image.fromarray((np.asarray(upright).astype(np.uint16) >> 8).astype(np.uint8))
        if not upright.has_transparency_data:
            return upright.convert("RGB")
        whole = upright.convert("RGBA")
        white = Image.new("RGB", whole.size, "white")
        white.paste(whole, mask=whole)
        return white


def check(
    folder: str | os.PathLike[str], names: Sequence[str], progress: bool, workers: int
) -> tuple[dict[str, str], list[str]]:
    """Read every picture once, so that a damaged one is known before hours of work.

    Returns:
        What is wrong by the name of the picture; and the names of animations.
    """
    from PIL import Image

    def look(name: str) -> tuple[str | None, bool]:
        try:
            open_rgb(Path(folder) / name)
            with Image.open(Path(folder) / name) as picture:
                return None, getattr(picture, "n_frames", 1) > 1
        except (ValueError, OSError) as error:
            return str(error), False

    wrong, animated = {}, []
    for name, (problem, moves) in zip(names, each(look, names, "checking", progress, workers), strict=True):
        if problem:
            wrong[name] = problem
        elif moves:
            animated.append(name)
    return wrong, animated


def each(do: Callable, items: Sequence, what: str, progress: bool, workers: int) -> list:
    """`do` of each item by threads, with a progress bar; Pillow decodes without Python's lock."""
    from tqdm import tqdm

    with ThreadPoolExecutor(workers) as pool:
        done = pool.map(do, items)
        try:
            return list(tqdm(done, total=len(items), desc=what, unit="image", disable=not progress))
        except BaseException:  # such as Ctrl-C: the rest is not waited for
            pool.shutdown(wait=False, cancel_futures=True)
            raise
