"""Score matrices of anyone's: several right images per caption, any cut-offs, `itm-fast metrics`."""

from __future__ import annotations

import errno
import json

import numpy as np
import pytest
import torch

from itm_fast.cli import main
from itm_fast.evaluation import load_ranks, metrics, rate, report
from itm_fast.evaluation.many_right import count_pairs, read_right_pairs, right_items
from itm_fast.evaluation.tie_rules import ranks_of

I, T = 7, 20


@pytest.fixture
def case() -> tuple[np.ndarray, np.ndarray]:
    """Scores with ties, and right pairs: image 6 has no caption, every third caption has two or three images."""
    rng = np.random.default_rng(0)
    score = rng.integers(0, 6, (I, T)).astype(np.float32)
    right = np.zeros((I, T), bool)
    right[rng.integers(0, 6, T), np.arange(T)] = True
    right[rng.integers(0, 6, T)[::3], np.arange(T)[::3]] = True
    right[2, ::6] = True
    return score, np.stack(np.nonzero(right.T)[::-1])


def slow_rank(row: np.ndarray, right: list[int], ties: str) -> int:
    """The place of the first right item in a sorted list, with the other right items left out."""
    best = max(row[right])
    own = max(item for item in right if row[item] == best)
    wrong = [item for item in range(len(row)) if item not in right]
    before = {"pessimistic": lambda item: True, "optimistic": lambda item: False, "published": lambda item: item > own}
    return sum(row[item] > best or (row[item] == best and before[ties](item)) for item in wrong)


@pytest.mark.parametrize("ties", ["pessimistic", "optimistic", "published"])
def test_ranks_with_several_right_images_are_those_of_a_loop(case, ties):
    score, pairs = case
    found = ranks_of(count_pairs(score, pairs, "test"), ties)
    assert found.images.tolist() == list(range(6))
    for query in range(6):
        right = right_items(pairs, "i2t", query).tolist()
        assert found.i2t[query] == slow_rank(score[query], right, ties)
    for query in range(T):
        right = right_items(pairs, "t2i", query).tolist()
        assert found.t2i[query] == slow_rank(score[:, query], right, ties)


def test_one_image_per_caption_gives_the_metrics_of_the_matrix(case):
    score, pairs = case
    owner = np.array([right_items(pairs, "t2i", t)[0] for t in range(T)])
    expected = metrics(score, owner, ties="expected")
    for given in (score, torch.from_numpy(score)):
        found = rate(given, owner, ties="expected")
        assert found.systems[0].pools[0].metrics == expected


def test_chance_counts_every_right_image():
    pairs = np.array([[0, 1, 2, 3], [0, 0, 0, 1]])
    found = rate(np.random.default_rng(0).normal(size=(4, 2)), pairs, cutoffs=(2,)).systems[0].pools[0].metrics
    assert found.t2i.chance[0] == 100 * (3 / 4 + 1 / 4) / 2


def test_the_forms_of_the_file_agree(case, tmp_path):
    _, pairs = case
    rows = [right_items(pairs, "t2i", t).tolist() for t in range(T)]
    dense = np.zeros((I, T), bool)
    dense[pairs[0], pairs[1]] = True
    np.save(tmp_path / "a.npy", dense)
    (tmp_path / "a.json").write_text(json.dumps([row[0] if len(row) == 1 else row for row in rows]))
    (tmp_path / "a.txt").write_text("\ufeff" + "\r\n".join(", ".join(map(str, row)) for row in rows) + "\n\n")
    for name in ("a.npy", "a.json", "a.txt"):
        np.testing.assert_array_equal(read_right_pairs(tmp_path / name, I, T), pairs)
    np.save(tmp_path / "b.npy", np.array([row[0] for row in rows]))
    expected = [[row[0] for row in rows], list(range(T))]
    np.testing.assert_array_equal(read_right_pairs(tmp_path / "b.npy", I, T), expected)


@pytest.fixture
def files(case, tmp_path):
    score, pairs = case
    np.save(tmp_path / "scores.npy", score)
    lines = [" ".join(map(str, right_items(pairs, "t2i", t))) for t in range(T)]
    contents = {
        "right.txt": lines,
        "short.txt": lines[:-1],
        "high.txt": [*lines[:-1], "7"],
        "empty.txt": [*lines[:3], "", *lines[4:]],
        "twice.txt": [*lines[:3], "2 2", *lines[4:]],
    }
    for name, content in contents.items():
        (tmp_path / name).write_text("\n".join(content) + "\n")
    (tmp_path / "true.json").write_text(json.dumps([True] * T))
    np.save(tmp_path / "sims.npy", {"sims": score}, allow_pickle=True)
    np.savez(tmp_path / "sims.npz", sims=score)
    np.save(tmp_path / "whole.npy", score.astype(int))
    (tmp_path / "cut.npy").write_bytes((tmp_path / "scores.npy").read_bytes()[:300])
    return tmp_path


def test_the_command_prints_any_cutoff_and_writes_what_compare_reads(files, case, capsys):
    score, pairs = case
    code = main(
        ["metrics", f"{files}/scores.npy", "--captions-to-images", f"{files}/right.txt", "--at", "2", "20", "--ties",
         "published", "--name", "mine", "--output", f"{files}/out"]
    )  # fmt: skip
    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    found = json.loads((files / "out" / "results.json").read_text())["systems"][0]
    rank = ranks_of(count_pairs(score, pairs, "test"), "published")
    for side, one in (("i2t", rank.i2t), ("t2i", rank.t2i)):
        assert found["recall_at"][side] == {"R@2": 100 * (one < 2).sum() / len(one), "R@20": 100.0}
        assert found["pools"][0][side]["r1"] == 100 * (one < 1).sum() / len(one)
        assert found["recall_at"]["chance"][side]["R@20"] == 100
    totals = np.bincount(pairs[1], minlength=T)
    missed = (I - totals) * (I - 1 - totals) / (I * (I - 1))
    assert found["recall_at"]["chance"]["t2i"]["R@2"] == pytest.approx(100 * (1 - missed.mean()), abs=1e-9)
    assert "R@20" in out
    assert load_ranks(files / "out").names == ("mine",)
    np.testing.assert_array_equal(load_ranks(files / "out").pairs, pairs)


def test_a_full_disk_costs_the_page_and_not_what_compare_reads(files, monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "report.html")

    monkeypatch.setattr(report, "to_html", full)
    words = ["metrics", f"{files}/scores.npy", "--captions-to-images", f"{files}/right.txt", "--output", f"{files}/out"]
    assert main(words) == 2
    assert "report.html: No space left on device" in capsys.readouterr().err
    assert load_ranks(files / "out").names == ("scores",)


@pytest.mark.parametrize(
    "words, sentence",
    [
        ("scores.npy --captions-to-images short.txt", "has 19 captions, and the score matrix has 20 columns"),
        ("scores.npy --captions-to-images high.txt", "19: '7' is no image number from 0 to 6; captions and images"),
        ("scores.npy --captions-to-images empty.txt", "caption 3 has no right image"),
        ("scores.npy --captions-to-images twice.txt", "names an image twice"),
        ("scores.npy --captions-to-images true.json", "caption 0: True is no image number"),
        ("scores.npy --captions-to-images scores.npy", "must hold integers [T] or booleans [I, T]"),
        ("scores.npy --captions-to-images right.txt --folds 7", "some captions have several right images"),
        ("scores.npy --captions-to-images right.txt --at 0", "cut-offs must be at least 1"),
        ("scores.npy --captions-per-image 5", "7 images (rows) and 20 captions (columns)"),
        ("sims.npy --captions-per-image 5", "save the matrix alone: numpy.save(path, scores)"),
        ("sims.npz --captions-per-image 5", "an archive, such as .npz, which may hold several arrays; save the matrix"),
        ("right.txt --captions-per-image 5", "right.txt is not a .npy file; save the matrix alone: numpy.save("),
        ("whole.npy --captions-per-image 5", "must hold floating-point scores"),
        ("cut.npy --captions-per-image 5", "is not a whole .npy file of numbers"),
    ],
)
def test_mistakes_are_told(files, monkeypatch, capsys, words, sentence):
    monkeypatch.chdir(files)
    assert main(["metrics", *words.split(), "--output", "out/of"]) == 2
    err = capsys.readouterr().err
    assert sentence in err
    assert not (files / "out").exists()
    assert "allow_pickle" not in err  # numpy's advice for files of objects is not ours


def test_captions_that_no_page_shows_are_refused(files, capsys):
    words = ["metrics", f"{files}/scores.npy", "--captions-to-images", f"{files}/right.txt"]
    assert main([*words, "--captions", "c.txt"]) == 2
    assert "--captions are for report.html, which --output DIR writes" in capsys.readouterr().err
