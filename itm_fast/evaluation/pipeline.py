"""Evaluate one model or an ensemble: encode, score, rank and report."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from .. import __version__
from .._backends import recorded, requested, why_not
from .._checks import matmul_precision
from .._files import FULL
from .counting import count as count_matrix
from .distinct import columns, first_of_equals
from .encoding import device_of, embed, encode, evaluation_mode, packed_ids, require_vocabulary
from .many_right import pairs_of
from .matrix_free import rank_all
from .memory import GB, MemoryPlan, plan
from .ranking import fold_metrics
from .relevance import relevance_by_ties, ties_of_relevance, why_no_relevance
from .report import Pool, Report, System, backend_names
from .score_claim import Claim, check_room, score_path
from .score_file import STRIPE, ScoreFile
from .scoring import score_all, score_into
from .tie_rules import Metrics, average, metrics_of
from .unknown_words import unknown_words
from .worst import rows_of_matrix, rows_of_scorer, worst_queries

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
    keep_scores: bool = True,
    worst: int = 0,
) -> Report:
    """Encode, score, rank and report. Several models are reported one by one and as the mean of their score matrices.

    Args:
        models: one model or a sequence of models with `img_enc`, `txt_enc` and `scorer`, as `itm_fast.models.load` and
            `build` return them.
        split: as `itm_fast.data.open_split` returns it.
        vocab: the vocabulary that all the models were trained with.
        names: one row title per model; "model 1", "model 2", ... when None.
        folds: also average over this many equal, consecutive parts of the images (5 on COCO's 5,000 test images is
            "COCO 1K").
        ties: as for `metrics`. CxC and ECCV metrics take the same rule, and "pessimistic" for "expected".
        batch_size: images, and captions, encoded at once.
        memory_gb: as for `score_all`.
        scores: a .npy file for the score matrix, which makes the run resumable; with several models each has its own
            file (`x-1.npy`, `x-2.npy`, ...), and `x.npy` is their mean.
        resume: continue interrupted score files and reuse finished ones.
        progress: show bars on standard error.
        keep_scores: whether the report holds the score matrix. If not, one model without CxC and ECCV metrics is ranked
            on the `cpu` backend by `rank_all`, without a matrix in memory. Scorers of one's own must then give a pair
            the same bits in every block.
        worst: how many queries of each direction the last row of the report lists as those that failed worst. Without
            a matrix their scores are computed again.

    Returns:
        `Report`.

    Raises:
        ValueError: the images do not divide into equal folds, the budget is too small, a score is NaN or infinite, or
            features or vocabulary do not fit a model.
        FileExistsError: a score file exists and `resume` is false.
        RuntimeError: another run writes to a score file; the message names its process and host.
        OSError: the disk has no room for the score files; this is checked before anything is encoded.
    """
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
    for model in models:
        require_vocabulary(model, vocab)
    with contextlib.ExitStack() as stack:
        claims: list[Claim] = []
        if scores is not None:
            files = score_files(scores, len(models))
            claims = [stack.enter_context(Claim(file, resume)) for file in files]
            check_room(files, (count, len(split.captions)))
            stack.enter_context(_naming_kept_files(claims))
        return _evaluate(
            models,
            split,
            vocab,
            names,
            folds,
            ties,
            batch_size,
            memory_gb,
            claims,
            resume,
            progress,
            keep_scores,
            worst,
        )


def _evaluate(
    models: list[Any],
    split: Split,
    vocab: Vocabulary,
    names: list[str],
    folds: int | None,
    ties: str,
    batch_size: int,
    memory_gb: float | None,
    claims: list[Claim],
    resume: bool,
    progress: bool,
    keep_scores: bool,
    worst: int,
) -> Report:
    from ..data import caption_batches

    captions = list(caption_batches(split.captions, vocab, batch_size))
    unknown = unknown_words(captions, vocab)
    matrix = keep_scores or needs_matrix(len(models), split, device_of(models[0].img_enc))
    no_memory = bool(claims) or not matrix
    plans = [memory_plan(model, split, captions, len(models), memory_gb, no_memory) for model in models]
    missing = why_no_relevance(split.image_ids, split.caption_ids)
    relevance_ties = ties_of_relevance(ties)

    def pools(whole: Metrics, parts: list[Metrics]) -> tuple[Pool, ...]:
        return (Pool(average(parts), tuple(parts)), Pool(whole)) if parts else (Pool(whole),)

    def system(name: str, score: NDArray[np.float32]) -> System:
        parts = [] if folds is None else fold_metrics(score, split.caption_to_image, folds, ties=ties)
        counts = count_matrix(score, split.caption_to_image, "evaluate")
        found = pools(metrics_of(counts, ties), parts)
        assert split.image_ids is not None or missing
        if missing:
            return System(name, found, counts=counts)
        by_ties = relevance_by_ties(score, split.image_ids, split.caption_ids)  # type: ignore
        return System(name, found, by_ties[relevance_ties], relevance_by_ties=by_ties, counts=counts)

    systems: list[System] = []
    total: NDArray[np.float32] | None = None
    for number, (name, model) in enumerate(zip(names, models, strict=True)):
        encoded = encode(model, split, vocab, batch_size=batch_size, progress=progress, captions=captions)
        start = time.perf_counter()
        score: NDArray[np.float32] | None = None
        with recorded() as ran:
            if claims:
                score = score_into(claims[number], model.scorer, encoded, memory_gb=memory_gb, progress=progress)
            elif matrix:
                score = score_all(model.scorer, encoded, memory_gb=memory_gb, progress=progress)
            else:
                (ranked,) = rank_all(model.scorer, encoded, folds=folds, memory_gb=memory_gb, progress=progress)
        seconds = {"encode": encoded.seconds, "score": time.perf_counter() - start}
        rows = rows_of_scorer(model.scorer, encoded, memory_gb) if score is None and worst else None
        del encoded
        if score is None:
            parts = ranked.fold_metrics(ties=ties)
            found = System(name, pools(ranked.metrics(ties=ties), parts), counts=ranked.counts)
        else:
            found = system(name, score)
            total = score if claims or total is None else np.add(total, score, out=total)
        speed = None if resume else plans[number].pairs / seconds["score"]
        systems.append(replace(found, seconds=seconds, pairs_per_second=speed, backends=ran))
        del score
    if len(models) > 1:
        assert total is not None
        if claims:
            total = _mean_file(claims[-1], claims[:-1])
        else:
            total /= len(models)
        systems.append(system("mean of the scores", total))
    pairs = pairs_of(split.caption_to_image)
    if total is not None:
        rows = rows_of_matrix(total)
    if rows is not None and worst and systems[-1].counts is not None:
        systems[-1] = replace(systems[-1], worst=worst_queries(systems[-1].counts, pairs, ties, worst, rows))
    settings = _settings(plans, folds, ties, batch_size, memory_gb)
    settings |= unknown
    settings["backend"] = backend_names(systems) or (None if resume else "torch")  # a dual encoder runs no itm-fast op
    if not missing:
        settings["relevance_ties"] = relevance_ties
    return Report(tuple(systems), settings, missing, total if keep_scores else None, pairs, split.captions)


def needs_matrix(models: int, split: Split, device: torch.device) -> bool:
    """Whether an evaluation that keeps no scores needs a score matrix all the same.

    CxC and ECCV metrics are computed from it. Several models are encoded and scored one after another and their
    matrices added up, as their encoded splits together would often need more memory. And without the same bits for a
    pair in every block, `rank_all` may order equal images differently from the matrix: `torch` does not give them, on a
    GPU it was not measured for whole models, and `cpu` gives them outside autocast.

    >>> from itm_fast.data import Split
    >>> split = Split(np.zeros((1, 2, 3), np.float32), ["a cat"], np.array([0]))
    >>> needs_matrix(2, split, torch.device("cpu"))
    True
    """
    same_bits = requested() in ("auto", "cpu") and why_not("cpu", device) is None
    same_bits = same_bits and not torch.is_autocast_enabled("cpu")
    return not same_bits or models > 1 or why_no_relevance(split.image_ids, split.caption_ids) is None


def memory_plan(
    model: Any,
    split: Split,
    captions: CaptionBatches,
    models: int = 1,
    memory_gb: float | None = None,
    in_file: bool = False,
) -> MemoryPlan:
    """The memory plan for scoring a split that is not encoded yet.

    Args:
        model: as for `evaluate`; it encodes one image, which also checks that the features fit it.
        split: as for `evaluate`.
        captions: `list(caption_batches(split.captions, vocab, batch_size))`.
        models: how many models are averaged.
        memory_gb: as for `score_all`.
        in_file: whether there is no matrix in memory: scores go to a file, or are ranked without it.

    Raises:
        ValueError: as `plan`, and when the features do not fit the model.
    """
    device = device_of(model.img_enc)
    with evaluation_mode(model.img_enc), torch.no_grad():
        embedded = embed(model.img_enc, split.features[0:1])
    ids, edges = packed_ids(captions)
    lengths = edges[1:] - edges[:-1]
    distinct, _ = columns(first_of_equals(ids, edges), lengths)
    return plan(
        model.scorer,
        images=len(split.features),
        regions=embedded.shape[1],
        dim=embedded.shape[2],
        lengths=lengths,
        distinct=lengths[distinct],
        memory_gb=memory_gb,
        dtype=embedded.dtype,
        matrices=0 if in_file else min(models, 2),
        device=device,
    )


def score_files(scores: str | os.PathLike[str], models: int) -> list[Path]:
    """The score files of an evaluation: one for each model, and with several models one for their mean, last.

    >>> [file.name for file in score_files("s.npy", 1)], [file.name for file in score_files("s.npy", 2)]
    (['s.npy'], ['s-1.npy', 's-2.npy', 's.npy'])
    """
    path = score_path(scores)
    members = [path.with_name(f"{path.stem}-{number}.npy") for number in range(1, models + 1)]
    return [path] if models == 1 else [*members, path]


@contextlib.contextmanager
def _naming_kept_files(claims: list[Claim]) -> Iterator[None]:
    """Add the score files that are kept to the message of an interruption or a full disk, during encoding as well."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        kept = _kept(claims)
        if str(interrupt) or not kept:
            raise
        raise type(interrupt)(f"interrupted; {kept}: resume (--resume) to go on") from None
    except OSError as error:
        kept = _kept(claims)
        if error.errno not in FULL or not kept or "--resume" in str(error):
            raise
        message = f"{error.strerror}; {kept}: free some space and resume (--resume) to go on"
        raise OSError(error.errno, message, error.filename) from error


def _kept(claims: list[Claim]) -> str:
    found = [f"{claim.path} is finished" for claim in claims if claim.path.exists()]
    found += [f"{claim.path} is begun" for claim in claims if claim.journal.exists()]
    return f"{', '.join(found)} and kept" if found else ""


def _mean_file(claim: Claim, members: list[Claim]) -> NDArray[np.float32]:
    scores = [np.load(member.path, mmap_mode="r", allow_pickle=False) for member in members]
    images, captions = scores[0].shape
    checksums = [json.loads(member.about.read_bytes())["checksums"] for member in members]
    identity = {"members": f"{zlib.crc32(json.dumps(checksums).encode()):08x}"}
    with ScoreFile(claim, (images, captions), np.arange(captions), (STRIPE, captions), identity) as file:
        if not file.finished:
            with file.says_what_is_kept():
                for number in sorted(set(range(file.blocks)) - file.done):
                    start, stop = file.rows(number)
                    total = np.array(scores[0][start:stop])
                    for score in scores[1:]:
                        total += score[start:stop]
                    total /= len(scores)
                    file.write(number, total)
                file.finish()
    return np.load(claim.path, mmap_mode="r", allow_pickle=False)


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
        "float32_matmul_precision": matmul_precision(),
        "images": plans[0].images,
        "captions": plans[0].captions,
        "distinct_captions": plans[0].distinct,
        "folds": folds,
        "ties": ties,
        "batch_size": batch_size,
        "memory_gb": memory_gb,
        "memory_plan_gb": [{name: size / GB for name, size in found.rows()} for found in plans],
    }
