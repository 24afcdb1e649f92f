"""A callback of the user gets the numbers of log.csv as they arise."""

from __future__ import annotations

import csv

import pytest
from training_cases import run_tiny

from itm_fast.training.log import COLUMNS, DEV, STEP


def test_a_callback_gets_every_row_of_the_log(tmp_path):
    calls = []
    run_tiny(tmp_path / "run", callback=lambda data, *, step: calls.append((step, data)))
    with open(tmp_path / "run" / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(calls) == len(rows) > 2
    for (step, data), row in zip(calls, rows, strict=True):
        assert step == int(row["iteration"])
        kinds = [("train/", STEP), ("dev/", DEV)]
        written = {f"{kind}{name}": row[name] for kind, names in kinds for name in names if row[name]}
        assert {name: f"{value:.7g}" for name, value in data.items()} == written
        assert all(type(value) is float for value in data.values())
    assert set(COLUMNS) == {"epoch", "iteration", *STEP, *DEV}
    assert {"train/loss", "dev/rsum"} <= {name for _, data in calls for name in data}


def test_an_error_of_the_callback_is_raised(tmp_path):
    def broken(data, *, step):
        raise ConnectionError("no network")

    with pytest.raises(ConnectionError, match="no network"):
        run_tiny(tmp_path / "run", callback=broken)
