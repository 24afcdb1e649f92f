"""The notebook for Colab's T4: its cells run, here on the CPU with less work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import itm_fast

NOTEBOOK = Path(__file__).resolve().parents[1] / "benchmarks" / "colab_t4.ipynb"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not NOTEBOOK.is_file(), reason="needs a checkout"),
]


def test_the_cells_run_in_order(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["metadata"]["accelerator"]) == (4, "GPU")
    names: dict = {"__name__": "__main__"}
    for number, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []  # no output of anyone's machine is kept
            exec(compile("".join(cell["source"]), f"{NOTEBOOK.name}, cell {number}", "exec"), names)
    # Cosines of 64 products in float32 are off by at most 64 units of 2^-24, and the softmax multiplies them by 9.
    assert all(error < 64 * 9 * 2**-24 for _, error, _ in names["rows"])
    ran = [name for name, _, _ in names["rows"]]
    assert set(ran) >= {"torch", *(["cpu"] if itm_fast.why_not("cpu") is None else [])}
    assert (tmp_path / "results" / "report.html").stat().st_size > 10_000
    assert "loss" in capsys.readouterr().out
