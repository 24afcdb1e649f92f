"""Who may write into a run's folder, what a resumption insists on, and what holds from the second epoch on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from training_cases import TRAIN, WORDS, assert_same_run, log_rows, run_tiny, tiny_options, tiny_split

from itm_fast._lock import LockedError
from itm_fast.cli import main
from itm_fast.data import Split, Vocabulary, save_splits
from itm_fast.models import checkpoint
from itm_fast.training import loop, resume, trainer


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """One uninterrupted run of 12 steps."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    run_tiny(folder)
    return folder


def _stopped(output, **changes):
    """A run that stopped after 2 steps, its resume file then changed."""
    run_tiny(output, max_steps=2)
    content = torch.load(output / resume.NAME, weights_only=True)
    for name, value in changes.items():
        if value is None:
            del content[name]
        else:
            content[name] = {**content[name], **value} if isinstance(value, dict) else value
    torch.save(content, output / resume.NAME)


@pytest.mark.parametrize("resuming", [False, True])
def test_a_second_run_into_one_folder_is_refused_by_name_of_the_first(tmp_path, monkeypatch, straight, resuming):
    real, seen = loop.Run._update, []

    def meanwhile(self, batch):
        if not seen:
            seen.append(1)
            self._save_resume()
            with pytest.raises(LockedError, match=rf"run: process {os.getpid()} on .* is writing there since 20"):
                run_tiny(tmp_path / "run", resuming=resuming)
        return real(self, batch)

    monkeypatch.setattr(loop.Run, "_update", meanwhile)
    run_tiny(tmp_path / "run")
    assert_same_run(tmp_path / "run", straight)
    assert not (tmp_path / "run" / trainer.LOCK).exists()


def test_another_process_is_named_on_the_command_line(tmp_path, capsys):
    save_splits(tmp_path / "tiny.h5", {"train": TRAIN, "dev": TRAIN})
    (tmp_path / "run").mkdir()
    code = (
        "import sys; from itm_fast._lock import Lock; lock = Lock(sys.argv[1], 'x'); print('held', flush=True); input()"
    )
    words = [sys.executable, "-c", code, str(tmp_path / "run" / trainer.LOCK)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as first:
        assert first.stdout.readline() == b"held\n"
        words = ["train", "--model", "dual", "--data", f"{tmp_path}/tiny.h5", "--output", f"{tmp_path}/run", "--quiet"]
        small = [
            "--embed-size",
            "8",
            "--word-dim",
            "4",
            "--batch-size",
            "8",
            "--epochs",
            "1",
            "--max-steps",
            "1",
            "--device",
            "cpu",
        ]
        assert main([*words, *small]) == 2
        assert f"itm-fast train: {tmp_path}/run: process {first.pid} on " in capsys.readouterr().err
        assert not (tmp_path / "run" / "log.csv").exists()
        first.communicate(b"\n")
    assert main([*words, *small]) == 0


@pytest.mark.parametrize("at", [2, 6, 8], ids=["in an epoch", "at its end", "in the second"])
def test_a_run_whose_folder_is_no_longer_its_own_stops_and_can_be_resumed(tmp_path, monkeypatch, straight, at):
    output, real, calls = tmp_path / "run", loop.Run._update, []

    def taken_over(self, batch):
        calls.append(1)
        if len(calls) == at:
            self._save_resume()
            (output / trainer.LOCK).unlink()
        return real(self, batch)

    monkeypatch.setattr(loop.Run, "_update", taken_over)
    with pytest.raises(LockedError, match=r"train\.lock was removed or replaced .* stopped before writing any"):
        run_tiny(output)
    assert resume.load(output).iterations == at - 1
    assert len([row for row in log_rows(output) if row["loss"]]) == at - 1, "nothing is written after that"
    calls += [1] * 99
    run_tiny(output, resuming=True)
    assert_same_run(output, straight)


def test_a_checkpoint_is_not_written_into_a_folder_of_another(tmp_path, monkeypatch):
    output, real = tmp_path / "run", loop.Run._validate

    def taken_over(self, *, decide):
        (output / trainer.LOCK).unlink()
        real(self, decide=decide)

    monkeypatch.setattr(loop.Run, "_validate", taken_over)
    with pytest.raises(LockedError):
        run_tiny(output)
    assert not (output / loop.LAST).exists()


def test_a_signal_in_the_second_epoch_loses_no_step(tmp_path, monkeypatch, straight):
    output, real, calls = tmp_path / "run", loop.Run._update, []

    def with_signal(self, batch):
        calls.append(1)
        if len(calls) == 8:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, batch)

    monkeypatch.setattr(loop.Run, "_update", with_signal)
    with pytest.raises(KeyboardInterrupt, match=r"epoch 2 after 8 steps; .*resume\.pt holds step 8"):
        run_tiny(output)
    run_tiny(output, resuming=True)
    assert_same_run(output, straight)


def test_a_long_epoch_saves_once_in_each_interval(tmp_path, monkeypatch):
    clock, saved = iter(range(0, 10**6, 240)), []  # 240 s pass from one reading to the next
    monkeypatch.setattr(loop.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(loop.resume, "save", lambda folder, progress: saved.append(progress.iterations))
    monkeypatch.setattr(loop.Run, "_validate", lambda self, *, decide: None)
    run_tiny(tmp_path / "run", opt=tiny_options("scan", num_epochs=1, batch_size=4))
    assert saved[:-2] == [3, 6, 9]
    assert saved[-2:] == [11, 11]


@pytest.mark.parametrize("place", ["folder", "argument"])
def test_another_vocabulary_of_the_same_size_is_not_resumed_with(tmp_path, place):
    output, other = tmp_path / "run", Vocabulary([*WORDS.idx2word.values()][:-1] + ["zebra"])
    run_tiny(output, max_steps=1)
    assert checkpoint.load(output / loop.LAST).opt.vocab_checksum == WORDS.checksum() != other.checksum()
    other.save(output / "data_vocab.json")
    with pytest.raises(ValueError, match=r"resume\.pt belongs to a run with the words of .*data_vocab\.json, now"):
        run_tiny(output, words=other if place == "argument" else WORDS, resuming=True)
    WORDS.save(output / "data_vocab.json")
    run_tiny(output, resuming=True)


def test_a_run_from_before_checksums_is_resumed(tmp_path):
    run_tiny(tmp_path / "run", max_steps=2)
    content = torch.load(tmp_path / "run" / resume.NAME, weights_only=True)
    del content["options"]["vocab_checksum"]
    torch.save(content, tmp_path / "run" / resume.NAME)
    assert run_tiny(tmp_path / "run", resuming=True).iterations == 12


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"best_rsum": None}, "is not a complete resume file: it holds no best_rsum"),
        ({"best_rsum": 10**400}, "holds a best_rsum that is no finite number"),
        ({"best_rsum": float("nan")}, "holds a best_rsum that is no finite number"),
        ({"epoch": "1", "rng": [1]}, "it holds rng of a list, epoch of a str"),
        ({"optimizer": {"param_groups": []}}, "does not fit its own options"),
        ({"options": {"cross_attn": 3}}, "belongs to a run with cross_attn 3, now 't2i'"),
        (
            {"model": [{}, {}]},
            r"opt describes a model with img_enc\.fc\.weight \[16, 12\], which the weights given lack",
        ),
    ],
)
def test_a_resume_file_that_is_not_whole_is_named(tmp_path, changes, sentence):
    _stopped(tmp_path / "run", **changes)
    with pytest.raises(ValueError, match=rf"resume\.pt:? .*{sentence}"):
        run_tiny(tmp_path / "run", resuming=True)


@pytest.mark.parametrize("name", ["learning_rate", "margin", "max_violation", "grad_clip", "seed", "data_name"])
def test_a_resumption_names_the_option_of_training_that_it_lacks(tmp_path, name):
    run_tiny(tmp_path / "run", max_steps=1)
    content = torch.load(tmp_path / "run" / resume.NAME, weights_only=True)
    del content["options"][name]
    torch.save(content, tmp_path / "run" / resume.NAME)
    with pytest.raises(ValueError, match=rf"not a complete resume file: it holds no option {name}; start in another"):
        resume.load(tmp_path / "run")


def test_a_resume_file_of_no_model_is_named(tmp_path):
    _stopped(tmp_path / "run", options={"system": ["x"]})
    with pytest.raises(ValueError, match=r"resume\.pt: its options describe no known model: "):
        resume.load(tmp_path / "run")


def test_a_pipe_in_place_of_a_resume_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / resume.NAME)
    with pytest.raises(OSError, match=r"is a FIFO, .*resume\.pt"):
        resume.load(tmp_path)


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"num_layers": 10**6}, "num_layers must be at most 100"),
        ({"embed_size": "16"}, "embed_size must be a whole number"),
        ({"embed_size": 10**7}, r"takes [\d,]+\.\d GB to train, and [\d,.]+ GB are free on cpu; choose smaller sizes"),
    ],
)
def test_absurd_options_are_refused_before_anything_is_built(tmp_path, changes, sentence):
    opt = tiny_options("scan")
    vars(opt).update(changes)
    with pytest.raises(ValueError, match=sentence):
        run_tiny(tmp_path / "run", opt=opt)


def test_an_option_that_is_missing_is_named(tmp_path):
    opt = tiny_options("scan")
    del opt.seed, opt.margin
    with pytest.raises(ValueError, match="train: opt lacks margin, seed; give"):
        run_tiny(tmp_path / "run", opt=opt)


def command(output, batch_size, steps):
    """The words of a short `train` command into `output`: those of any run, and those of a new one."""
    sizes = f"--embed-size 8 --word-dim 4 --batch-size {batch_size} --epochs 1 --min-count 1 --max-steps {steps}"
    return ["train", "--output", str(output), "--quiet", "--device", "cpu"], ["--model", "dual", *sizes.split()]


def test_resumption_takes_the_data_from_where_it_is_told(tmp_path, capsys):
    """The data were moved; what is recorded is the new place."""
    old, new = tmp_path / "old.h5", tmp_path / "moved" / "new.h5"
    save_splits(old, {"train": TRAIN, "dev": tiny_split(100, 8)})
    words, small = command(tmp_path / "run", batch_size=8, steps=2)
    assert main([*words, "--data", str(old), *small]) == 0
    new.parent.mkdir()
    old.rename(new)
    assert main([*words, "--resume"]) == 2
    assert f"{old}" in capsys.readouterr().err
    assert main([*words, "--resume", "--data", str(new)]) == 0
    assert resume.load(tmp_path / "run").arguments["data"] == str(new)


def test_features_of_another_size_are_named_with_the_file(tmp_path, capsys):
    def of_size(size, count):
        return Split(np.zeros((count, 36, size), np.float32), ["a cat"] * count, np.arange(count))

    save_splits(tmp_path / "a.h5", {"train": of_size(6, 8), "dev": of_size(6, 4)})
    save_splits(tmp_path / "b.h5", {"train": of_size(5, 8), "dev": of_size(6, 4)})
    words, small = command(tmp_path / "run", batch_size=4, steps=1)
    assert main([*words, *small, "--data", f"{tmp_path}/b.h5"]) == 2
    expected = f"{tmp_path}/b.h5: the train split has 5 features per region, and the dev split 6; both must have"
    assert expected in capsys.readouterr().err
    assert main([*words, *small, "--data", f"{tmp_path}/a.h5"]) == 0
    assert main([*words, "--resume", "--data", f"{tmp_path}/b.h5"]) == 2
    expected = (
        f"{tmp_path}/b.h5: the train split has 5 features per region, and the run in {tmp_path}/run was begun with 6"
    )
    assert expected in capsys.readouterr().err
