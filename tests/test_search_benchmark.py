"""The benchmark of search: what it reports is what was measured."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "benchmarks").is_dir():
    pytest.skip("needs a checkout", allow_module_level=True)
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks import harness, search  # noqa: E402
from itm_fast import Gallery  # noqa: E402


@pytest.mark.slow
def test_recall_and_times_are_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    words = ["--images", "300", "--captions", "7", "--rounds", "2", "--candidates", "20", "300"]
    search.main([*words, "--models", "scan"])
    content = json.loads((tmp_path / "search_cpu.json").read_text())
    pictures, synthetic = content["results"][:2]
    assert [row["candidates"] for row in pictures["two_stage"]] == [20, 300]
    assert (synthetic["images"], synthetic["dtype"], synthetic["bytes"]) == (300, "float16", 300 * 36 * 32 * 2 + 128)
    assert synthetic["two_stage"][1]["of_exact_search"] == pytest.approx(1.0, abs=0.02)  # all of them are candidates
    assert 0 < synthetic["two_stage"][0]["of_exact_search"] <= 1
    out = capsys.readouterr().out
    assert search.table(content) in out
    assert "no recall of the model" in out


def test_a_synthetic_caption_finds_its_image(tmp_path):
    """The features, the words and the model belong together."""
    model, split = search.synthetic(tmp_path, images=200, captions=20)
    found = Gallery.build(model, split, tmp_path / "g", progress=False).search(split.captions, k=3)
    assert (found.images[:, 0] == split.caption_to_image).mean() > 0.9
