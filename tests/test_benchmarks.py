"""The benchmarks run: each contender is compared with the paper's loop before it is timed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("pair_scorers_*.json"))
pytestmark = pytest.mark.skipif(not (ROOT / "benchmarks").is_dir(), reason="needs a checkout")


def run(*command):
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_pair_scorer_benchmark_runs_and_its_rows_add_up():
    out = run("benchmarks/bench_pair_scorers.py", "--shape", "quick", "--rounds", "1", "--no-compile")
    for model in ("scan-t2i", "scan-i2t", "sgr", "saf"):
        assert f"{model}: 8 images x 12 captions" in out
    assert out.count("paper's loop") == out.count("itm-fast torch") == 4


def test_the_op_benchmarks_run():
    files = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "benchmarks").glob("bench_*.py"))
    out = run("-m", "pytest", "-q", "-k", "quick", *files)
    assert "passed" in out
    assert "failed" not in out


@pytest.mark.parametrize("path", RESULTS, ids=lambda p: p.stem)
def test_result_files_name_their_machine(path):
    result = json.loads(path.read_text())
    assert {"torch", "device", "threads", "commit", "date"} <= set(result["environment"])
    for one in result["results"]:
        for row in one["rows"]:
            assert row["seconds_min"] <= row["seconds_median"] <= row["seconds_max"]
            assert row["largest_difference"] < 1e-4
