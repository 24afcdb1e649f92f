"""The whole evaluation of one model or an ensemble."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from .. import __version__
from .._backends import requested, resolve
from .._checks import matmul_precision
from .._files import atomic_write
from .encoding import device_of, embed, encode, evaluation_mode
from .memory import GB, MemoryPlan, plan
from .ranking import average, fold_metrics, metrics
from .relevance import relevance_metrics, why_no_relevance
from .report import Pool, Report, System
from .score_file import score_path
from .scoring import score_all

if TYPE_CHECKING:
    from ..data import Split, Vocabulary
    from .encoding import CaptionBatches


def evaluate(
    models: Any,
    split: Split,
    vocab: Vocabulary,
    *,
    names: Sequence[str] | None = None,
    folds: int | None = None,
    ties: str = "pessimistic",
    batch_size: int = 128,
    memory_gb: float | None = None,
    scores: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: bool = True,
) -> Report:
    """Encode, score, rank and report; several models are reported each and as the mean of their score matrices.

    Args:
        models: one model or a sequence: `img_enc`, `txt_enc` and `scorer`, such as `itm_fast.models.build` gives.
        split: as `itm_fast.data.open_split` gives it.
        vocab: the vocabulary that all the models were trained with.
        names: one row title per model; "model 1", "model 2", ... when None.
        folds: also average over this many equal, consecutive parts of the images (5 on COCO's 5,000 test images is
            "COCO 1K").
        ties: as for `ranks`.
        batch_size: images, and captions, encoded at once.
        memory_gb: as for `score_all`.
        scores: keep the score matrix in this .npy file, resumable; with several models each has its own file
            (`x-1.npy`, `x-2.npy`, ...) and `x.npy` is their mean.
        resume: continue interrupted score files and use finished ones again.
        progress: show bars on standard error.

    Returns:
        `Report`.

    Raises:
        ValueError: images do not divide into the folds, the budget is too small, a score is NaN or infinite, features
            or vocabulary do not fit a model.
        FileExistsError: a score file is there and `resume` is false.
    """
    from ..data import caption_batches

    models = list(models) if isinstance(models, (list, tuple)) else [models]
    names = [f"model {number}" for number in range(1, len(models) + 1)] if names is None else list(names)
    if not models or len(names) != len(models):
        raise ValueError(f"evaluate: one name per model is needed, got {len(names)} names and {len(models)} models")
    count = len(split.features)
    if folds is not None and (folds < 1 or count % folds):
        raise ValueError(
            f"{count} images do not divide into {folds} equal folds; recalls of unequal pools cannot be averaged. "
            "Choose a divisor, or leave the folds out"
        )
    files = _score_files(scores, len(models), resume)
    captions = list(caption_batches(split.captions, vocab, batch_size))
    plans = [memory_plan(model, split, captions, len(models), memory_gb, scores is not None) for model in models]
    missing = why_no_relevance(split.image_ids, split.caption_ids)

    def system(name: str, score: NDArray[np.float32]) -> System:
        found = [Pool(metrics(score, split.caption_to_image, ties=ties))]
        if folds is not None:
            parts = fold_metrics(score, split.caption_to_image, folds, ties=ties)
            found.insert(0, Pool(average(parts), tuple(parts)))
        assert split.image_ids is not None or missing
        relevance = None if missing else relevance_metrics(score, split.image_ids, split.caption_ids)  # type: ignore
        return System(name, tuple(found), relevance)

    systems: list[System] = []
    total: NDArray[np.float32] | None = None
    for number, (name, model) in enumerate(zip(names, models, strict=True)):
        encoded = encode(model, split, vocab, batch_size=batch_size, progress=progress, captions=captions)
        start = time.perf_counter()
        score = score_all(
            model.scorer, encoded, memory_gb=memory_gb, out=files[number], resume=resume, progress=progress
        )
        seconds = {"encode": encoded.seconds, "score": time.perf_counter() - start}
        del encoded
        found = system(name, score)
        speed = None if resume else score.size / seconds["score"]
        systems.append(System(found.name, found.pools, found.relevance, seconds, speed))
        if scores is None and total is not None:
            total += score
        else:
            total = score
        del score
    assert total is not None
    if len(models) > 1:
        if scores is None:
            total /= len(models)
        else:
            total = _mean_file(score_path(scores), [Path(file) for file in files if file])
        systems.append(system("mean of the scores", total))
    return Report(tuple(systems), _settings(plans, folds, ties, batch_size, memory_gb), missing, total)


def memory_plan(
    model: Any,
    split: Split,
    captions: CaptionBatches,
    models: int = 1,
    memory_gb: float | None = None,
    in_file: bool = False,
) -> MemoryPlan:
    """The plan for scoring a split that is not encoded yet.

    Args:
        model: as for `evaluate`; asked to embed one image, which also shows whether the features fit it.
        split: as for `evaluate`.
        captions: `list(caption_batches(split.captions, vocab, batch_size))`.
        models: how many models are averaged.
        memory_gb: as for `score_all`.
        in_file: whether the scores go to a file.

    Raises:
        ValueError: as `plan`, and when the features do not fit the model.
    """
    device = device_of(model.img_enc)
    with evaluation_mode(model.img_enc), torch.no_grad():
        embedded = embed(model.img_enc, split.features[0:1])
    return plan(
        model.scorer,
        images=len(split.features),
        regions=embedded.shape[1],
        dim=embedded.shape[2],
        lengths=np.concatenate([lengths for _, _, lengths in captions]),
        memory_gb=memory_gb,
        dtype=embedded.dtype,
        matrices=0 if in_file else min(models, 2),
        device=device,
    )


def _score_files(scores: str | os.PathLike[str] | None, models: int, resume: bool) -> list[Path | None]:
    if scores is None:
        return [None] * models
    path = score_path(scores)
    if models == 1:
        return [path]
    if path.exists() and not resume:
        raise FileExistsError(f"{path} exists; give another name, delete it, or resume (--resume) to write it again")
    return [path.with_name(f"{path.stem}-{number}.npy") for number in range(1, models + 1)]


def _mean_file(path: Path, files: list[Path]) -> NDArray[np.float32]:
    scores = [np.load(file, mmap_mode="r", allow_pickle=False) for file in files]
    with atomic_write(path, "wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": scores[0].shape}
        np.lib.format.write_array_header_1_0(file, header)
        for start in range(0, len(scores[0]), 64):
            total = np.array(scores[0][start : start + 64])
            for score in scores[1:]:
                total += score[start : start + 64]
            total /= len(scores)
            file.write(total.data)
    return np.load(path, mmap_mode="r", allow_pickle=False)


def _settings(
    plans: list[MemoryPlan], folds: int | None, ties: str, batch_size: int, memory_gb: float | None
) -> dict[str, Any]:
    device = plans[0].device
    return {
        "itm_fast": __version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "backend_asked": requested(),
        "backend": resolve("cross_attention_score", None, device),
        "float32_matmul_precision": matmul_precision(),
        "images": plans[0].images,
        "captions": plans[0].captions,
        "folds": folds,
        "ties": ties,
        "batch_size": batch_size,
        "memory_gb": memory_gb,
        "memory_plan_gb": [{name: size / GB for name, size in found.rows()} for found in plans],
    }
