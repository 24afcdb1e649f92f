"""`itm-fast train` from the command line: options, refusals, interruption and resumption."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from training_cases import DEV, TRAIN, F, assert_same_run, log_rows, tensors_of

import itm_fast.evaluation
from itm_fast.cli import main
from itm_fast.data import Split, Vocabulary, save_splits
from itm_fast.models import checkpoint
from itm_fast.training import loop, resume


@pytest.fixture
def data(tmp_path):
    save_splits(tmp_path / "tiny.h5", {"train": TRAIN, "dev": DEV})
    return tmp_path / "tiny.h5"


def _words(data, output, *more: object) -> list[str]:
    small = "--embed-size 16 --word-dim 8 --batch-size 8 --epochs 2 --lr 0.002 --min-count 1 --device cpu"
    return [*map(str, ("train", "--data", data, "--output", output, *small.split(), *more))]


def test_command_trains_and_resumes(tmp_path, data, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(_words(data, whole, "--model", "scan", "--direction", "i2t", "--quiet")) == 0
    out, err = capsys.readouterr()
    assert "finished after 12 steps; best rsum" in out
    assert str(whole / "model_best.pth.tar") in out
    assert main(_words(data, parts, "--model", "scan", "--direction", "i2t", "--max-steps", 5)) == 0
    out, err = capsys.readouterr()
    assert "stopped after 5 steps" in out
    assert "SCAN i2t: 42 captions of 14 images (36 regions x 12)" in err
    assert "image to text" in err
    assert main(_words(data, parts, "--model", "scan", "--direction", "i2t", "--quiet")) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert main(["train", "--output", str(parts), "--resume", "--direction", "t2i"]) == 2
    assert "--direction is 't2i', but the run in" in capsys.readouterr().err
    assert main(["train", "--output", str(parts), "--resume", "--margin", "0.5"]) == 2
    assert "margin 0.2, now 0.5" in capsys.readouterr().err
    assert main(["train", "--output", str(parts), "--resume", "--quiet", "--device", "cpu"]) == 0
    a, b = (resume.load(folder) for folder in (whole, parts))
    assert all(torch.equal(x, y) for x, y in zip(tensors_of(a.model), tensors_of(b.model), strict=True))
    found = checkpoint.load(parts / loop.LAST).opt
    assert (found.data_path, found.data_name, found.img_dim) == (str(tmp_path), "tiny", F)
    assert (found.cross_attn, found.lambda_softmax, found.no_imgnorm) == ("i2t", 4.0, False)
    assert (parts / "tiny_vocab.json").is_file()


def test_command_options_reach_the_run(tmp_path, data, capsys):
    more = "--model saf --sim-dim 8 --no-bi-gru --no-max-violation --no-imgnorm --exclude-same-image --seed 3 "
    more += "--margin 0.1 --grad-clip 1 --lr-update 5 --recipe coco --max-steps 1 --limit-dev-captions 3"
    assert main(_words(data, tmp_path / "run", *more.split())) == 0
    assert "dev 3 captions of 1 image; " in capsys.readouterr().err
    opt = checkpoint.load(tmp_path / "run" / loop.LAST).opt
    assert (opt.module_name, opt.bi_gru, opt.max_violation, opt.no_imgnorm) == ("SAF", False, False, True)
    assert (opt.no_txtnorm, opt.exclude_same_image, opt.seed, opt.margin) == (False, True, 3, 0.1)
    assert (opt.grad_clip, opt.lr_update, opt.num_epochs, opt.learning_rate) == (1.0, 5, 2, 0.002)


def test_sgr_without_reasoning_steps_trains_on_the_global_similarity(tmp_path, data):
    assert main(_words(data, tmp_path / "run", "--model", "sgr", "--sgr-steps", 0, "--max-steps", 2, "--quiet")) == 0
    found = checkpoint.load(tmp_path / "run" / loop.LAST)
    assert found.opt.sgr_step == 0
    assert not any(name.startswith("SGR_module.") for name in found.model[2])


def test_a_run_from_before_an_option_was_renamed_resumes(tmp_path, data, capsys):
    words = _words(data, tmp_path / "run", "--model", "scan", "--limit-dev-captions", 9, "--max-steps", 1, "--quiet")
    assert main(words) == 0
    found = resume.load(tmp_path / "run")
    found.arguments["dev_captions"] = found.arguments.pop("limit_dev_captions")
    resume.save(tmp_path / "run", found)
    again = ["train", "--output", f"{tmp_path}/run", "--resume", "--quiet", "--device", "cpu", "--max-steps", "2"]
    assert main([*again, "--limit-dev-captions", "8"]) == 2
    assert "--limit-dev-captions is 8, but the run in" in capsys.readouterr().err
    assert main(again) == 0


@pytest.mark.parametrize(
    "more, sentence",
    [
        ("--quiet", "--model must be given, except with --resume"),
        ("--model scan --sgr-steps 2", "scan has no option --sgr-steps; its options are --agg-func"),
        ("--model tshsr --sgr-steps 0", "--sgr-steps must be at least 1, got 0"),
        ("--model scan --train-split nope", "nope"),
        ("--model scan --vocab missing.json", "missing.json"),
        ("--model scan --backend cuda --quiet", "the backend cuda cannot run on cpu: "),
        ("--model scan --resume", "there is no run to resume"),
    ],
)
def test_command_refuses_in_one_sentence(tmp_path, data, capsys, monkeypatch, more, sentence):
    monkeypatch.chdir(tmp_path)
    assert main([w for w in _words(data, tmp_path / "run", *more.split()) if w not in ("--min-count", "1")]) == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err
    assert err.strip().splitlines()[-1].startswith("itm-fast train: ")
    assert sentence in err


def test_training_on_the_dev_split_is_warned_of(tmp_path):
    words = _words(tmp_path / "nowhere", tmp_path / "run", "--model", "scan", "--train-split", "dev")
    with pytest.warns(UserWarning, match="training and dev split are both dev, so the best epoch is chosen by data"):
        assert main(words) == 2


MEETING = """if True:  # the program, which waits in its ninth step until the test has sent its signal
    import os, pathlib, runpy, time
    from itm_fast.training import loop

    real, folder = loop.Run._update, pathlib.Path(os.environ["MEETING"])

    def update(self, batch):
        if self.iterations == 8:
            (folder / "here").touch()
            while not (folder / "sent").exists():
                time.sleep(0.01)
        return real(self, batch)

    loop.Run._update = update
    runpy.run_module("itm_fast", run_name="__main__", alter_sys=True)
"""


@pytest.mark.slow
def test_ctrl_c_in_a_terminal(tmp_path, data):
    """The whole program: signal, exit code 130, the sentence, and the same weights after --resume."""
    command = [sys.executable, "-m", "itm_fast"]
    environment = {**os.environ, "PYTHONPATH": str(Path(itm_fast.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    small = ("--model", "saf", "--sim-dim", 8, "--epochs", 6, "--quiet")
    subprocess.run([*command, *_words(data, tmp_path / "whole", *small)], env=environment, check=True)
    output, meeting = tmp_path / "parts", {**environment, "MEETING": str(tmp_path)}
    words = [sys.executable, "-c", MEETING, *_words(data, output, *small)]
    process = subprocess.Popen(words, env=meeting, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not (tmp_path / "here").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    (tmp_path / "sent").touch()
    error = process.communicate(timeout=300)[1]
    assert process.returncode == 130, error
    assert "the same command with --resume goes on from there" in error
    assert "Traceback" not in error
    assert resume.load(output).iterations == 9
    subprocess.run([*command, *_words(data, output, *small, "--resume")], env=environment, check=True)
    assert_same_run(output, tmp_path / "whole")
    assert log_rows(output) == log_rows(tmp_path / "whole")


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("when", ["step", "validation", "twice"])
def test_exit_code_tells_the_signal(tmp_path, data, monkeypatch, capsys, number, code, when):
    name = "_validate" if when == "validation" else "_update"
    real = getattr(loop.Run, name)

    def with_signal(self, *args, **options):
        for _ in range(2 if when == "twice" else 1):
            os.kill(os.getpid(), number)
        return real(self, *args, **options)

    monkeypatch.setattr(loop.Run, name, with_signal)
    assert main(_words(data, tmp_path / "run", "--model", "dual", "--quiet")) == code
    assert "itm-fast train: interrupted in epoch 1 after" in capsys.readouterr().err


def test_a_direction_is_for_scan(tmp_path, data, capsys):
    words = ["train", "--model", "sgr", "--direction", "i2t", "--data", str(data)]
    assert main([*words, "--output", f"{tmp_path}/r"]) == 2
    assert "--direction is for --model scan" in capsys.readouterr().err


def test_regions_of_zeros_are_masked_when_asked(tmp_path, monkeypatch):
    features = TRAIN.features[:]
    features[:, 30:] = 0
    save_splits(tmp_path / "tiny.h5", {"train": Split(features, TRAIN.captions, TRAIN.caption_to_image), "dev": DEV})
    seen = []
    monkeypatch.setattr(
        "itm_fast.training.train",
        lambda opt, *splits, **_: (
            seen.append(splits) or SimpleNamespace(finished=True, iterations=0, best_rsum=0.0, best_epoch=0)
        ),
    )
    words = _words(tmp_path / "tiny.h5", tmp_path / "run", "--model", "scan", "--quiet")
    assert main(words) == main([*words, "--mask-zero-regions"]) == 0
    assert seen[0][0].region_lengths is None
    assert [seen[1][n].region_lengths.tolist() for n in (0, 1)] == [[30] * 14, [36] * 8]
    more = ["--model", "scan", "--max-steps", 1, "--quiet"]
    monkeypatch.undo()
    assert main(_words(tmp_path / "tiny.h5", tmp_path / "run", *more, "--mask-zero-regions")) == 0
    assert resume.load(tmp_path / "run").arguments["mask_zero_regions"] is True


def test_the_default_direction_may_be_named_on_resuming(tmp_path, data):
    assert main(_words(data, tmp_path / "run", "--model", "scan", "--quiet", "--max-steps", 1)) == 0
    words = ["train", "--output", f"{tmp_path}/run", "--resume", "--direction", "t2i", "--max-steps", "2"]
    assert main([*words, "--quiet", "--device", "cpu"]) == 0


def test_a_built_vocabulary_counts_train_and_dev(tmp_path, data):
    words = ["train", "--model", "scan", "--data", str(data), "--output", f"{tmp_path}/r", "--max-steps", "1"]
    assert main([*words, "--min-count", "1", "--embed-size", "8", "--word-dim", "4", "--quiet"]) == 0
    (path,) = (tmp_path / "r").glob("*_vocab.json")
    spoken = {word for split in (TRAIN, DEV) for caption in split.captions for word in caption.split()}
    assert spoken <= set(Vocabulary.load(path).word2idx)
