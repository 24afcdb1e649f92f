"""Score files that survive an interruption and take no part of another run."""

from __future__ import annotations

import errno
import json
import os
import pathlib
import shutil
import types

import numpy as np
import pytest
import torch

from itm_fast._files import reserve
from itm_fast._lock import LockedError
from itm_fast.evaluation import memory, score_all, score_claim
from itm_fast.evaluation.pipeline import score_files
from itm_fast.evaluation.score_claim import check_room
from itm_fast.evaluation.score_file import ScoreFile

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
def test_a_finished_file_is_used_again_or_refused(tmp_path, monkeypatch):
    encoded, path = random_encoded(7, 23), tmp_path / "x.npy"
    first = score_all(Scorer(), encoded, out=path, progress=False)
    with pytest.raises(FileExistsError, match="exists; give another name"):
        score_all(Scorer(), encoded, out=path, progress=False)
    scorer = Scorer()
    monkeypatch.setitem(memory._BLOCK, "cpu", (500, 256))  # the file keeps the blocks that it was made in
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
            file.seek(128)
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


def test_score_file_refusals(tmp_path):
    encoded = random_encoded(2, 2)
    with pytest.raises(ValueError, match=r"is a \.npy file, got"):
        score_all(Scorer(), encoded, out=tmp_path / "x.h5", progress=False)
    with pytest.raises(FileNotFoundError, match="folder of the score file does not exist"):
        score_all(Scorer(), encoded, out=tmp_path / "no" / "x.npy", progress=False)


# From here on ScoreFile alone: two rows of two blocks each, which hold the numbers 0 to 34 in their places.
SHAPE, RANK, BLOCK = (5, 7), np.array([4, 0, 2, 1, 0, 3, 4]), (3, 3)
RIGHT = np.take(np.arange(25, dtype=np.float32).reshape(5, 5), RANK, axis=1)


def opened(path, resume=False, who="A") -> ScoreFile:
    return ScoreFile(path, SHAPE, RANK, BLOCK, {"scorer": who}, resume)


def fill(file: ScoreFile, numbers=range(4), add=0.0) -> None:
    for number in numbers:
        start, stop = file.rows(number)
        first = number % 2 * 3
        file.write(number, np.arange(25, dtype=np.float32).reshape(5, 5)[start:stop, first : first + 3] + add)


def begun(folder, numbers=(0, 1, 2)):
    with opened(folder / "x.npy") as file:
        fill(file, numbers)
    return folder / "x.npy"


def finished(folder):
    with opened(folder / "x.npy") as file:
        fill(file)
        file.finish()
    return folder / "x.npy"


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_matrix_is_put_together_in_the_captions_order(tmp_path):
    path = finished(tmp_path)
    np.testing.assert_array_equal(np.load(path), RIGHT)
    assert names(tmp_path) == ["x.npy", "x.npy.json"]


def test_the_disk_never_holds_the_matrix_twice(tmp_path, monkeypatch):
    sizes = []

    def measured(source, destination, replace=os.replace):
        sizes.append(sum(file.stat().st_size for file in tmp_path.iterdir()))
        replace(source, destination)

    monkeypatch.setattr(os, "replace", measured)
    with ScoreFile(tmp_path / "x.npy", (300, 300), np.arange(300), (100, 100), {}) as file:
        for number in range(9):
            file.write(number, np.ones((100, 100), np.float32))
        file.finish()
    assert 4 * 300 * 300 < max(sizes) < 1.02 * 4 * 300 * 300


@pytest.mark.usefixtures("small_blocks")
def test_a_second_run_is_refused_by_name_of_the_first(tmp_path):
    encoded, path, refused = random_encoded(7, 23), tmp_path / "x.npy", []

    class Slow(Scorer):
        def score(self, *given):
            if not refused:
                for resume in (False, True):
                    with pytest.raises(LockedError, match=rf"x\.npy: process {os.getpid()} on .* since 2") as refusal:
                        score_all(Scorer(), encoded, out=path, resume=resume, progress=False)
                    refused.append(str(refusal.value))
            return super().score(*given)

    found = score_all(Slow(), encoded, out=path, progress=False)
    assert len(refused) == 2
    assert not any("delete" in sentence for sentence in refused)
    np.testing.assert_array_equal(found, score_all(Scorer(), encoded, progress=False))


@pytest.mark.parametrize("gone", ["partial", "journal", "lock"])
@pytest.mark.parametrize("last", ["write", "finish"])
def test_a_run_stops_when_its_files_are_no_longer_its_own(tmp_path, gone, last):
    first = opened(tmp_path / "x.npy")
    fill(first, range(4) if last == "finish" else [0, 1])
    for end in {gone, "partial", "journal", "lock"} if last == "write" else {gone}:
        (tmp_path / f"x.npy.{end}").unlink()
    if last == "write":
        second = opened(tmp_path / "x.npy", who="B")
        fill(second, [0], add=100)
    with pytest.raises(LockedError, match=rf"x\.npy\.{'' if last == 'write' else gone}.*was removed or replaced"):
        fill(first, [2]) if last == "write" else first.finish()
    first.release()
    assert not {"x.npy", "x.npy.json"} & set(names(tmp_path))
    if last == "write":
        second.release()
        with opened(tmp_path / "x.npy", resume=True, who="B") as again:
            assert again.done == {0}
            fill(again, [1, 2, 3], add=100)
            again.finish()
        np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), RIGHT + 100)


@pytest.mark.parametrize("gone", ["partial", "journal"])
def test_one_removed_file_is_noticed_with_the_lock_in_place(tmp_path, gone):
    with opened(tmp_path / "x.npy") as first:
        (tmp_path / f"x.npy.{gone}").unlink()
        (tmp_path / f"x.npy.{gone}").write_bytes(b"another run's")
        with pytest.raises(LockedError, match=rf"x\.npy\.{gone} was removed or replaced"):
            fill(first, [0])
    assert (tmp_path / f"x.npy.{gone}").read_bytes() == b"another run's"


@pytest.mark.parametrize("step", ["json", "rename", "journal"])
def test_an_interruption_at_the_very_end_loses_nothing(tmp_path, monkeypatch, step):
    replace = os.replace

    def stop(*given, **_):
        if step == "journal" or str(given[0]).endswith(".partial") == (step == "rename"):
            raise KeyboardInterrupt
        replace(*given)

    path = begun(tmp_path, range(4))
    with opened(path, resume=True) as file, monkeypatch.context() as patch:
        if step == "journal":
            patch.setattr(pathlib.Path, "unlink", stop)
        else:
            patch.setattr(os, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            file.finish()
    with opened(path, resume=True) as file:
        assert file.finished == (step == "journal")
        if not file.finished:
            assert len(file.done) == 4
            file.finish()
    np.testing.assert_array_equal(np.load(path), RIGHT)
    assert names(tmp_path) == ["x.npy", "x.npy.json"]


def test_the_last_step_does_not_rename_another_runs_file(tmp_path, monkeypatch):
    with opened(tmp_path / "x.npy") as file:
        fill(file)
        monkeypatch.setattr(json, "dump", lambda *_, **__: (tmp_path / "x.npy.lock").unlink())
        with pytest.raises(LockedError, match="removed or replaced"):
            file.finish()
    assert not (tmp_path / "x.npy").exists()


def test_a_run_that_is_dropped_lets_others_write(tmp_path):
    file = opened(tmp_path / "x.npy")
    del file
    with opened(tmp_path / "x.npy", resume=True) as file:
        assert not file.done


def test_an_attempt_that_was_given_up_does_not_hold_up_the_next_one_of_its_process(tmp_path):
    before = opened(tmp_path / "x.npy")
    fill(before, [0])
    for other in (dict(who="B", resume=True), dict(resume=False)):  # these scores are somebody else's, or begin anew
        with pytest.raises(LockedError, match=f"process {os.getpid()} "):
            opened(tmp_path / "x.npy", **other)
    with opened(tmp_path / "x.npy", resume=True) as again:
        assert again.done == {0}
        with pytest.raises(LockedError, match="removed or replaced"):
            fill(before, [1])
        fill(again, [1])


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), OSError(30, "Read-only file system")])
def test_a_finished_matrix_can_be_read_where_nothing_can_be_written(tmp_path, monkeypatch, error):
    path = finished(tmp_path)

    def refuse(*_):
        raise error

    monkeypatch.setattr(score_claim, "Lock", refuse)
    with opened(path, resume=True) as file:
        assert file.finished
    with pytest.raises(OSError, match=error.strerror):
        opened(path)
    monkeypatch.setattr(score_claim, "Lock", lambda *_: os.stat(tmp_path / "gone"))  # any other error is one
    with pytest.raises(FileNotFoundError):
        opened(path, resume=True)
    monkeypatch.setattr(score_claim, "Lock", refuse)
    with pytest.raises(OSError, match=error.strerror):
        opened(tmp_path / "y.npy", resume=True)


def test_room_is_asked_for_all_files_less_what_is_there(tmp_path, monkeypatch):
    shape, size = (1000, 5000), 4 * 1000 * 5000
    free = types.SimpleNamespace(free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    paths = score_files(tmp_path / "s.npy", 2)
    for count, names_them in ((1, "a score file"), (3, "3 score files, 20 MB each")):
        free.free = count * size
        with pytest.raises(OSError, match=f"no room for {names_them}: .* are free; make room") as refusal:
            check_room(paths[:count], shape)
        assert refusal.value.errno == errno.ENOSPC
        free.free = int(count * size * 1.01)
        assert check_room(paths[:count], shape).startswith(names_them)
    with open(tmp_path / "s-1.npy.partial", "wb") as file:
        reserve(file, size)
    (tmp_path / "s-2.npy").write_bytes(bytes(size))
    with open(tmp_path / "s.npy.partial", "wb") as file:
        file.truncate(size)  # a hole, which is no room
    free.free = int(1.02 * size)
    check_room(paths, shape)
    free.free = int(0.9 * size)
    with pytest.raises(OSError, match="no room"):
        check_room(paths, shape)


@pytest.mark.parametrize("call", ["posix_fallocate", "fsync"])  # for the matrix, for the journal
def test_a_full_disk_is_met_before_anything_is_scored(tmp_path, monkeypatch, call):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, full)
    scorer = Scorer()
    with pytest.raises(OSError, match="No space left on device; 1 MB are needed, and none of it was scored"):
        score_all(scorer, random_encoded(7, 23), out=tmp_path / "x.npy", progress=False)
    assert not scorer.calls["score"]
    assert names(tmp_path) == []


def test_a_partial_file_with_holes_takes_its_room_when_it_is_continued(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    path = begun(tmp_path)
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="1 MB are needed: free some space and resume") as refusal:
        opened(path, resume=True)
    assert refusal.value.filename == str(path)
    monkeypatch.undo()
    with opened(path, resume=True) as file:
        assert len(file.done) == 3


def test_room_is_taken_where_the_system_has_no_call_for_it(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "posix_fallocate")
    np.testing.assert_array_equal(np.load(finished(tmp_path)), RIGHT)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("where", ["middle", "end"])
def test_a_disk_that_fills_up_keeps_blocks_and_says_how_to_go_on(tmp_path, monkeypatch, where):
    encoded, path = random_encoded(7, 23), tmp_path / "x.npy"

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    if where == "end":  # the journal's own first line is a small file, which still finds room
        monkeypatch.setattr(os, "fsync", lambda file: full() if os.fstat(file).st_size > 700 else None)
    else:
        original = ScoreFile.write
        monkeypatch.setattr(
            ScoreFile, "write", lambda self, *given: full() if len(self.done) == 5 else original(self, *given)
        )
    kept = 18 if where == "end" else 5
    sentence = rf"No space left on device; {kept} of 18 blocks are kept .*: free some space and resume \(--resume\)"
    with pytest.raises(OSError, match=sentence) as refusal:
        score_all(Scorer(), encoded, out=path, progress=False)
    assert "nothing" not in str(refusal.value)
    assert refusal.value.filename == str(path)
    assert names(tmp_path) == ["x.npy.journal", "x.npy.partial"]
    monkeypatch.undo()
    scorer = Scorer()
    score_all(scorer, encoded, out=path, resume=True, progress=False)
    assert scorer.calls["score"] == 18 - kept
