"""Score files and journals that were damaged: named, and recomputed or refused in one sentence; never taken."""

from __future__ import annotations

import errno
import itertools
import os
import re
from types import SimpleNamespace

import numpy as np
import pytest

from itm_fast.evaluation import score_all
from itm_fast.evaluation.score_claim import kept_block
from itm_fast.evaluation.score_file import ScoreFile

from .test_evaluation_score_file import BLOCK, RANK, RIGHT, SHAPE, begun, fill, finished, names, opened
from .test_evaluation_scoring import Scorer, random_encoded


@pytest.mark.parametrize("what", ["zeros", "NaN"])
@pytest.mark.parametrize("row, images, lost", [(0, "0 to 2", {0, 1}), (4, "3 to 4", {2, 3})])
def test_damaged_rows_of_a_finished_matrix_are_named_and_scored_again(tmp_path, row, images, lost, what):
    path = finished(tmp_path)
    matrix = np.load(path, mmap_mode="r+")
    matrix[row, 3] = 0 if what == "zeros" else np.nan
    matrix.flush()
    with pytest.warns(UserWarning, match=rf"x\.npy is damaged: images {images} do not match"):
        file = opened(path, resume=True)
    assert not file.finished
    assert set(range(4)) - file.done == lost
    file.release()  # and interrupted once more
    with opened(path, resume=True) as file:
        fill(file, lost)
        file.finish()
    with opened(path, resume=True) as file:
        assert file.finished
    np.testing.assert_array_equal(np.load(path), RIGHT)
    assert names(tmp_path) == ["x.npy", "x.npy.json"]


def written(change):
    def damage(path):
        with open(path, "wb") as file:
            np.save(file, change(RIGHT), allow_pickle=True)

    return damage


def swapped(old, new):
    return lambda path: path.with_name("x.npy.json").write_text(
        path.with_name("x.npy.json").read_text().replace(old, new)
    )


@pytest.mark.parametrize(
    "damage, named",
    [
        (lambda path: path.write_bytes(b""), "x.npy is damaged"),
        (lambda path: os.truncate(path, 140), "x.npy is damaged"),
        (lambda path: path.write_bytes(path.read_bytes() + b"0000"), "x.npy is damaged"),
        (lambda path: path.write_bytes(b"P" + path.read_bytes()[1:]), "x.npy is damaged"),
        (written(np.asfortranarray), "x.npy is damaged"),
        (written(lambda a: a.astype(">f4")), "x.npy is damaged"),
        (written(lambda a: a.astype("f8")), "x.npy is damaged"),
        (written(lambda a: a.reshape(7, 5)), "x.npy is damaged"),
        (written(lambda a: np.array([print], object)), "x.npy is damaged"),
        (lambda path: path.with_name("x.npy.json").unlink(), "x.npy has no x.npy.json beside it"),
        (lambda path: path.with_name("x.npy.json").write_text("[]"), "x.npy.json is damaged"),
        (lambda path: path.with_name("x.npy.json").write_text(""), "x.npy.json is damaged"),
        (lambda path: path.with_name("x.npy.json").write_text("{"), "x.npy.json is damaged"),
        (lambda path: path.with_name("x.npy.json").write_text("{}"), "x.npy.json is damaged"),
        (lambda path: path.with_name("x.npy.json").write_text("[" * 100_000), "x.npy.json is damaged"),
        (lambda path: path.with_name("x.npy.json").write_bytes(b"\xff"), "x.npy.json is damaged"),
        (swapped('"checksums": [', '"checksums": [0,'), "x.npy.json is damaged"),
        (swapped("checksums", "sums"), "x.npy.json is damaged"),
        (swapped("identity", "entity"), "x.npy.json is damaged"),
        (swapped('"A"', '["A"]'), "computed with other scorer"),
        (swapped('"block": [\n  3', '"block": [\n  0'), "x.npy.json is damaged"),
        (swapped('"shape": [\n  5', '"shape": [\n  4'), "x.npy.json is of"),
    ],
)
def test_a_finished_file_that_is_something_else_is_refused_by_name(tmp_path, damage, named):
    path = finished(tmp_path)
    damage(path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=re.escape(named)) as refusal:
        opened(path, resume=True)
    assert "delete" in str(refusal.value)
    assert len(str(refusal.value).splitlines()) == 1
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_journal_may_be_cut_at_every_byte(tmp_path):
    path = begun(tmp_path, [0, 2, 1])
    journal, partial = tmp_path / "x.npy.journal", tmp_path / "x.npy.partial"
    whole, scores = journal.read_bytes(), partial.read_bytes()
    header = whole.index(b"\n")
    ends = list(itertools.accumulate(map(len, whole.splitlines(True))))[1:]
    seen: list[set[int]] = []
    for cut in range(len(whole) + 1):
        journal.write_bytes(whole[:cut])
        partial.write_bytes(scores)
        if cut < header:
            with pytest.raises(ValueError, match=r"x\.npy\.journal is damaged .* delete it and x\.npy\.partial"):
                opened(path, resume=True)
            continue
        done = {block for block, end in zip((0, 2, 1), ends, strict=True) if cut >= end - 1}
        for _ in range(2):  # interrupted again at once
            with opened(path, resume=True) as file:
                assert file.done == done, cut
        if done not in seen:
            with opened(path, resume=True) as file:
                fill(file, set(range(4)) - done)
                file.finish()
            np.testing.assert_array_equal(np.load(path), RIGHT)
            path.unlink()
            seen.append(done)
    assert seen == [set(), {0}, {0, 2}, {0, 1, 2}]


@pytest.mark.parametrize(
    "junk, lost",
    [
        (b"\n\n \n", set()),
        (b"\0\0\0\0", set()),
        (b"\xff\xfe rubbish\n", set()),
        (b"4 17\n99999999999999999999 5\n-1 5\n", set()),
        (b"3 17\n3", set()),
        (b"2 17\n", {2}),
        (b"1 1 1\n1\n1 x\n", set()),
    ],
)
def test_lines_of_a_journal_that_cannot_be_read_are_skipped(tmp_path, junk, lost):
    path = begun(tmp_path)
    with open(tmp_path / "x.npy.journal", "ab") as journal:
        journal.write(junk)
    for _ in range(2):
        with opened(path, resume=True) as file:
            assert file.done == {0, 1, 2} - lost
    with opened(path, resume=True) as file:
        fill(file, set(range(4)) - file.done)
        file.finish()
    np.testing.assert_array_equal(np.load(path), RIGHT)


@pytest.mark.parametrize(
    "header",
    ["", "[]", "{}", "null", "rubbish", '{"identity": {}, "shape": [5, 7]}', "[" * 100_000,
     '{"identity": [], "shape": [5, 7], "block": [3, 3]}', '{"identity": {}, "shape": [5, 7], "block": [0, 3]}',
     '{"identity": {}, "shape": [5, 7], "block": 3}', '{"identity": {}, "shape": [5, 7], "block": ["3", "3"]}'],
)  # fmt: skip
def test_a_damaged_header_of_a_journal_is_refused_with_the_remedy(tmp_path, header):
    path = begun(tmp_path)
    (tmp_path / "x.npy.journal").write_text(header + "\n0 1\n")
    for refused in (lambda: opened(path, resume=True), lambda: kept_block(path, SHAPE)):
        with pytest.raises(ValueError, match=r"x\.npy\.journal is damaged .*; delete it and x\.npy\.partial") as found:
            refused()
        assert len(str(found.value).splitlines()) == 1


def test_blocks_of_another_form_are_not_taken(tmp_path):
    path = begun(tmp_path)
    with pytest.raises(ValueError, match=r"journal is of \[5, 7\] scores in blocks of \[3, 3\], not of \[5, 7\] in"):
        ScoreFile(path, SHAPE, RANK, (2, 3), {"scorer": "A"}, resume=True)
    with ScoreFile(path, SHAPE, np.roll(RANK, 1), BLOCK, {"scorer": "A"}, resume=True) as file:
        assert not file.done  # other captions in the columns: other bytes


def test_a_partial_file_that_is_gone_is_named(tmp_path):
    path = begun(tmp_path)
    (tmp_path / "x.npy.partial").unlink()
    with pytest.raises(ValueError, match=r"x\.npy\.partial does not hold what x\.npy\.journal says; delete both"):
        opened(path, resume=True)


def test_a_block_that_was_changed_on_the_disk_is_noticed_before_the_end(tmp_path):
    path = tmp_path / "x.npy"
    with opened(path) as file:
        fill(file)
        with open(tmp_path / "x.npy.partial", "r+b") as other:
            other.seek(-1, os.SEEK_END)
            other.write(b"\x01")
        with pytest.raises(OSError, match=r"x\.npy\.partial: 1 blocks were changed on the disk"):
            file.finish()
        assert len(file.done) == 3
    with opened(path, resume=True) as file:
        assert len(file.done) == 3


def test_a_line_that_a_full_disk_cuts_short_is_no_finished_block(tmp_path):
    path = tmp_path / "x.npy"
    with opened(path) as file:
        journal = file._files[file.claim.journal]
        file._files[file.claim.journal] = SimpleNamespace(
            write=lambda line: journal.write(line[:2]), fileno=journal.fileno
        )
        with pytest.raises(OSError, match="No space left"):
            fill(file, [0])
        assert not file.done
    with opened(path, resume=True) as file:
        fill(file)
        file.finish()
    np.testing.assert_array_equal(np.load(path), RIGHT)


def test_missing_blocks_are_not_finished(tmp_path):
    with opened(tmp_path / "x.npy") as file:
        fill(file, [0, 3])
        with pytest.raises(ValueError, match="2 of 4 blocks are missing"):
            file.finish()


@pytest.mark.parametrize("name", ["x.npy", "x.npy.json"])
def test_a_fifo_is_not_waited_for(tmp_path, name):
    path = finished(tmp_path)
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    with pytest.raises(OSError, match="is a FIFO"):
        opened(path, resume=True)


def test_only_for_a_full_disk_does_the_message_ask_for_space(tmp_path, monkeypatch):
    def broken(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(ScoreFile, "write", broken)
    with pytest.raises(OSError, match=r"Input/output error; 0 of 1 blocks are kept .*x\.npy: resume \(--resume\)"):
        score_all(Scorer(), random_encoded(2, 2), out=tmp_path / "x.npy", progress=False)
