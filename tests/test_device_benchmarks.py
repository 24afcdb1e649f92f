"""The suite for a GPU machine runs end to end without one on tiny sizes, loses nothing to a step that fails, and the
search for tile sizes finds what is faster and right."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import types
from pathlib import Path

import cuda_emulated
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "benchmarks").is_dir():
    pytest.skip("needs a checkout", allow_module_level=True)
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks import gpu_suite, machine, tune  # noqa: E402


@pytest.mark.slow
def test_the_suite_runs_end_to_end(tmp_path):
    out = tmp_path / "gpu.json"
    steps = ["machine", "tests", "evaluate-scan", "evaluate-sgraf", "against-loop", "train"]
    steps += ["evaluate-systems", "maxsim"]
    command = [sys.executable, "benchmarks/gpu_suite.py", "--out", str(out), "--smoke", "--minutes", "60"]
    done = subprocess.run([*command, "--only", *steps], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert list(found["steps"]) == steps
    assert found["problems"] == []
    results = {name: one.get("result") for name, one in found["steps"].items()}
    assert results["machine"]["environment"]["torch"] == torch.__version__
    for name in ("tf32", "bfloat16", "float16", "float32"):
        assert results["machine"][f"peak {name}"] > 0
        row = results["evaluate-sgraf"][f"sgraf {name} torch"]
        assert set(row["parts"]) == {"score sgr", "score saf", "rank", "all"}
        assert row["floor_seconds"] * row["matmul_peak"] == pytest.approx(row["needed_flops"])
        assert row["seconds"] == row["parts"]["all"] >= row["parts"]["score sgr"]
    assert results["evaluate-sgraf"]["sgraf ranks"]["sgraf float32 torch"] == 1
    if not isinstance(cuda_emulated.load(), str):
        assert results["evaluate-scan"]["scan-t2i float32 cuda"]["pairs_per_second"] > 0
        assert results["evaluate-scan"]["scan-t2i ranks"]["scan-t2i float32 cuda"] == 1
        assert results["against-loop"]["scan-t2i tf32"]["itm-fast cuda"]["seconds"] > 0
        assert results["train"]["scan-t2i tf32 cuda"]["seconds"] > 0
        assert results["maxsim"]["maxsim-d128"]["rows"]["itm-fast cuda"]["seconds"] > 0
    loop = results["against-loop"]["saf tf32"]
    assert loop["paper's loop"]["times_slower_than_ours"] > 0
    assert results["train"]["sgr tf32 paper's loop"]["seconds"] > 0
    for model in ("shan", "shan-vector", "hgan", "tshsr"):
        assert results["evaluate-systems"][f"{model} tf32 torch"]["pairs_per_second"] > 0
    assert "flash_maxsim" in results["maxsim"]["maxsim-d128"]["rows"]["flash-maxsim"]["error"]


@pytest.mark.slow
def test_a_step_that_fails_or_hangs_loses_no_others(tmp_path, monkeypatch):
    programs = {
        "good": "import json, sys; json.dump({'row': 1}, open(sys.argv[2], 'w'))",
        "bad": "import json, sys; json.dump({'row': 2}, open(sys.argv[2], 'w')); raise SystemExit('no such GPU')",
        "slow": "import json, sys, time; json.dump({'row': {'error': 'late'}}, open(sys.argv[2], 'w')); time.sleep(99)",
    }

    def step(name, folder, smoke):
        out, end = folder / f"{name}.json", time.monotonic() + 30
        running = gpu_suite.Running([sys.executable, "-c", programs[name], name, str(out)], folder / f"{name}.log")
        while name == "slow" and not out.exists() and time.monotonic() < end:  # its share begins when it has written
            time.sleep(0.01)
        return running

    monkeypatch.setattr(gpu_suite, "steps", list)
    monkeypatch.setattr(gpu_suite, "step", step)
    monkeypatch.setattr(gpu_suite, "SHARES", {"bad": 120, "slow": 5, "good": 120})
    assert gpu_suite.main(["--out", str(tmp_path / "x.json")]) == 1
    found = json.loads((tmp_path / "x.json").read_text())
    assert [one["result"]["row"] for one in found["steps"].values()] == [2, {"error": "late"}, 1]
    assert "no such GPU" in found["steps"]["bad"]["failed"]
    assert found["steps"]["slow"]["exit"] is None
    assert found["problems"] == ["bad: failed", "slow: stopped: its time was over", "slow: row: late"]
    assert gpu_suite.main(["--out", str(tmp_path / "y.json"), "--minutes", "0.1"]) == 1
    late = json.loads((tmp_path / "y.json").read_text())
    assert late["problems"] == [f"{name}: no time was left" for name in ("bad", "slow", "good")]


def test_a_failed_test_or_check_is_a_problem():
    found = {
        "checks": {"check-a": {"exit": 0, "result": {"a tf32": {"problem": "a result is off by 1"}}}},
        "tests": {"exit": 1, "failed_tests": {"t::u": "boom"}},
        "machine": {"exit": 0, "result": {"peak tf32": 1.0, "environment": {"commit": None}}},
    }
    assert gpu_suite.problems(found) == ["check-a: a tf32: a result is off by 1", "tests: failed", "tests: t::u"]


def test_the_machine_needs_no_git(monkeypatch):
    def absent(*args, **kwargs):
        raise FileNotFoundError("git")

    monkeypatch.setattr(machine.subprocess, "run", absent)
    assert machine.environment()["commit"] is None


@pytest.fixture
def tiles():
    """One row, asked for with one argument; a helper and a function that are none."""
    module = types.ModuleType("tiles")
    source = """
from __future__ import annotations
def product(dtype) -> Tile:
    return dict(BLOCK_M=64, SETS=1, num_warps=4, num_stages=2, enable_fp_fusion=True)
def _row(n) -> Tile:
    return {}
def precision(dtype) -> str:
    return "tf32"
"""
    exec(source, vars(module))
    return module


def test_the_search_keeps_what_is_faster_and_right(tiles):
    def call():
        row = tiles.product(torch.float32)
        if row["num_stages"] == 4:
            raise RuntimeError("out of resource: shared memory")
        result = torch.ones(3)
        return result * (1 if row["num_warps"] == 4 else 2)  # wrong, and the fastest of all

    def seconds(function):
        function()
        row = tiles.product(torch.float32)
        return 1.0 / row["BLOCK_M"] / (100 if row["num_warps"] == 8 else 1) / (1 + (row["num_stages"] == 3))

    before = tiles.product
    found = tune.search(tiles, call, seconds, time.monotonic() + 60)
    assert tiles.product is before
    (key,) = found
    row, first, last = found[key]
    assert key == ("product", (torch.float32,))
    assert row == dict(BLOCK_M=512, SETS=1, num_warps=4, num_stages=3, enable_fp_fusion=True)
    assert (first, last) == (1 / 64, 1 / 1024)
    assert tune.line(key, row, first, last).startswith("product(float32): _row(4, 3, BLOCK_M=512, SETS=1)  # ")


def test_variants_differ_in_one_number():
    row = dict(BLOCK_M=16, HELD=True, num_warps=8, num_stages=1, enable_fp_fusion=True, maxnreg=255)
    found = list(tune.variants(row))
    assert all(sum(v[k] != row[k] for k in row) == 1 for v in found)
    assert {v["BLOCK_M"] for v in found} == {16, 32}
    assert {(v["enable_fp_fusion"], v["maxnreg"]) for v in found} == {(True, 255)}
    assert len(found) == 1 + 1 + 1 + 3


def test_a_call_of_every_op_that_is_tuned():
    for op in tune.OPS:
        for backward in (False, True):
            call = tune.problem(op, torch.float32, "cpu", backward, 2, 3)
            assert call().isfinite().all()
