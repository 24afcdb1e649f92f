"""`itm-fast evaluate --scores`: one writer, room on the disk, interruption, ensembles, and equal captions."""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import types
from pathlib import Path

import numpy as np
import pytest

from itm_fast._lock import Lock
from itm_fast.cli import main
from itm_fast.data import Split
from itm_fast.evaluation import evaluate
from itm_fast.models import build
from itm_fast.nn import CrossAttentionScore

from . import test_evaluate_cli
from .test_evaluation_report import models, options, pets

made = test_evaluate_cli.made


def command(root: Path, *kinds: str, scores: Path | None = None) -> list[str]:
    words = ["evaluate", "--data", f"{root}/pets_precomp", "--no-progress"]
    for kind in kinds:
        words += ["--checkpoint", f"{root}/{kind}.pth.tar"]
    return words if scores is None else [*words, "--scores", str(scores)]


def test_sigterm_ends_as_ctrl_c_does_with_its_own_code(made, tmp_path, capsys, monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(CrossAttentionScore, "score", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    assert main(command(made, "SCAN", scores=tmp_path / "s.npy")) == 143
    sentence = f"0 of 1 blocks are kept beside {tmp_path}/s.npy: resume (--resume) to go on"
    assert capsys.readouterr().err == f"itm-fast evaluate: interrupted; {sentence}\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s.npy.journal", "s.npy.partial"]
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("file", ["s.npy", "s-1.npy", "s-2.npy"])
def test_every_file_of_an_ensemble_is_claimed_before_anything_is_encoded(
    made, tmp_path, capsys, monkeypatch, file
):
    monkeypatch.setattr("itm_fast.evaluation.pipeline.encode", lambda *_, **__: pytest.fail("encoded"))
    words = command(made, "SGR", "SAF", scores=tmp_path / "s.npy")
    with Lock(tmp_path / f"{file}.lock", "x"):
        for more in ([], ["--resume"]):
            assert main([*words, *more]) == 2
            error = capsys.readouterr().err
            assert f"{tmp_path}/{file}: process {os.getpid()} on {platform.node()} is writing there since" in error
    assert not list(tmp_path.iterdir())
    (tmp_path / file).touch()
    assert main(words) == 2
    assert f"{file} exists" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [file]


def test_two_runs_do_not_share_an_output_folder(made, tmp_path, capsys, monkeypatch):
    words = [*command(made, "SAF"), "--output", str(tmp_path)]
    with monkeypatch.context() as patch, Lock(tmp_path / "results.lock", "x"):
        patch.setattr("itm_fast.evaluation.evaluate", lambda *_, **__: pytest.fail("scored"))
        assert main(words) == 2
        assert f"{tmp_path}/results.*: process {os.getpid()} on " in capsys.readouterr().err
        assert main([*words, "--dry-run"]) == 0
    assert main(words) == 0
    assert "results.lock" not in os.listdir(tmp_path)


def test_a_run_that_is_refused_leaves_no_empty_output_folder(made, tmp_path, capsys):
    words = [*command(made, "SAF"), "--split", "tset"]
    kept = tmp_path / "kept"
    kept.mkdir()
    for folder in (tmp_path / "new", kept):
        assert main([*words, "--output", str(folder)]) == 2
        assert "tset" in capsys.readouterr().err
    assert list(tmp_path.rglob("*")) == [kept]


@pytest.mark.parametrize("more", [(), ("--dry-run",)])
def test_a_disk_too_small_for_an_ensemble_is_refused_before_encoding(
    made, tmp_path, capsys, monkeypatch, more
):
    monkeypatch.setattr("itm_fast.evaluation.pipeline.encode", lambda *_, **__: pytest.fail("encoded"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=3 * 4 * 10 * 50 - 1))
    assert main([*command(made, "SGR", "SAF", scores=tmp_path / "s.npy"), *more]) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path}: no room for 3 score files, 1 MB each" in error
    assert len(error.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_dry_run_names_the_disk_that_scores_need(made, tmp_path, capsys, monkeypatch):
    assert main([*command(made, "SAF", scores=tmp_path / "s.npy"), "--dry-run"]) == 0
    assert "a score file: 1 MB are still to be written" in capsys.readouterr().out
    size = ["evaluate", "--workload", "f30k-eval-1k", "--dry-run", "--checkpoint", f"{made}/SAF.pth.tar", "--scores"]
    assert main([*size, f"{tmp_path}/s.npy"]) == 0
    assert "a score file: 21 MB are still to be written" in capsys.readouterr().out
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=20 * 10**6))
    assert main([*size, f"{tmp_path}/s.npy"]) == 2
    assert "no room for a score file: 21 MB are still to be written, 20 MB are free" in capsys.readouterr().err


def test_an_interrupted_ensemble_goes_on_and_its_mean_is_never_another_file(made, tmp_path, capsys):
    words = command(made, "SGR", "SAF", scores=tmp_path / "s.npy")
    assert main(words) == 0
    first = np.load(tmp_path / "s.npy")
    for gone in ("s.npy", "s-2.npy"):
        (tmp_path / gone).unlink()
        assert main([*words, "--resume"]) == 0
        np.testing.assert_array_equal(np.load(tmp_path / "s.npy"), first)
    for gone in ("s-1.npy", "s-2.npy"):
        (tmp_path / gone).unlink()
    capsys.readouterr()
    assert main([*command(made, "SAF", "SCAN", scores=tmp_path / "s.npy"), "--resume"]) == 2
    assert "s.npy.json it was computed with other members" in capsys.readouterr().err
    assert main([*command(made, "SGR", scores=tmp_path / "s.npy"), "--resume"]) == 2
    assert "s.npy cannot be continued or used again" in capsys.readouterr().err
    assert main(command(made, "SGR", scores=tmp_path / "t.npy")) == 0
    before = (tmp_path / "t.npy").read_bytes()
    assert main([*command(made, "SGR", "SAF", scores=tmp_path / "t.npy"), "--resume"]) == 2
    assert "t.npy cannot be continued or used again" in capsys.readouterr().err
    assert (tmp_path / "t.npy").read_bytes() == before


@pytest.mark.parametrize("count, name", [(1, "score matrix"), (2, "2 score matrices"), (3, "2 score matrices")])
def test_an_ensemble_in_memory_plans_its_sum_beside_the_matrix_at_hand(count, name):
    split, vocabulary = pets()
    nets = models(vocabulary, "SGR", "SAF", "SCAN")[:count]
    for plan in evaluate(nets, split, vocabulary, progress=False).settings["memory_plan_gb"]:
        assert plan[name] == min(count, 2) * 4 * 10 * 50 / 1e9


def test_equal_captions_tie_exactly_and_are_counted(made, tmp_path, capsys):
    split, vocabulary = pets()
    texts = [split.captions[t % 20] for t in range(50)]
    again = Split(split.features, texts, split.caption_to_image)
    net = build(options("SAF", len(vocabulary)))
    found = evaluate(net, again, vocabulary, progress=False, scores=tmp_path / "s.npy")
    assert (found.settings["captions"], found.settings["distinct_captions"]) == (50, 20)
    np.testing.assert_array_equal(found.score, found.score[:, np.arange(50) % 20])
    assert found.systems[0].seconds is not None
    assert found.systems[0].pairs_per_second == 10 * 20 / found.systems[0].seconds["score"]
    assert main([*command(made, "SAF"), "--output", f"{tmp_path}/out"]) == 0
    distinct = len(set(split.captions))
    assert f"captions: 50, {distinct} distinct" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "results.json").read_text())["settings"]["distinct_captions"] == distinct
