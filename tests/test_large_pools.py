"""The benchmark of large pools at tiny size."""

from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks import harness, large_pools
from itm_fast.evaluation import rank_all, ranks, score_all


def test_the_benchmark_runs_and_its_numbers_add_up(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    large_pools.main(["--quick"])
    found = json.loads((tmp_path / "large_pools.json").read_text())
    assert [one["pairs"] for one in found["pools"]] == [60 * 300, 60 * 256]  # one of two blocks of captions
    for one in found["pools"]:
        assert one["before_gb"] <= one["peak_gb"] < 3
        assert one["matrix_gb"] == pytest.approx(4 * 60 * 300 / 1e9)
    assert "| 60 x 300 | 10 | 1/2 | 15,360 |" in capsys.readouterr().out
    encoded = large_pools.pool(12, 50)
    (ranking,) = rank_all(large_pools.Dot(), encoded, progress=False)
    score = score_all(large_pools.Dot(), encoded, progress=False)
    for a, b in zip(ranking.ranks(), ranks(score, encoded.caption_to_image), strict=True):
        np.testing.assert_array_equal(a, b)
