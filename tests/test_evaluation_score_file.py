"""Score files that survive an interruption and take no part of another run."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

from itm_fast.evaluation import memory, score_all

from .test_evaluation_scoring import Scorer, random_encoded, small_blocks  # noqa: F401


def interrupted(path, encoded, after: int) -> None:
    scorer = Scorer()
    scorer.stop_after = after
    with pytest.raises(KeyboardInterrupt, match=rf"{after} of 18 blocks are kept beside .*x\.npy: resume"):
        score_all(scorer, encoded, out=path, progress=False)


@pytest.mark.usefixtures("small_blocks")
def test_interruption_keeps_blocks_and_resuming_skips_them(tmp_path):
    encoded, path = random_encoded(7, 23), tmp_path / "x.npy"
    interrupted(path, encoded, 7)
    assert sorted(os.listdir(tmp_path)) == ["x.npy.journal", "x.npy.partial"]
    with pytest.raises(FileExistsError, match="begun and interrupted"):
        score_all(Scorer(), encoded, out=path, progress=False)
    scorer = Scorer()
    found = score_all(scorer, encoded, out=path, resume=True, progress=False)
    assert scorer.calls["score"] == 11
    assert sorted(os.listdir(tmp_path)) == ["x.npy", "x.npy.json"]
    np.testing.assert_array_equal(found, score_all(Scorer(), encoded, progress=False))
    np.testing.assert_array_equal(np.load(path, allow_pickle=False), found)


@pytest.mark.usefixtures("small_blocks")
def test_a_finished_file_is_used_again_or_refused(tmp_path):
    encoded, path = random_encoded(7, 23), tmp_path / "x.npy"
    first = score_all(Scorer(), encoded, out=path, progress=False)
    with pytest.raises(FileExistsError, match="exists; give another name"):
        score_all(Scorer(), encoded, out=path, progress=False)
    scorer = Scorer()
    again = score_all(scorer, encoded, out=path, resume=True, progress=False)
    assert scorer.calls["score"] == 0
    np.testing.assert_array_equal(again, first)
    with torch.no_grad():
        scorer.weight.fill_(2.0)
    with pytest.raises(ValueError, match="computed with other scorer"):
        score_all(scorer, encoded, out=path, resume=True, progress=False)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("change", ["features", "captions", "encoders", "scorer", "precision"])
def test_another_checkpoint_or_data_cannot_be_mixed_in(change, tmp_path, monkeypatch):
    encoded, path, scorer = random_encoded(7, 23), tmp_path / "x.npy", Scorer()
    interrupted(path, encoded, 7)
    if change == "scorer":
        with torch.no_grad():
            scorer.weight.fill_(2.0)
    elif change == "precision":
        monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    else:
        encoded.fingerprint[change] = "another"
    with pytest.raises(ValueError, match=f"computed with other .*{change}"):
        score_all(scorer, encoded, out=path, resume=True, progress=False)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("damage", ["bytes", "torn line", "size"])
def test_damaged_blocks_are_scored_again(damage, tmp_path):
    encoded, path = random_encoded(7, 23), tmp_path / "x.npy"
    interrupted(path, encoded, 7)
    partial, journal = tmp_path / "x.npy.partial", tmp_path / "x.npy.journal"
    scorer = Scorer()
    if damage == "size":
        os.truncate(partial, 100)
        with pytest.raises(ValueError, match="does not hold what"):
            score_all(scorer, encoded, out=path, resume=True, progress=False)
        return
    if damage == "bytes":
        with open(partial, "r+b") as file:
            file.write(b"\x01\x02")
    else:
        os.truncate(journal, journal.stat().st_size - 3)
    found = score_all(scorer, encoded, out=path, resume=True, progress=False)
    assert scorer.calls["score"] == 12
    np.testing.assert_array_equal(found, score_all(Scorer(), encoded, progress=False))


@pytest.mark.usefixtures("small_blocks")
def test_a_run_can_be_torn_twice(tmp_path):
    encoded, path = random_encoded(7, 23), tmp_path / "x.npy"
    interrupted(path, encoded, 7)
    journal = tmp_path / "x.npy.journal"
    os.truncate(journal, journal.stat().st_size - 3)
    scorer = Scorer()
    scorer.stop_after = 4
    with pytest.raises(KeyboardInterrupt, match="10 of 18 blocks"):
        score_all(scorer, encoded, out=path, resume=True, progress=False)
    scorer = Scorer()
    score_all(scorer, encoded, out=path, resume=True, progress=False)
    assert scorer.calls["score"] == 8


@pytest.mark.usefixtures("small_blocks")
def test_a_continued_run_keeps_the_block_size_it_began_with(tmp_path, monkeypatch):
    encoded, path = random_encoded(7, 23), tmp_path / "x.npy"
    interrupted(path, encoded, 7)
    monkeypatch.setitem(memory._BLOCK, "cpu", (500, 256))
    scorer = Scorer()
    found = score_all(scorer, encoded, out=path, resume=True, progress=False)
    assert scorer.calls["score"] == 11
    np.testing.assert_allclose(found, score_all(Scorer(), encoded, progress=False), rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("small_blocks")
def test_a_full_disk_leaves_no_file_that_looks_whole(tmp_path, monkeypatch):
    encoded, path = random_encoded(7, 23), tmp_path / "x.npy"

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        score_all(Scorer(), encoded, out=path, progress=False)
    monkeypatch.undo()
    assert "x.npy" not in os.listdir(tmp_path)
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".unfinished")]


def test_score_file_refusals(tmp_path):
    encoded = random_encoded(2, 2)
    with pytest.raises(ValueError, match=r"is a \.npy file, got"):
        score_all(Scorer(), encoded, out=tmp_path / "x.h5", progress=False)
    with pytest.raises(FileNotFoundError, match="folder of the score file does not exist"):
        score_all(Scorer(), encoded, out=tmp_path / "no" / "x.npy", progress=False)
    (tmp_path / "x.npy.journal").write_text("rubbish\n")
    with pytest.raises(ValueError, match=r"x\.npy\.journal is damaged"):
        score_all(Scorer(), encoded, out=tmp_path / "x.npy", resume=True, progress=False)
