"""Find the vocabulary of a checkpoint, and check that the model can have been trained with it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from .checkpoint import Checkpoint

if TYPE_CHECKING:
    from ..data import Vocabulary


def places(found: Checkpoint, data: Path | None = None) -> tuple[list[Path], list[str]]:
    """The folders in which a vocabulary is looked for, and the file names in each, in order of preference.

    Args:
        found: the checkpoint; its own folder comes first, then the folder where it was trained.
        data: the folder or file of the data to be scored; folders near it come last. None: they are left out.
    """
    stems = [getattr(found.opt, "data_name", None)]
    folders = [Path(found.path).parent]
    if getattr(found.opt, "vocab_path", None):
        folders.append(Path(str(found.opt.vocab_path)))
    if data is not None:
        stems.append(data.stem)
        beside = data if data.is_dir() else data.parent
        # SCAN keeps data/f30k_precomp/ and vocab/ side by side.
        near = (beside, beside.parent, beside.parent.parent)
        folders += [beside, *(folder / "vocab" for folder in near), beside.parent]
    names = [*(f"{stem}_vocab.json" for stem in dict.fromkeys(stems) if stem), "vocab.json"]
    return list(dict.fromkeys(folders)), names


def files(found: Checkpoint, data: Path | None = None) -> Iterator[Path]:
    """The vocabulary files that exist at these places, in the same order."""
    folders, names = places(found, data)
    return (folder / name for folder in folders for name in names if (folder / name).is_file())


def why_another(found: Checkpoint, path: Path, vocab: Vocabulary) -> str | None:
    """One sentence if a vocabulary has another size or checksum than the checkpoint's; None if it has not."""
    wanted = "give the vocabulary that it was trained with"
    if len(vocab) != found.vocab_size:
        return f"{found.path} embeds {found.vocab_size:,} words, and {path} has {len(vocab):,}; {wanted}"
    if getattr(found.opt, "vocab_checksum", vocab.checksum()) != vocab.checksum():
        return f"{found.path} was trained with other words than the {len(vocab):,} of {path}; {wanted}"
    return None
