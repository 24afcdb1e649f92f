"""Two evaluated models held against each other: kept ranks, the paired bootstrap, `itm-fast compare`."""

from __future__ import annotations

import json

import numpy as np
import pytest

from itm_fast.cli import main
from itm_fast.evaluation import KeptRanks, compare, load_ranks, metrics
from itm_fast.evaluation.counting import count
from itm_fast.evaluation.kept_ranks import chance, recall_at
from itm_fast.evaluation.many_right import pairs_of
from itm_fast.evaluation.tie_rules import TIES, metrics_of

SAMPLES = 4000


def kept(
    signal: float, seed: int, images: int = 60, per_image: int = 3, data: str = "", same: bool = False
) -> KeptRanks:
    """Ranks of random scores to whose right pairs `signal` is added; rounded, so that there are ties.

    With `same`, the captions of an image are the same.
    """
    owner = np.arange(images * per_image) // per_image
    score = np.random.default_rng(seed).normal(size=(images, len(owner)))
    score[owner, np.arange(len(owner))] += signal
    score = score[:, owner * per_image] if same else score
    return KeptRanks(("SCAN",), (count(score.round(1), owner, "test"),), pairs_of(owner), data)


def test_kept_ranks_come_back_whole_and_give_every_recall(tmp_path):
    found = kept(2.0, 0, data="abc")
    assert found.save(tmp_path / "ranks.npz").stat().st_size < 4000
    back = load_ranks(tmp_path)
    assert (back.names, back.data) == (("SCAN",), "abc")
    np.testing.assert_array_equal(back.pairs, found.pairs)
    for rule in TIES:
        expected, again = (metrics_of(one.counts[0], rule) for one in (found, back))
        assert again == expected
        sides = (back.counts[0].i2t, expected.i2t, 180), (back.counts[0].t2i, expected.t2i, 60)
        for side, known, pool in sides:
            assert tuple(recall_at(side, k, rule) for k in (1, 5, 10)) == known.recalls
            assert tuple(chance(side, pool, k) for k in (1, 5, 10)) == pytest.approx(known.chance, abs=1e-9)


def test_the_interval_has_the_width_of_the_cluster_variance():
    """The captions of an image are drawn together: the standard error of t2i R@1 is that of the sums per image."""
    a, b = kept(1.5, 1, same=True), kept(2.5, 2, same=True)
    change = [(one.counts[0].t2i.above + one.counts[0].t2i.tied < 1).astype(float) for one in (a, b)]
    per_image = (change[1] - change[0]).reshape(60, 3).sum(1)
    error = 100 * per_image.std() / 3 / np.sqrt(60)
    row = next(
        row for row in compare(a, b, samples=SAMPLES, confidence=0.6827).rows if row.metric == "text to image R@1"
    )
    assert row.difference == pytest.approx(100 * (change[1] - change[0]).mean())
    # A quantile of 4,000 samples at one standard error is known to 1.5 standard errors / sqrt(4,000); steps are 1/180.
    assert (row.high - row.low) / 2 == pytest.approx(error, abs=5 * 1.5 * error / np.sqrt(SAMPLES) + 100 / 180)


def test_equal_models_do_not_differ_and_a_perfect_one_does():
    a, b = kept(1.0, 3), kept(100.0, 4)
    for row in compare(a, a, samples=100).rows:
        assert (row.difference, row.low, row.high, row.p) == (0, 0, 0, 1)
    found = compare(a, b, samples=SAMPLES, cutoffs=(1, 2))
    assert [row.metric for row in found.rows] == [
        "image to text R@1", "image to text R@2", "text to image R@1", "text to image R@2", "sum",
    ]  # fmt: skip
    for row in found.rows:
        assert row.p == 2 / (SAMPLES + 1)
        assert row.low > 0
    back = compare(b, a, samples=SAMPLES, cutoffs=(1, 2))
    assert [row.difference for row in back.rows] == [-row.difference for row in found.rows]


def test_seeds_widen_the_interval_and_are_averaged():
    a = [kept(signal, 5) for signal in (1.0, 2.0, 3.0)]
    b = kept(2.0, 6)
    one, several = compare(a[1], b, samples=1000), compare(a, b, samples=1000)
    assert several.runs == (3, 1)
    assert several.rows[0].a == pytest.approx(np.mean([metrics_of(run.counts[0], "pessimistic").i2t.r1 for run in a]))
    assert several.rows[-1].high - several.rows[-1].low > 1.5 * (one.rows[-1].high - one.rows[-1].low)


def test_expected_ties_are_averaged():
    owner = np.arange(8)
    flat = KeptRanks(("flat",), (count(np.zeros((8, 8), np.float32), owner, "test"),), pairs_of(owner))
    row = compare(flat, flat, ties="expected", samples=10).rows[0]
    assert row.a == pytest.approx(metrics(np.zeros((8, 8), np.float32), owner, ties="expected").i2t.r1) == 12.5


@pytest.mark.parametrize(
    "other, options, sentence",
    [
        (kept(1, 0, 30), {}, "one run has 60 images and 180 captions, another 30 images and 90 captions"),
        (kept(1, 0, 60, data="b"), {}, "of other captions"),
        (kept(1, 0), {"ties": "best"}, "ties must be one of"),
        (kept(1, 0), {"cutoffs": [0]}, "cut-offs must be at least 1"),
        (kept(1, 0), {"confidence": 95}, "confidence in"),
        ([], {}, "at least one run"),
    ],
)
def test_what_cannot_be_compared_is_refused(other, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        compare(kept(1, 0, data="a"), other, **options)


def test_the_command_reads_folders_and_seeds(tmp_path, capsys):
    for name, signal, seed in (("a/s1", 1, 1), ("a/s2", 1, 2), ("b", 100, 3)):
        (tmp_path / name).mkdir(parents=True)
        kept(signal, seed).save(tmp_path / name / "ranks.npz")
    words = [
        "compare",
        f"{tmp_path}/a",
        f"{tmp_path}/b",
        "--samples",
        "50",
        "--at",
        "1",
        "--output",
        f"{tmp_path}/c.json",
    ]
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [f"A: SCAN ({tmp_path}/a), 2 runs", f"B: SCAN ({tmp_path}/b)"]
    assert lines[3].split() == ["A", "B", "B", "-", "A", "95", "%", "interval", "p"]
    found = json.loads((tmp_path / "c.json").read_text())
    assert [row["b"] for row in found["metrics"]] == [100, 100, 200]
    assert found["a"]["runs"] == 2


def test_an_output_that_cannot_be_written_is_told_first(tmp_path, capsys):
    for output, sentence in (("no/c.json", "/no/c.json does not exist; make it first"), ("", "is a folder; give")):
        assert main(["compare", "no-a", "no-b", "--output", f"{tmp_path}/{output}"]) == 2
        assert sentence in capsys.readouterr().err


def test_the_command_says_what_is_wrong_with_a_folder(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    for content, sentence in ((b"not a zip", "or is damaged"), (b"PK\x03\x04" + bytes(30), "or is damaged")):
        (tmp_path / "bad" / "ranks.npz").write_bytes(content)
        assert main(["compare", f"{tmp_path}/bad", f"{tmp_path}/bad"]) == 2
        assert sentence in capsys.readouterr().err
    with open(tmp_path / "bad" / "ranks.npz", "wb") as file:
        np.savez(file, format=np.array(1), names=np.array([{}], object))  # a pickle
    assert main(["compare", f"{tmp_path}/bad", f"{tmp_path}/bad"]) == 2
    assert "or is damaged" in capsys.readouterr().err
    assert main(["compare", f"{tmp_path}/empty", f"{tmp_path}/bad"]) == 2
    assert "have no ranks.npz" in capsys.readouterr().err
    assert main(["compare", f"{tmp_path}/none", f"{tmp_path}/bad"]) == 2
    assert "No such file" in capsys.readouterr().err
