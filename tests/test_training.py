"""Whole runs on a tiny set: the published step, interruption at any point, checkpoints, refusals."""

from __future__ import annotations

import argparse
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from training_cases import (
    DEV,
    MODELS,
    TRAIN,
    WORDS,
    assert_same_run,
    log_rows,
    run_tiny,
    tensors_of,
    tiny_options,
    tiny_split,
)

from itm_fast.data import Split, TrainingBatches, Vocabulary
from itm_fast.evaluation import encode, metrics, score_all
from itm_fast.models import build
from itm_fast.models.checkpoint import load
from itm_fast.training import checkpoint, loop, losses, resume, train


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """One uninterrupted run of each model."""
    folder = tmp_path_factory.mktemp("straight")
    results = {model: run_tiny(folder / model, model) for model in MODELS}
    return folder, results


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    "changes", [{}, {"grad_clip": 0.0}, {"max_violation": False}], ids=["published", "no clip", "all"]
)
def test_a_step_is_the_published_one(tmp_path, model, changes):
    opt = tiny_options(model, num_epochs=1, **changes)
    run_tiny(tmp_path / "run", opt=opt, max_steps=3)
    opt.vocab_size, opt.device = len(WORDS), "cpu"
    torch.manual_seed(0)
    published = build(opt)
    for _, batch in zip(range(3), TrainingBatches(TRAIN, WORDS, 8).epoch(0), strict=False):
        published.train_start()
        published.train_emb(batch.features, batch.ids, batch.lengths)
    mine = load(tmp_path / "run" / loop.LAST).model
    for one, other in zip(tensors_of(mine), tensors_of(published.state_dict()), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("stops", [(4,), (6,), (1, 7)], ids=["in an epoch", "at its end", "twice"])
def test_interrupted_runs_end_as_the_uninterrupted_one(tmp_path, straight, model, stops):
    output = tmp_path / "run"
    for number, steps in enumerate(stops):
        stopped = run_tiny(output, model, max_steps=steps, resuming=number > 0)
        assert (stopped.iterations, stopped.finished) == (steps, False)
    ended = run_tiny(output, model, resuming=True)
    assert (ended.iterations, ended.finished) == (12, True)
    whole = straight[0] / model
    mine, theirs = resume.load(output), resume.load(whole)
    pairs = zip(tensors_of([mine.model, mine.optimizer]), tensors_of([theirs.model, theirs.optimizer]), strict=True)
    assert all(torch.equal(x, y) for x, y in pairs)
    steps = [[row for row in log_rows(folder) if row["loss"]] for folder in (output, whole)]
    assert steps[0] == steps[1]
    assert [int(row["iteration"]) for row in steps[0]] == list(range(1, 13))


@pytest.mark.parametrize("model", ["saf", "scan"])
def test_a_signal_in_a_step_saves_and_the_resumed_run_is_the_same(tmp_path, straight, monkeypatch, model):
    output, update = tmp_path / "run", loop.Run._update
    calls = []

    def with_signal(self, batch):
        calls.append(1)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(self, batch)

    monkeypatch.setattr(loop.Run, "_update", with_signal)
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match=r"epoch 1 after 4 steps; .*resume\.pt holds step 4.*--resume goes on"):
        run_tiny(output, model)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    run_tiny(output, model, resuming=True)
    assert_same_run(output, straight[0] / model)
    assert log_rows(output) == log_rows(straight[0] / model)


def test_a_signal_in_a_validation_stops_at_once_and_it_is_done_again(tmp_path, straight, monkeypatch):
    output = tmp_path / "run"
    real = checkpoint.save
    calls = []

    def with_signal(path, **content):
        calls.append(path)
        if len(calls) == 2:  # checkpoint.pth.tar of epoch 1 is written, model_best.pth.tar is not
            os.kill(os.getpid(), signal.SIGINT)
        real(path, **content)

    monkeypatch.setattr(checkpoint, "save", with_signal)
    with pytest.raises(KeyboardInterrupt, match=r"after 6 steps; .* holds step 6"):
        run_tiny(output)
    assert not (output / loop.BEST).exists()
    run_tiny(output, resuming=True)
    assert_same_run(output, straight[0] / "scan")
    assert log_rows(output) == log_rows(straight[0] / "scan")


def test_a_second_signal_stops_at_once(tmp_path, monkeypatch):
    def impatient(self, batch):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("the second signal must raise")

    monkeypatch.setattr(loop.Run, "_update", impatient)
    with pytest.raises(KeyboardInterrupt, match="after 0 steps; nothing was saved yet"):
        run_tiny(tmp_path / "run")


def test_a_long_epoch_saves_on_its_way(tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(loop, "_SAVE_EVERY", -1.0)
    monkeypatch.setattr(resume, "save", lambda folder, progress: saved.append(progress.iterations))
    run_tiny(tmp_path / "run", max_steps=3)
    assert saved[:3] == [1, 2, 3]


def test_the_seed_decides(tmp_path, straight):
    run_tiny(tmp_path / "same", "saf")
    assert_same_run(tmp_path / "same", straight[0] / "saf")
    run_tiny(tmp_path / "other", opt=tiny_options("saf", seed=1))
    mine, theirs = (next(tensors_of(resume.load(f).model)) for f in (tmp_path / "other", straight[0] / "saf"))
    assert not torch.equal(mine, theirs)


def test_the_seed_decides_the_order(tmp_path, monkeypatch):
    real, seen = losses.batch_loss, []

    def spy(model, batch, *rest):
        seen.append(sorted(batch.caption_index.tolist()))
        return real(model, batch, *rest)

    monkeypatch.setattr(losses, "batch_loss", spy)
    for number, seed in enumerate((0, 1, 0)):
        run_tiny(tmp_path / str(number), opt=tiny_options("scan", seed=seed, num_epochs=1))
    assert seen[:6] == seen[12:]
    assert seen[:6] != seen[6:12]
    assert sorted(caption for batch in seen[:6] for caption in batch) == list(range(42))


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_it_learns(tmp_path, model):
    # All negatives: a model this small does not leave the hardest ones' plateau within seconds.
    opt = tiny_options(model, num_epochs=15, max_violation=False, exclude_same_image=True, learning_rate=2e-2)
    result = run_tiny(tmp_path / "run", opt=opt)
    chance = metrics(np.random.default_rng(0).random((8, 24)), DEV.caption_to_image).rsum
    losses = [float(row["loss"]) for row in log_rows(tmp_path / "run") if row["loss"]]
    # Of the best epoch: at this rate the last one may be thrown back, and rounding decides whether it is.
    epochs = np.reshape(losses, (15, -1)).mean(1)
    assert epochs.min() < 0.8 * epochs[0]
    assert result.best_rsum > chance + 40


@pytest.mark.parametrize("model", MODELS)
def test_checkpoints_rebuild_the_model(straight, model):
    folder, results = straight
    epochs = [row for row in log_rows(folder / model) if row["rsum"]]
    assert [row["epoch"] for row in epochs] == ["1", "2"]
    for name, rsum in ((loop.BEST, results[model].best_rsum), (loop.LAST, float(epochs[-1]["rsum"]))):
        found = load(folder / model / name)
        rebuilt = build(argparse.Namespace(**{**vars(found.opt), "device": "cpu"}))
        rebuilt.load_state_dict(found.model)
        words = Vocabulary.load(Path(found.opt.vocab_path) / f"{found.opt.data_name}_vocab.json")
        encoded = encode(rebuilt, DEV, words, progress=False)
        score = score_all(rebuilt.scorer, encoded, progress=False)
        assert metrics(score, DEV.caption_to_image).rsum == pytest.approx(rsum, abs=1e-3)
        assert found.best_rsum <= results[model].best_rsum
    assert found.iterations == 12
    assert found.epoch == (1 if model == "scan" else 2), "SCAN counts from 0, SGRAF counts finished epochs"
    assert not hasattr(found.opt, "device")


@pytest.mark.parametrize("stop", [None, 12])
def test_the_best_epoch_is_kept(tmp_path, monkeypatch, stop):
    real, rsums = loop.Run._dev_metrics, iter([10.0, 30.0, 20.0, 30.0])

    class Found:
        def __init__(self, found):
            self.i2t, self.t2i, self.rsum = found.i2t, found.t2i, next(rsums)

    monkeypatch.setattr(loop.Run, "_dev_metrics", lambda run: Found(real(run)))
    opt = tiny_options("scan", num_epochs=4)
    result = run_tiny(tmp_path / "run", opt=opt, max_steps=stop)
    if stop:
        result = run_tiny(tmp_path / "run", opt=opt, resuming=True)
    assert (result.best_rsum, result.best_epoch) == (30.0, 2)
    best, last = (load(tmp_path / "run" / name) for name in (loop.BEST, loop.LAST))
    assert (best.epoch, best.best_rsum, best.iterations) == (1, 30.0, 12)
    assert (last.epoch, last.best_rsum, last.iterations) == (3, 30.0, 24)


def test_the_rate_falls_and_the_gradient_is_measured_before_clipping(tmp_path):
    opt = tiny_options("scan", lr_update=1, grad_clip=1e-3, val_step=4)
    run_tiny(tmp_path / "run", opt=opt)
    rows = log_rows(tmp_path / "run")
    rates = [float(row["learning_rate"]) for row in rows if row["loss"]]
    assert rates == [2e-3] * 6 + [2e-4] * 6
    assert all(float(row["grad_norm"]) > 1e-3 for row in rows if row["loss"])
    assert [int(row["iteration"]) for row in rows if row["rsum"]] == [4, 6, 8, 12]


def test_a_lone_caption_at_the_end_is_left_out(tmp_path):
    split = tiny_split(0, 3)  # 9 captions
    result = run_tiny(tmp_path / "run", opt=tiny_options("sgr", num_epochs=1), train_split=split)
    assert result.iterations == 1


def test_what_is_not_finite_stops_with_a_reason(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"iteration 1: the loss is inf; .* and nothing was saved yet; try a lower"):
        run_tiny(tmp_path / "wide", opt=tiny_options("scan", margin=1e300))
    real = losses.batch_loss
    monkeypatch.setattr(losses, "batch_loss", lambda *args: 5e37 * real(*args))
    with pytest.raises(ValueError, match=r"epoch 1, iteration 1: the gradient's norm is (inf|nan); .* try a lower"):
        run_tiny(tmp_path / "steep")
    monkeypatch.setattr(losses, "batch_loss", real)
    features = TRAIN.features[:].copy()
    features[5, 7, 3] = np.nan
    broken = Split(features, TRAIN.captions, TRAIN.caption_to_image)
    with pytest.raises(ValueError, match=r"epoch 1, iteration \d: the loss is nan; .* training image 5 hold NaN"):
        run_tiny(tmp_path / "broken", train_split=broken)
    assert not (tmp_path / "broken" / loop.LAST).exists()
    run_tiny(tmp_path / "broken", max_steps=1)  # nothing of value was there


def test_a_dev_split_that_is_not_finite_is_named(tmp_path, monkeypatch):
    features = DEV.features[:].copy()
    features[2, 7, 3] = np.nan
    monkeypatch.setattr("training_cases.DEV", Split(features, DEV.captions, DEV.caption_to_image, name="mine: dev"))
    with pytest.raises(ValueError, match=r"validation on mine: dev in epoch 1: the score of image 2 .* keeps what was"):
        run_tiny(tmp_path / "late", max_steps=1)
    with pytest.raises(ValueError, match=r"in epoch 1: the score of image 2 .* and nothing was saved yet$"):
        run_tiny(tmp_path / "early", opt=tiny_options("scan", val_step=1))


def test_refuses_to_overwrite_and_to_resume_what_is_not_there(tmp_path, straight):
    with pytest.raises(FileExistsError, match=r"already holds a run \(resume\.pt\); continue it with --resume"):
        run_tiny(straight[0] / "scan")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / loop.BEST).touch()
    with pytest.raises(FileExistsError, match=r"holds a run \(model_best\.pth\.tar\); give another folder"):
        run_tiny(tmp_path / "checkpoints")
    with pytest.raises(FileNotFoundError, match="there is no run to resume; leave --resume out"):
        run_tiny(tmp_path / "none", resuming=True)
    assert not (tmp_path / "none").exists()


def test_refuses_to_resume_another_run(tmp_path):
    output = tmp_path / "run"
    run_tiny(output, max_steps=1)
    with pytest.raises(ValueError, match=r"resume\.pt belongs to a run with margin 0\.2, now 0\.3\. Resume with"):
        run_tiny(output, opt=tiny_options("scan", margin=0.3), resuming=True)
    with pytest.raises(ValueError, match=r"\[captions, images\] \[42, 14\], now \[36, 12\]"):
        run_tiny(output, train_split=tiny_split(0, 12), resuming=True)
    words = Vocabulary([*WORDS.idx2word.values()][:-1] + ["zebra"])
    with pytest.raises(ValueError, match=r"the words of .*data_vocab\.json, now others"):
        run_tiny(output, words=words, resuming=True)
    with pytest.raises(ValueError, match="module_name None, now 'SGR'"):
        run_tiny(output, "sgr", resuming=True)
    (output / resume.NAME).write_bytes((output / resume.NAME).read_bytes()[:900])
    with pytest.raises(ValueError, match=r"resume\.pt: .* damaged.*; it should be the resume file"):
        run_tiny(output, resuming=True)
    torch.save({"epoch": 1}, output / resume.NAME)
    with pytest.raises(ValueError, match="not a resume file of this version"):
        run_tiny(output, resuming=True)


def test_sgraf_takes_any_number_of_regions(tmp_path):
    few = [Split(s.features[:][:, :5], s.captions, s.caption_to_image) for s in (TRAIN, DEV)]
    arguments = {"progress": False, "device": "cpu", "max_steps": 1}
    train(tiny_options("saf"), *few, WORDS, tmp_path / "run", **arguments)
    assert load(tmp_path / "run" / loop.LAST).opt.num_region == 5
    with pytest.raises(ValueError, match="training has 5, dev 36; pad"):
        train(tiny_options("saf"), few[0], DEV, WORDS, tmp_path / "other", **arguments)


@pytest.mark.parametrize(
    "changes, arguments, sentence",
    [
        ({"img_dim": 2048}, {}, r"img_dim is 2048, but the training split's features \[I, R, F\] are \[14, 36, 12\]"),
        ({}, {"device": "gpu"}, "device must be such as cpu, cuda or cuda:1, got 'gpu'"),
        ({}, {"device": "cuda:99"}, "device cuda:99 is not there; torch sees"),
        ({}, {"max_steps": 0}, "max_steps must be at least 1"),
        ({}, {"train_split": tiny_split(0, 1, 1)}, "at least 2 captions, got 1"),
        ({}, {"backend": "fast"}, "no backend is called 'fast'"),
    ],
)
def test_refuses_bad_arguments(tmp_path, changes, arguments, sentence):
    arguments = {"train_split": TRAIN, "device": "cpu", **arguments}
    with pytest.raises(ValueError, match=sentence):
        train(tiny_options("scan", **changes), arguments.pop("train_split"), DEV, WORDS, tmp_path / "run", **arguments)
    assert not (tmp_path / "run" / loop.LAST).exists()
