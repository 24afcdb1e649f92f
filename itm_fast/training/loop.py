"""SGRAF's and SCAN's training recipe (SGRAF section 4.2; SCAN section 4.2), interruptible at any step."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import sys
import time
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .._lock import Lock
from .._ranks import Ranks
from ..evaluation.boxes import stored_boxes
from ..models import build
from ..models.checkpoint import BEST
from . import checkpoint, losses, resume
from .checkpoint import LAST
from .interrupt import Stop
from .log import STEP, Log, dev_values, table
from .recipe import learning_rate
from .setup import affordable, boxes_identity, identity, refuse_chunk, same_run
from .vectors import word_vectors

if TYPE_CHECKING:
    from ..data import Batch, Split, Vocabulary
    from ..evaluation import Metrics

_SAVE_EVERY = 600.0  # seconds after which resume.pt is written again within an epoch


@dataclass(frozen=True)
class Result:
    """How a run ended.

    Attributes:
        best_rsum: best sum of recalls on the dev split, in percent; None when no epoch was validated.
        best_epoch: its epoch, counted from 1.
        iterations: optimiser steps taken.
        finished: True if all epochs are done, False if `max_steps` ended the run.
    """

    best_rsum: float | None
    best_epoch: int | None
    iterations: int
    finished: bool


class Run:
    """A run of `train`, of which only the process of rank 0 has a lock and a log."""

    lock: Lock
    log: Log
    model: Any
    stop: Stop

    def __init__(
        self,
        opt: argparse.Namespace,
        train_split: Split,
        dev_split: Split,
        vocabulary: Vocabulary,
        output: Path,
        device: torch.device,
        progress: bool,
        arguments: dict[str, Any],
        ranks: Ranks,
        chunk: int | None,
    ) -> None:
        from ..data import TrainingBatches

        self.opt, self.device, self.ranks, self.chunk = opt, device, ranks, chunk
        self.vocabulary_file = output / f"{opt.data_name}_vocab.json"  # where the published code looks
        self.dev_split, self.vocabulary, self.output = dev_split, vocabulary, output
        self.progress, self.arguments = progress and ranks.first, arguments
        splits = train_split, dev_split
        self.data = [
            len(train_split.captions), len(train_split.features), *map(identity, splits),
            *(boxes_identity(opt, split) for split in splits),
        ]  # fmt: skip
        self.batches = TrainingBatches(
            train_split, vocabulary, opt.batch_size, seed=opt.seed, rank=ranks.rank, world=ranks.world
        )
        # A last batch of one caption is left out: it has no negatives and no batch statistics.
        self.steps = len(self.batches) - (self.data[0] % opt.batch_size == 1)
        if self.steps < 1:
            raise ValueError(f"the training split must hold at least 2 captions, got {self.data[0]}")
        self.epoch = self.step = self.iterations = 0
        self.best_rsum: float | None = None
        self.best_epoch: int | None = None
        self.saved: int | None = None  # `iterations` in resume.pt; None before the first save

    def build(self, found: resume.Progress | None) -> None:
        """Build the model: with new weights, or as an interrupted run left it."""
        if found is not None:
            same_run(found, self.output, self.opt, self.data, self.vocabulary, self.vocabulary_file)
            vars(self.opt).pop(resume.LEARNED, None)  # the caller may have read it from the file
        vectors = word_vectors(self.opt, self.vocabulary, self.progress) if found is None else None
        if vectors is not None:
            self.opt.vector_dim = vectors.shape[1]
        if found is None:
            affordable(self.opt, self.device)
        torch.manual_seed(self.opt.seed)
        self.model = build(argparse.Namespace(**{**vars(self.opt), "device": str(self.device)}))
        for split in (self.batches.split, self.dev_split):
            stored_boxes(self.model, split)
        if self.model.scorer.takes_boxes:
            self.opt.trained_with_boxes = self.batches.split.boxes is not None
        if self.chunk is not None:
            refuse_chunk(self.model)
        if vectors is not None:
            self.model.txt_enc.set_vectors(vectors)
        if found is not None:
            self._restore(found)

    def _restore(self, found: resume.Progress) -> None:
        try:
            self.model.load_state_dict(found.model)
            self.model.optimizer.load_state_dict(found.optimizer)
            self.model.restore_learned(found.options.get(resume.LEARNED, {}))
            resume.set_random_state(found.rng, self.device, alone=self.ranks.world == 1)
        except (ValueError, RuntimeError, TypeError, KeyError, IndexError) as error:
            path = self.output / resume.NAME
            raise ValueError(f"{path} does not fit its own options: {' '.join(str(error).split())}") from error
        self.epoch, self.step, self.iterations = found.epoch, found.step, found.iterations
        self.best_rsum, self.best_epoch = found.best_rsum, found.best_epoch
        self.saved = found.iterations

    def fit(self, max_steps: int | None) -> Result:
        try:
            reached = False
            while self.epoch < self.opt.num_epochs and not reached:
                reached = self._train_epoch(max_steps)
                self._save_resume()
                self.stop.at_once = True
                self._validate(decide=True)
                self.stop.at_once = False
                if self.step >= self.steps:
                    self.epoch, self.step = self.epoch + 1, 0
                self._save_resume()
        except KeyboardInterrupt as interrupt:
            kept = "nothing was saved yet"
            if self.saved is not None:
                kept = (
                    f"{self.output / resume.NAME} holds step {self.saved}, and the same command with --resume "
                    "goes on from there"
                )
            done = f"interrupted in epoch {self.epoch + 1} after {self.iterations} steps"
            raise type(interrupt)(f"{done}; {kept}") from None
        return Result(self.best_rsum, self.best_epoch, self.iterations, finished=self.epoch >= self.opt.num_epochs)

    def _train_epoch(self, max_steps: int | None) -> bool:
        """Train to the end of the epoch or to `max_steps`; return whether `max_steps` is reached."""
        groups = self.model.optimizer.param_groups
        for group in groups:
            group["lr"] = learning_rate(self.opt, self.epoch)
        left = self.steps - self.step
        if max_steps is not None:
            left = min(left, max(0, max_steps - self.iterations))
        source = itertools.islice(self.batches.epoch(self.epoch, self.step), left)
        saved = time.monotonic()
        with self._bar() as bar, contextlib.closing(_prefetched(source)) as batches:
            start = time.perf_counter()
            for batch in batches:
                loss, norm = self._update(batch)
                speed = batch.captions / (time.perf_counter() - start)
                self.step += 1
                self.iterations += 1
                if self.ranks.first:
                    self.lock.check()
                    row = dict(zip(STEP, (loss, groups[0]["lr"], norm, speed), strict=True))
                    self.log.add(self.epoch + 1, self.iterations, row)
                bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
                bar.update()
                if asked := self.stop.agree(self.ranks):
                    self._save_resume()
                    raise asked
                if time.monotonic() - saved > _SAVE_EVERY:
                    self._save_resume()
                    saved = time.monotonic()
                if self.opt.val_step and self.iterations % self.opt.val_step == 0 and self.step < self.steps:
                    self._validate(decide=False)
                start = time.perf_counter()
        return max_steps is not None and self.iterations >= max_steps

    def _update(self, batch: Batch) -> tuple[float, float]:
        """One optimiser step: its loss, and the norm of the gradient before it is clipped."""
        self.model.train_start()
        self.model.optimizer.zero_grad()
        loss = losses.batch_loss(self.model, batch, self.opt, self.ranks, self.chunk)
        value = loss.item()
        if not math.isfinite(value):
            raise ValueError(self._not_finite(batch, f"the loss is {value}"))
        loss.backward()
        self.ranks.average([p.grad for p in self.model.params if p.grad is not None])
        # grad_clip 0 means no clipping, as published; the norm is still computed, for the log.
        limit = self.opt.grad_clip or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.model.params, limit).item()
        if not math.isfinite(norm):
            raise ValueError(self._not_finite(batch, f"the gradient's norm is {norm}"))
        self.model.optimizer.step()
        return value, norm

    def _not_finite(self, batch: Batch, what: str) -> str:
        bad = _first_bad_image(batch.features)
        image = self.ranks.most(-1 if bad is None else int(batch.image_index[bad]))
        cause = (
            "try a lower learning rate, or gradient clipping if it is off"
            if image < 0
            else f"the features of training image {image} hold NaN or infinity; correct them"
        )
        return (
            f"epoch {self.epoch + 1}, iteration {self.iterations + 1}: {what}; training stopped, and "
            f"{self._kept()}; {cause}"
        )

    def _kept(self) -> str:
        if not (self.output / resume.NAME).exists():
            return "nothing was saved yet"
        return f"{self.output} keeps what was saved before it"

    def _validate(self, *, decide: bool) -> None:
        """Evaluate the dev split and log the result; with `decide`, also write the checkpoints of this epoch."""
        found = self._dev_metrics()

        def on_first() -> tuple[float | None, int | None]:
            assert found is not None
            self._record(found, decide)
            return self.best_rsum, self.best_epoch

        self.best_rsum, self.best_epoch = self.ranks.on_first(on_first)

    def _dev_metrics(self) -> Metrics | None:
        """Evaluate the dev split, by all processes together; None in those that are not of rank 0."""
        from ..evaluation import encode
        from ..evaluation.matrix_free import blocks_of
        from ..evaluation.rankings import rankings_of
        from ..evaluation.together import count_together

        encoded = encode(self.model, self.dev_split, self.vocabulary, progress=self.progress)
        try:
            with blocks_of([self.model.scorer], [encoded]) as blocks:
                begun = blocks.begin() if self.ranks.first else None
                tally = count_together(blocks, begun, self.ranks, progress=self.progress)
        except ValueError as error:  # a score is not finite
            raise ValueError(
                f"validation on {self.dev_split.name} in epoch {self.epoch + 1}: {error}; training stopped, and "
                f"{self._kept()}"
            ) from error
        return None if tally is None else rankings_of(tally)[0].metrics()

    def _record(self, found: Metrics, decide: bool) -> None:
        epoch = self.epoch + 1
        self.log.add(epoch, self.iterations, dev_values(found))
        if decide:
            better = self.best_rsum is None or found.rsum > self.best_rsum
            if better:
                self.best_rsum, self.best_epoch = found.rsum, epoch
            self._save_checkpoint(LAST)
            if better:
                self._save_checkpoint(BEST)
        if self.progress:
            best = "" if self.best_rsum is None else f"best {self.best_rsum:.1f}, epoch {self.best_epoch}"
            title = f"dev split after epoch {epoch}, step {self.iterations}"
            print(table(title, found, best), file=sys.stderr)

    def _save_checkpoint(self, name: str) -> None:
        self.lock.check()
        checkpoint.save(
            self.output / name,
            # As published: SGRAF stores the number of finished epochs, SCAN the last epoch counted from 0.
            epoch=self.epoch + (not hasattr(self.opt, "cross_attn")),
            model=self.model.state_dict(),
            best_rsum=self.best_rsum or 0.0,
            opt=argparse.Namespace(**{**vars(self.opt), **self.model.learned_options()}),
            iterations=self.iterations,
        )

    def _save_resume(self) -> None:
        if not self.ranks.first:
            return
        self.lock.check()
        learned = self.model.learned_options()
        resume.save(
            self.output,
            resume.Progress(
                options=vars(self.opt) | ({resume.LEARNED: learned} if learned else {}),
                arguments=self.arguments,
                data=self.data,
                epoch=self.epoch,
                step=self.step,
                iterations=self.iterations,
                best_rsum=self.best_rsum,
                best_epoch=self.best_epoch,
                model=self.model.state_dict(),
                optimizer=self.model.optimizer.state_dict(),
                rng=resume.random_state(),
            ),
        )
        self.saved = self.iterations

    def _bar(self) -> Any:
        from tqdm import tqdm

        return tqdm(
            total=self.steps,
            initial=self.step,
            desc=f"epoch {self.epoch + 1}/{self.opt.num_epochs}",
            unit="step",
            disable=not self.progress,
            dynamic_ncols=True,
        )


def _prefetched(batches: Iterator[Batch]) -> Generator[Batch, None, None]:
    """Yield the batches, while a thread reads the next one."""
    with ThreadPoolExecutor(1) as pool:
        pending = pool.submit(next, batches, None)
        while (batch := pending.result()) is not None:
            pending = pool.submit(next, batches, None)
            yield batch


def _first_bad_image(features: Tensor) -> int | None:
    bad = ~features.isfinite().flatten(1).all(1)
    return int(bad.nonzero()[0]) if bad.any() else None
