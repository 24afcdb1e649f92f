"""Train a model: checks, locks and files around the training loop, in one process or in several."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .._backends import use_backend
from .._lock import Lock
from .._ranks import joined
from ..models._recognised import check
from . import resume
from .interrupt import signals
from .log import Callback, Log
from .loop import Result, Run
from .setup import completed, enough_known_words, refuse_existing, usable, warn_of_same_image

if TYPE_CHECKING:
    from ..data import Split, Vocabulary

LOCK = "train.lock"


def train(
    opt: argparse.Namespace,
    train_split: Split,
    dev_split: Split,
    vocabulary: Vocabulary,
    output: str | os.PathLike[str],
    *,
    resuming: bool = False,
    max_steps: int | None = None,
    device: str | torch.device | None = None,
    backend: str | None = None,
    tensorboard: bool = False,
    progress: bool = True,
    arguments: Mapping[str, Any] | None = None,
    chunk: int | None = None,
    callback: Callback | None = None,
) -> Result:
    """Train one model with Adam, hardest negatives, a step schedule and clipped gradients.

    After every epoch the dev split is evaluated. `output` then holds `model_best.pth.tar` (the epoch with the best
    rsum) and `checkpoint.pth.tar` (the last epoch), both in the published format; the vocabulary under its published
    name; `log.csv`; and `resume.pt`, from which an interrupted run continues. On the CPU, with the same number of
    threads, the resumed run computes the same bits as one that was not interrupted. After Ctrl-C or SIGTERM the
    current step is finished and saved.

    If torchrun started several processes, or torch.distributed has a process group, all of them call this function with
    the same arguments and train one model together. Each batch is divided among them, and every caption has its
    negatives in the whole batch. Losses, gradients and random numbers are those of one process, apart from rounding, so
    the number of processes may change when a run is resumed. In float32 losses agree to 1e-6, and gradients, sums of
    thousands of terms that are added up in another order, to about 1e-5 of their norm, which is as far as those of one
    process are from float64's. The process of rank 0 writes all files; all must see the data and `output`.

    Args:
        opt: the options, as `options` returns them, with `img_dim` as in the data. `data_path` and `data_name` tell
            the published evaluation where the data are; `data_name` also names the vocabulary file.
        train_split: the training data; every caption, with its image, is one sample.
        dev_split: the data of the validations, which decide which epoch is the best.
        vocabulary: the words that the model embeds.
        output: the run's folder; created if it does not exist.
        resuming: continue the run in `output`; `opt` may differ in `num_epochs`, `val_step`, `data_path`.
        max_steps: stop after this many optimiser steps in all; the model is then validated and saved.
        device: "cpu", "cuda", "cuda:1", ...; None: CUDA if there is a GPU, else the CPU.
        backend: as for `itm_fast.use_backend`.
        tensorboard: write `output/tensorboard` as well.
        progress: show progress bars, and a recall table after each epoch, on standard error.
        arguments: plain values that are stored in `resume.pt` for the caller.
        chunk: encode so many captions and images at a time, and once more in the backward pass, to save memory in large
            batches; None: a batch at once. The losses are the same.
        callback: called as `callback({"train/loss": ..., ...}, step=n)` after each optimiser step and, with "dev/rsum"
            and the other recalls, after each validation: `callback=wandb.log` or `wandb.init(...).log` sends all to
            Weights & Biases. Of several processes the first calls it. What it raises ends the run; `resuming` goes on
            from its last save.

    Returns:
        `Result`.

    Raises:
        FileExistsError: `resuming` is false, and `output` holds a run, the `log.csv` of a run that was validated, or a
            vocabulary file with other words.
        FileNotFoundError: `resuming` is true, and `output` holds no run to resume.
        ValueError: the options do not fit the data; options or data are not those of the interrupted run; the
            vocabulary has almost no word of the training captions; `chunk` is given, and the encoders have a BatchNorm;
            or a loss is not finite.
        ConnectionError: another process of the run has ended.
        KeyboardInterrupt: after Ctrl-C or SIGTERM, once `resume.pt` is written; the message says how to continue.

    >>> import tempfile
    >>> import numpy as np
    >>> from itm_fast.data import Split, Vocabulary
    >>> from itm_fast.training import options, train
    >>> captions = ["a cat", "a dog", "one fox", "an owl"]
    >>> split = Split(np.random.rand(4, 36, 6).astype("f"), captions, np.arange(4))
    >>> vocabulary = Vocabulary.build(split.captions, min_count=1)
    >>> opt = options("scan", img_dim=6, embed_size=8, word_dim=4, num_epochs=2, batch_size=2)
    >>> train(opt, split, split, vocabulary, tempfile.mkdtemp() + "/run", progress=False).iterations
    4
    """
    if max_steps is not None and max_steps < 1:
        raise ValueError(f"max_steps must be at least 1, got {max_steps}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    output = Path(output)
    with contextlib.ExitStack() as stack:
        if backend is not None:
            stack.enter_context(use_backend(backend))
        chosen = usable(device)
        ranks = stack.enter_context(joined(chosen))
        check(vars(opt))
        opt = completed(opt, train_split, dev_split, vocabulary, output)
        run = Run(
            opt, train_split, dev_split, vocabulary, output, chosen, progress, dict(arguments or {}), ranks, chunk
        )

        def prepare() -> None:
            if resuming:
                resume.require(output)
            else:
                output.mkdir(parents=True, exist_ok=True)
            run.lock = stack.enter_context(Lock(output / LOCK, str(output)))
            if not resuming:
                refuse_existing(output, run.vocabulary_file, vocabulary)
                enough_known_words(train_split, dev_split, vocabulary)
                warn_of_same_image(opt, train_split)

        ranks.on_first(prepare)
        run.build(resume.load(output) if resuming else None)
        if ranks.first:
            validated = run.step < run.steps
            run.log = Log(output, run.iterations, validated=validated, tensorboard=tensorboard, callback=callback)
            stack.callback(run.log.close)
            if not run.vocabulary_file.exists():
                vocabulary.save(run.vocabulary_file)
        run.stop = stack.enter_context(signals(quiet=not ranks.first))
        return run.fit(max_steps)
