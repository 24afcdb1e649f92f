"""What `itm-fast evaluate --scores` says when it is stopped, on a full disk, and of files that are not its own."""

from __future__ import annotations

import errno
import json
import os
import signal

import numpy as np
import pytest

from itm_fast.cli import main
from itm_fast.evaluation import pipeline, plan, plan_for, score_all
from itm_fast.evaluation.score_file import ScoreFile
from itm_fast.nn import CrossAttentionScore

from . import test_evaluate_cli
from .test_evaluate_scores import command
from .test_evaluation_scoring import Scorer, random_encoded

made = test_evaluate_cli.made


def stops(monkeypatch, where: str, how: str, call: int) -> None:
    """Let the given call of `where` be stopped by a signal, before it does anything."""
    original, seen = getattr(pipeline, where), []

    def stopped(*args, **options):
        seen.append(1)
        if len(seen) == call:
            os.kill(os.getpid(), signal.SIGINT if how == "Ctrl-C" else signal.SIGTERM)
        return original(*args, **options)

    monkeypatch.setattr(pipeline, where, stopped)


@pytest.mark.parametrize("how, code", [("Ctrl-C", 130), ("SIGTERM", 143)])
@pytest.mark.parametrize(
    "where, call, finished",
    [("encode", 1, ()), ("encode", 2, ("s-1",)), ("count_matrix", 1, ("s-1",)), ("_mean_file", 1, ("s-1", "s-2")),
     ("count_matrix", 3, ("s-1", "s-2", "s"))],
)  # fmt: skip
def test_a_stop_outside_scoring_names_the_finished_files(
    made, tmp_path, capsys, monkeypatch, where, call, finished, how, code
):
    stops(monkeypatch, where, how, call)
    words = command(made, "SGR", "SAF", scores=tmp_path / "s.npy")
    assert main(words) == code
    names = ", ".join(f"{tmp_path}/{name}.npy is finished" for name in finished)
    more = f"; {names} and kept: resume (--resume) to go on" if finished else ""
    assert capsys.readouterr().err == f"itm-fast evaluate: interrupted{more}\n"
    monkeypatch.undo()
    assert main([*words, "--resume"] if finished else words) == 0


def test_a_stop_while_a_begun_file_waits_names_it(made, tmp_path, capsys, monkeypatch):
    words = command(made, "SGR", scores=tmp_path / "s.npy")
    with monkeypatch.context() as patch:
        patch.setattr(ScoreFile, "write", lambda *_: os.kill(os.getpid(), signal.SIGINT))
        assert main(words) == 130
    stops(monkeypatch, "encode", "Ctrl-C", 1)
    capsys.readouterr()
    assert main([*words, "--resume"]) == 130
    sentence = f"interrupted; {tmp_path}/s.npy is begun and kept: resume (--resume) to go on"
    assert capsys.readouterr().err == f"itm-fast evaluate: {sentence}\n"


def full_for(monkeypatch, name: str) -> None:
    """Let the disk be full when the file of this name, under the hidden name that it has at first, is written."""
    original = os.fsync

    def fsync(file):
        if f"/.{name}." in os.readlink(f"/proc/self/fd/{file}"):
            raise OSError(errno.ENOSPC, "No space left on device")
        original(file)

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize(
    "file, kept",
    [
        ("s-1.npy.json", "1 of 1 blocks are kept beside {}/s-1.npy"),
        ("s-2.npy.json", "1 of 1 blocks are kept beside {}/s-2.npy"),
        ("s.npy.json", "1 of 1 blocks are kept beside {}/s.npy"),
        ("s-2.npy.journal", "{}/s-1.npy is finished and kept"),
        ("s.npy.journal", "{0}/s-1.npy is finished, {0}/s-2.npy is finished and kept"),
    ],
)  # fmt: skip
def test_a_full_disk_says_what_is_kept_and_nothing_else(made, tmp_path, capsys, monkeypatch, file, kept):
    words = command(made, "SGR", "SAF", scores=tmp_path / "s.npy")
    full_for(monkeypatch, file)
    assert main(words) == 2
    name = f"{tmp_path}/{file.partition('.')[0]}.npy"
    none = "1 MB are needed, and none of it was scored; " if file.endswith("journal") else ""
    sentence = f"No space left on device; {none}{kept.format(tmp_path)}: free some space and resume (--resume) to go on"
    option = "--scores " if name == f"{tmp_path}/s.npy" else ""  # the name that the user gave
    assert capsys.readouterr().err == f"itm-fast evaluate: {option}{name}: {sentence}\n"
    monkeypatch.undo()
    assert main([*words, "--resume"]) == 0


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize("key, value", [("block", [10**30, 10**30]), ("shape", [1, 1]), ("shape", [10**30, 10**30])])
def test_a_score_file_of_another_form_is_refused_by_the_names_to_delete(tmp_path, monkeypatch, key, value, finished):
    encoded, path = random_encoded(5, 6), tmp_path / "x.npy"
    with monkeypatch.context() as patch:
        if not finished:
            patch.setattr(ScoreFile, "finish", lambda _: os.kill(os.getpid(), signal.SIGINT))
        try:
            score_all(Scorer(), encoded, out=path, progress=False)
        except KeyboardInterrupt:
            assert not finished
    source, matrix = ("x.npy.json", "x.npy") if finished else ("x.npy.journal", "x.npy.partial")
    first, *rest = (tmp_path / source).read_text().split("\n") if not finished else [(tmp_path / source).read_text()]
    (tmp_path / source).write_text("\n".join([json.dumps({**json.loads(first), key: value}), *rest]))
    with pytest.raises(
        ValueError, match=rf"of \[\d+, \d+\] scores in .*; give another name, or delete {matrix} and {source}$"
    ):
        score_all(Scorer(), encoded, out=path, resume=True, progress=False)


def test_the_names_to_delete_are_said_where_other_inputs_were_scored(tmp_path):
    encoded, path = random_encoded(5, 6), tmp_path / "x.npy"
    score_all(Scorer(), encoded, out=path, progress=False)
    encoded.fingerprint["features"] = "another"
    with pytest.raises(ValueError, match=r"other features; give another name, or delete x\.npy and x\.npy\.json$"):
        score_all(Scorer(), encoded, out=path, resume=True, progress=False)


@pytest.mark.parametrize("make, kind", [(os.mkdir, "a folder, and a"), (os.mkfifo, "a FIFO, and a regular")])
@pytest.mark.parametrize("more", [[], ["--resume"], ["--dry-run"]])
def test_scores_that_name_no_regular_file_are_refused(made, tmp_path, capsys, make, kind, more):
    make(tmp_path / "s.npy")
    assert main([*command(made, "SGR", scores=tmp_path / "s.npy"), *more]) == 2
    said = capsys.readouterr().err
    assert said == f"itm-fast evaluate: --scores {tmp_path}/s.npy: is {kind} file is needed\n"
    assert os.listdir(tmp_path) == ["s.npy"]


@pytest.mark.parametrize("budget", [float("inf"), 1e308, pytest.param(10**400, id="10**400"), float("nan"), -1.0, 0])
def test_a_budget_that_is_no_number_of_bytes_is_refused(budget):
    with pytest.raises(ValueError, match="must be a number more than 0 GB and at most 1,000,000,000 GB, got"):
        plan(CrossAttentionScore(), images=2, regions=3, dim=4, lengths=np.array([3]), memory_gb=budget)
    with pytest.raises(ValueError, match="must be a number more than 0 GB and at most"):
        plan_for(Scorer(), random_encoded(2, 2), memory_gb=budget)


@pytest.mark.parametrize("budget", ["inf", "1e308"])
def test_an_endless_budget_is_a_sentence_on_the_command_line(made, capsys, budget):
    size = ["evaluate", "--workload", "f30k-eval-1k", "--dry-run", "--checkpoint", f"{made}/SAF.pth.tar"]
    for words in (command(made, "SAF"), size):
        assert main([*words, "--memory-gb", budget]) == 2
        said = capsys.readouterr().err
        assert "the memory budget must be a number more than 0 GB and at most 1,000,000,000 GB, got" in said
        assert len(said.splitlines()) == 1
