"""The benchmark of large pools at tiny size, and the page of what larger machines need."""

from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks import harness, large_pools, scale_plan
from itm_fast.evaluation import rank_all, ranks, score_all


def test_the_benchmark_runs_and_its_numbers_add_up(monkeypatch, tmp_path, capsys):
    for module in (harness, large_pools):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    large_pools.main(["--quick"])
    found = json.loads((tmp_path / "large_pools.json").read_text())
    assert [one["pairs"] for one in found["pools"]] == [60 * 300, 60 * 256, 60 * 300]  # one of two blocks of captions
    assert [one.get("processes") for one in found["pools"]] == [None, None, 2]
    for one in found["pools"]:
        assert one.get("before_gb", 0) <= one["peak_gb"] < 3
        assert one["matrix_gb"] == pytest.approx(4 * 60 * 300 / 1e9)
    assert "| 60 x 300 | 10 | 1/2 | 1 | 15,360 |" in capsys.readouterr().out
    monkeypatch.setattr(large_pools, "measure_together", lambda *_: pytest.fail("is measured already"))
    large_pools.main(["--quick"])
    assert json.loads((tmp_path / "large_pools.json").read_text()) == found
    encoded = large_pools.pool(12, 50)
    (ranking,) = rank_all(large_pools.Dot(), encoded, progress=False)
    score = score_all(large_pools.Dot(), encoded, progress=False)
    for a, b in zip(ranking.ranks(), ranks(score, encoded.caption_to_image), strict=True):
        np.testing.assert_array_equal(a, b)


def test_measured_large_pools_keep_to_the_bounds_that_are_stated():
    found = json.loads((harness.RESULTS / "large_pools.json").read_text())
    whole = next(one for one in found["pools"] if (one["images"], one["captions"]) == (31_000, 155_000))
    assert whole["pairs"] == 31_000 * 155_000
    assert whole["peak_gb"] < 3 < whole["matrix_gb"]
    assert any((one["images"], one["captions"]) == (100_000, 500_000) for one in found["pools"])
    assert found["coco"]["share"] < 0.01


def test_the_plan_is_the_formula_of_the_measured_and_predicted_files():
    kept, made = (harness.RESULTS / "large_scale.md").read_text().splitlines(), scale_plan.page().splitlines()
    assert kept[:20] == made[:20]  # the formula
    sizes = [[line.split("|")[1:6] for line in lines if "|" in line] for lines in (kept, made)]
    assert sizes[0] == sizes[1]  # times follow traffic_h100.json, which may be newer than the page
    one, eight = (scale_plan.row(100_000, 500_000, gpus) for gpus in (1, 8))
    words = 331_916 / 25_000
    assert one.embeddings == eight.embeddings == pytest.approx((100_000 * 36 + 500_000 * words) * 2048)
    assert one.matrix == 2e11
    assert one.scores["sgr"] == pytest.approx(8 * eight.scores["sgr"])
    assert one.counting == pytest.approx(5e10 * (36e-5 / 1_280_000 + 72 / 3.35e12))
    assert scale_plan.row(100_000, 500_000, 64).network == pytest.approx(3 * one.counters / 3e9)
    assert scale_plan.row(100_000, 500_000, 64).network > 0 == eight.network
    assert scale_plan.size(2.1e12) == "2.1 TB"
    assert [scale_plan.span(x) for x in (0.01, 5, 300, 8000, 400_000)] == ["< 0.1 s", "5.0 s", "5 min", "2 h", "5 days"]
