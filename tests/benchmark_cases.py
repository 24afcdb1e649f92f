"""What the tests of the benchmarks share: their folder on the path, and a run of one of their scripts."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "benchmarks").is_dir():
    pytest.skip("needs a checkout", allow_module_level=True)
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks import harness, machine, page  # noqa: E402
from itm_fast.evaluation.workloads import WORKLOADS  # noqa: E402

PEAK = {"matmul_float32": 2e9, "fma_float32": 5e9, "fma_bfloat16": 10e9}


def shrink(monkeypatch) -> None:
    """Give the workload of the benchmarks sizes that take no time."""
    tiny = dataclasses.replace(WORKLOADS["coco-eval-5k"], features=24, dim=32, similarity=16)
    monkeypatch.setitem(WORKLOADS, "coco-eval-5k", tiny)


def written(script: ModuleType, name: str, monkeypatch, tmp_path: Path, *arguments: str) -> dict[str, Any]:
    """The result file that a script writes, the machine's peaks given."""
    for module in (harness, page):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    monkeypatch.setattr(machine, "peaks", lambda device: PEAK)
    monkeypatch.setattr(sys, "argv", [name, *arguments, "--rounds", "1", "--write", "here"])
    script.main()
    return json.loads((tmp_path / f"{name}_here.json").read_text())
