"""Checks before the first training step: device, backend, memory, files, words, and options that fit the data."""

from __future__ import annotations

import argparse
import hashlib
import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .._backends import requested, why_not
from ..evaluation.memory import GB, available_bytes
from ..models import model_class
from ..models._building import fits, outline
from ..models._common import require_options, usable_device
from ..models.checkpoint import BEST
from . import resume
from .checkpoint import LAST
from .log import NAME as LOG
from .log import never_validated
from .recipe import TRAINING

if TYPE_CHECKING:
    from ..data import Split, Vocabulary

_HOPELESS = 90.0  # percent of the training captions without any known word
_MANY = 512  # captions in a batch, from which the share of those of one image is worth a warning
_SOME_IMAGES = 8  # images whose features `identity` reads
# Options that may change when a run is resumed. The vocabulary is compared by its words.
_MAY_DIFFER = ("num_epochs", "val_step", "data_path", "vocab_path", "model_name", "logger_name", "vocab_checksum")


def usable(device: str | torch.device | None) -> torch.device:
    """The device of a run.

    Raises:
        ValueError: as `usable_device`.
        NotImplementedError: the requested backend cannot run on it; the message says why.
    """
    chosen = usable_device(device)
    asked = requested()
    reason = None if asked == "auto" else why_not(asked, chosen)
    if reason is not None:
        raise NotImplementedError(f"the backend {asked} cannot run on {chosen}: {reason}")
    return chosen


def completed(
    opt: argparse.Namespace, train_split: Split, dev_split: Split, vocabulary: Vocabulary, output: Path
) -> argparse.Namespace:
    """The options, completed with those that follow from the data: vocab_size, vocab_checksum, num_region and paths.

    Raises:
        ValueError: an option is missing, the options do not fit the features, or the two splits do not fit each other.
    """
    known = [name for name in model_class(opt).reads() if name != "vocab_size"]
    require_options(opt, "train", (*known, *TRAINING))
    for name, split in (("training", train_split), ("dev", dev_split)):
        if split.features.shape[2] != opt.img_dim:
            raise ValueError(
                f"img_dim is {opt.img_dim}, but the {name} split's features [I, R, F] are "
                f"{list(split.features.shape)}; set img_dim to F"
            )
    set_here: dict[str, Any] = dict.fromkeys(("vocab_path", "model_name", "logger_name"), str(output))
    set_here["vocab_size"], set_here["vocab_checksum"] = len(vocabulary), vocabulary.checksum()
    if model_class(opt).weighs_regions:
        regions, dev_regions = train_split.features.shape[1], dev_split.features.shape[1]
        if regions != dev_regions:
            raise ValueError(
                f"{model_class(opt).__name__} has one weight per region, so both splits must have as many: "
                f"training has {regions}, dev {dev_regions}; pad the features and give region_lengths"
            )
        if regions != 36:  # the published code fixes 36 and has no option for it
            set_here["num_region"] = regions
    return argparse.Namespace(**{**vars(opt), **set_here})


def affordable(opt: argparse.Namespace, device: torch.device) -> None:
    """Refuse options whose model needs more memory to train than is free; nothing is built.

    Raises:
        ValueError: names the memory needed and the memory free; or as `outline`.
    """
    weights = sum(p.numel() * p.element_size() for p in outline(opt).params)
    needed, free = 4 * weights, available_bytes(device)  # weights, gradients, and the two moments of Adam
    if needed > free:
        raise ValueError(
            f"these options describe a model that takes {needed / GB:,.1f} GB to train, and {free / GB:,.1f} GB are "
            f"free on {device}; choose smaller sizes"
        )


def refuse_existing(output: Path, vocabulary_file: Path, vocabulary: Vocabulary) -> None:
    """Refuse a folder that already has a file which the run would write.

    A vocabulary file of the same words may exist, and so may the log of a run that failed before it saved anything.

    Raises:
        FileExistsError: names the file.
        OSError: the vocabulary's path is a folder, a FIFO, a socket or a device.
    """
    for name, remedy in ((resume.NAME, "continue it with --resume, or "), (BEST, ""), (LAST, "")):
        if (output / name).exists():
            raise FileExistsError(f"{output} already holds a run ({name}); {remedy}give another folder")
    if (output / LOG).exists() and not never_validated(output / LOG):
        raise FileExistsError(
            f"{output / LOG} exists, and a new run does not overwrite it; move it away, or give another folder"
        )
    if vocabulary_file.exists() and not _holds(vocabulary_file, vocabulary):
        raise FileExistsError(
            f"{vocabulary_file} is there already and holds other words than this run's, and a run does not overwrite a "
            f"vocabulary; give another folder, or train with its words: --vocab {vocabulary_file}"
        )


def _holds(path: Path, vocabulary: Vocabulary) -> bool:
    from ..data import Vocabulary

    try:
        return Vocabulary.load(path).checksum() == vocabulary.checksum()
    except ValueError:  # the file is not a vocabulary
        return False


def enough_known_words(train_split: Split, dev_split: Split, vocabulary: Vocabulary) -> None:
    """Warn if the vocabulary lacks many words of a split; refuse a training split that would teach almost no words.

    Raises:
        ValueError: at least 90 % of the training captions have no word in the vocabulary.
    """
    from ..data import caption_batches
    from ..evaluation.unknown_words import CAPTIONS, unknown_words, unknown_words_line

    cause = "is the vocabulary (--vocab, --min-count) one for these captions, and are their words separated by spaces?"
    for name, split in (("training", train_split), ("dev", dev_split)):
        with warnings.catch_warnings(record=True) as suspicious:
            warnings.simplefilter("always")
            found = unknown_words(list(caption_batches(split.captions, vocabulary)), vocabulary)
        message = f"{split.name}: the {name} split's {unknown_words_line(found)}; {cause}"
        if split is train_split and found[CAPTIONS] >= _HOPELESS:
            raise ValueError(message)
        if suspicious:
            warnings.warn(message, stacklevel=3)


def refuse_chunk(model: Any) -> None:
    """Refuse to encode batches in parts with encoders that compute statistics over the batch.

    Raises:
        ValueError: names the model.
    """
    for encoder in (model.img_enc, model.txt_enc):
        if any(isinstance(part, torch.nn.modules.batchnorm._BatchNorm) for part in encoder.modules()):
            raise ValueError(
                f"chunk: the encoders of {type(model).__name__} have a BatchNorm, whose statistics are over the whole "
                "batch, so a batch cannot be encoded in parts; leave chunk (--chunk) out"
            )


def warn_of_same_image(opt: argparse.Namespace, split: Split) -> None:
    """Warn if batches are so large that many captions meet another caption of their image as a negative.

    >>> import warnings
    >>> from ..data import Split
    >>> split = Split(np.zeros((1000, 1, 1)), ["a cat"] * 5000, np.repeat(np.arange(1000), 5))
    >>> with warnings.catch_warnings(record=True) as found:
    ...     warn_of_same_image(argparse.Namespace(batch_size=512, exclude_same_image=False), split)
    >>> str(found[0].message)[:69]
    'of the captions in a batch of 512, 35 % have another caption of their'
    """
    captions, size = len(split.captions), min(opt.batch_size, len(split.captions))
    if opt.exclude_same_image or opt.batch_size < _MANY or captions < 2:
        return
    others = np.bincount(split.caption_to_image)[split.caption_to_image] - 1
    share = 100 * float(np.mean(1 - (1 - (size - 1) / (captions - 1)) ** others))
    if share >= 1:
        warnings.warn(
            f"of the captions in a batch of {size:,}, {share:.0f} % have another caption of their own image in it, "
            "which counts as a negative, as published; exclude_same_image (--exclude-same-image) leaves these out",
            stacklevel=3,
        )


def identity(split: Split) -> str:
    """A checksum of a split: its captions, caption_to_image, region counts, and the features of a few images.

    It depends on the content only, not on files. Reading the features of all images would take minutes.
    """
    images, regions, _ = split.features.shape
    some = np.unique(np.linspace(0, images - 1, _SOME_IMAGES).astype(np.int64))
    lengths = np.full(images, regions, np.int32) if split.region_lengths is None else split.region_lengths
    found = hashlib.sha256(json.dumps(split.captions).encode())
    for array in (split.caption_to_image, lengths, split.features[some]):
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()


def boxes_identity(opt: argparse.Namespace, split: Split) -> str | None:
    """A checksum of a split's boxes, if it has some and the model that these options describe reads them."""
    with torch.device("meta"):  # takes no memory and draws no random numbers
        reads = model_class(opt).similarity(opt).takes_boxes
    if not reads or split.boxes is None:
        return None
    return hashlib.sha256(np.ascontiguousarray(split.boxes[:]).tobytes()).hexdigest()


def same_run(
    found: resume.Progress,
    output: Path,
    opt: argparse.Namespace,
    data: list[Any],
    vocabulary: Vocabulary,
    vocabulary_file: Path,
) -> None:
    """Refuse to resume with other options, data, words or weights than those of the interrupted run.

    Raises:
        ValueError: names what differs.
    """
    from ..data import Vocabulary

    differing = [
        f"{name} {found.options.get(name)!r}, now {value!r}"
        for name, value in vars(opt).items()
        if name not in _MAY_DIFFER and found.options.get(name) != value
    ]
    if found.data[:2] != data[:2]:
        differing.append(f"[captions, images] {found.data[:2]}, now {data[:2]}")
    # Files of older versions have only the two counts, or no boxes.
    kinds = "captions or features", "boxes"
    parts = [f"{what} in its {name} split" for what in kinds for name in ("training", "dev")]
    for part, before, now in zip(parts, found.data[2:], data[2:], strict=False):
        if before != now:
            differing.append(f"other {part}" if before is not None else f"no {part}")
    checksum = found.options.get("vocab_checksum", opt.vocab_checksum)  # older versions wrote none
    if not differing and {checksum, Vocabulary.load(vocabulary_file).checksum()} != {vocabulary.checksum()}:
        differing.append(f"the words of {vocabulary_file}, now others")
    path = output / resume.NAME
    if differing:
        raise ValueError(
            f"{path} belongs to a run with {'; '.join(differing)}. Resume with the same options and data, or start "
            "a new run in another folder"
        )
    try:
        fits(opt, found.model)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
