"""Evaluate one model or an ensemble: encode, score, rank and report, with or without score matrices."""

from __future__ import annotations

import contextlib
import json
import os
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .._backends import recorded
from .._files import FULL
from .._names import Ties
from .._ranks import Ranks, joined
from .counted import MEAN, count_blocks, report_of
from .counting import count as count_matrix
from .encoding import device_of, encode, require_vocabulary
from .many_right import pairs_of
from .mapped import place_of
from .memory import MemoryPlan
from .planning import memory_plan, memory_plans, settings_of
from .plausible import Plausible, plausible_of, relevance_with_plausible
from .ranking import fold_metrics
from .relevance import ties_of_relevance, why_no_relevance
from .report import Report, System, backend_names, pools
from .score_claim import Claim, check_room, score_path
from .score_file import STRIPE, ScoreFile
from .scoring import score_all, score_into
from .tally import Asked, Tally
from .tie_rules import known_rule, metrics_of
from .unknown_words import unknown_words
from .worst import rows_of_matrix, worst_queries

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
    ties: Ties = "pessimistic",
    batch_size: int = 128,
    memory_gb: float | None = None,
    scores: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: bool = True,
    keep_scores: bool = True,
    worst: int = 0,
    best: int | None = None,
    state: str | os.PathLike[str] | None = None,
    settings: Mapping[str, Any] | None = None,
    together: bool = False,
    pmrp: str | os.PathLike[str] | None = None,
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
        keep_scores: whether the report holds the score matrix. Without it, and without `scores`, no matrix is made: the
            blocks of scores are counted, of all models at the same time, and the report is the same.
        worst: how many queries of each direction the last row of the report lists as those that failed worst. Without
            a matrix their scores are computed again.
        best: without a matrix, also keep this many best items of each query, for `write_trec`.
        state: without a matrix, a folder for snapshots of the counts, every minute and after an interruption. The same
            call goes on from there, and uses the folder for embeddings that do not fit in memory or are shared.
        settings: what else the report's settings should have, as plain values.
        together: without a matrix, whether the processes that torchrun started, or those of torch.distributed's process
            group, divide encoding and blocks among them; all must call this with the same arguments. Those of a machine
            share one copy of the embeddings, in a temporary file.
        pmrp: with a matrix, the folder of the plausible matches, as for `rate`; PMRP is then reported too.

    Returns:
        `Report`; the same in all processes.

    Raises:
        ValueError: the images do not divide into equal folds, the budget is too small, a score is NaN or infinite, or
            features or vocabulary do not fit a model; `best`, `state` or `together` is given with a matrix, or `pmrp`
            without one, or it does not fit the data; the snapshot in `state` is of another evaluation.
        FileExistsError: a score file exists and `resume` is false.
        RuntimeError: another run writes to a score file or a snapshot; the message names its process and host.
        OSError: the disk has no room for the score files; this is checked before anything is encoded.
    """
    prepared = Prepared.of(models, split, vocab, names, folds, ties, batch_size, memory_gb, settings)
    if scores is None and not keep_scores:
        if pmrp is not None:
            raise ValueError("evaluate: PMRP is computed from the score matrix; give scores or keep_scores=True too")
        with joined(device_of(prepared.models[0].img_enc)) if together else contextlib.nullcontext(Ranks()) as ranks:
            tally = prepared.count(best, state, None, progress, worst, ranks)
            found = ranks.on_first(lambda: report_of(tally))  # type: ignore[arg-type]
        return replace(found, captions=split.captions)
    if best is not None or state is not None or together:
        raise ValueError(
            "evaluate: best, state and together are for evaluations without a matrix; give keep_scores=False too"
        )
    plausible = None if pmrp is None else plausible_of(pmrp, split.image_ids, split.caption_ids)
    with contextlib.ExitStack() as stack:
        claims: list[Claim] = []
        if scores is not None:
            files = score_files(scores, len(prepared.models))
            claims = [stack.enter_context(Claim(file, resume)) for file in files]
            check_room(files, (len(split.features), len(split.captions)))
            stack.enter_context(_naming_kept_files(claims))
        return _with_matrices(prepared, claims, resume, progress, keep_scores, worst, plausible)


@dataclass(frozen=True)
class Prepared:
    """The checked arguments of an evaluation; see `evaluate`."""

    models: list[Any]
    split: Split
    vocab: Vocabulary
    names: list[str]
    folds: int | None
    ties: Ties
    batch_size: int
    memory_gb: float | None
    more: Mapping[str, Any]

    @classmethod
    def of(
        cls,
        models: Any,
        split: Split,
        vocab: Vocabulary,
        names: Sequence[str] | None = None,
        folds: int | None = None,
        ties: Ties = "pessimistic",
        batch_size: int = 128,
        memory_gb: float | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> Prepared:
        """Check the arguments; errors as for `evaluate`."""
        models = list(models) if isinstance(models, (list, tuple)) else [models]
        names = [f"model {number}" for number in range(1, len(models) + 1)] if names is None else list(names)
        if not models or len(names) != len(models):
            raise ValueError(f"evaluate: one name per model is needed, got {len(names)} names and {len(models)} models")
        known_rule(ties, "evaluate")
        count = len(split.features)
        if folds is not None and (folds < 1 or count % folds):
            raise ValueError(
                f"{count} images do not divide into {folds} equal folds; recalls of unequal pools cannot be averaged. "
                "Choose a divisor, or leave the folds out"
            )
        for model in models:
            require_vocabulary(model, vocab)
        return cls(models, split, vocab, names, folds, ties, batch_size, memory_gb, settings or {})

    def captions(self) -> CaptionBatches:
        """The captions' word ids."""
        from ..data import caption_batches

        return list(caption_batches(self.split.captions, self.vocab, self.batch_size))

    def settings(self, plans: Sequence[MemoryPlan], captions: CaptionBatches) -> dict[str, Any]:
        """The conditions of the run, for the report."""
        found = settings_of(plans, self.folds, self.ties, self.batch_size, self.memory_gb)
        return found | unknown_words(captions, self.vocab) | dict(self.more)

    def count(
        self,
        best: int | None,
        state: str | os.PathLike[str] | None,
        part: tuple[int, int] | None,
        progress: bool,
        worst: int = 0,
        ranks: Ranks | None = None,
    ) -> Tally | None:
        """Evaluate without a matrix: count all blocks of scores, or those of part (k, n), the k-th of n.

        Several processes count together; the result is None in those that are not of rank 0.
        """
        ranks = ranks or Ranks()
        captions, split = self.captions(), self.split
        plans = memory_plans(self.models, split, captions, self.memory_gb, ranks.shared)
        related = why_no_relevance(split.image_ids, split.caption_ids) is None
        return count_blocks(
            self.models,
            split,
            self.vocab,
            plans,
            captions,
            self.settings(plans, captions),
            self.names,
            Asked(self.folds, best, split.image_ids, split.caption_ids, related),
            ties=self.ties,
            batch_size=self.batch_size,
            memory_gb=self.memory_gb,
            state=state,
            part=part,
            progress=progress,
            worst=worst,
            ranks=ranks,
        )


def _with_matrices(
    prepared: Prepared,
    claims: list[Claim],
    resume: bool,
    progress: bool,
    keep_scores: bool,
    worst: int,
    plausible: Plausible | None,
) -> Report:
    """Score one model after another into matrices in memory, or into the files of these claims."""
    split, folds, ties, memory_gb = prepared.split, prepared.folds, prepared.ties, prepared.memory_gb
    captions = prepared.captions()
    count = len(prepared.models)
    plans = [memory_plan(model, split, captions, count, memory_gb, bool(claims)) for model in prepared.models]
    settings = prepared.settings(plans, captions)
    missing = why_no_relevance(split.image_ids, split.caption_ids)
    relevance_ties = ties_of_relevance(ties)

    def system(name: str, score: NDArray[np.float32]) -> System:
        parts = [] if folds is None else fold_metrics(score, split.caption_to_image, folds, ties=ties)
        counts = count_matrix(score, split.caption_to_image, "evaluate")
        found = pools(metrics_of(counts, ties), parts)
        by_ties = relevance_with_plausible(score, split.image_ids, split.caption_ids, missing, plausible)
        return System(name, found, by_ties.get(relevance_ties), relevance_by_ties=by_ties, counts=counts)

    systems: list[System] = []
    total: NDArray[np.float32] | None = None
    for number, (name, model) in enumerate(zip(prepared.names, prepared.models, strict=True)):
        encoded = encode(
            model, split, prepared.vocab,
            batch_size=prepared.batch_size, progress=progress, captions=captions,
            place=place_of(plans[number].on_disk, None),
        )  # fmt: skip
        start = time.perf_counter()
        with recorded() as ran:
            if claims:
                score = score_into(claims[number], model.scorer, encoded, memory_gb=memory_gb, progress=progress)
            else:
                score = score_all(model.scorer, encoded, memory_gb=memory_gb, progress=progress)
        seconds = {"encode": encoded.seconds, "score": time.perf_counter() - start}
        del encoded
        found = system(name, score)
        total = score if claims or total is None else np.add(total, score, out=total)
        speed = None if resume else plans[number].pairs / seconds["score"]
        systems.append(replace(found, seconds=seconds, pairs_per_second=speed, backends=ran))
        del score
    if count > 1:
        assert total is not None
        if claims:
            total = _mean_file(claims[-1], claims[:-1])
        else:
            total /= count
        systems.append(system(MEAN, total))
    settings["backend"] = backend_names(systems) or (None if resume else "torch")  # a dual encoder runs no itm-fast op
    if systems[-1].relevance:
        settings["relevance_ties"] = relevance_ties
    pairs = pairs_of(split.caption_to_image)
    assert total is not None
    if worst and systems[-1].counts is not None:
        failed = worst_queries(systems[-1].counts, pairs, ties, worst, rows_of_matrix(total))
        systems[-1] = replace(systems[-1], worst=failed)
    return Report(tuple(systems), settings, missing, total if keep_scores else None, pairs, split.captions)


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
