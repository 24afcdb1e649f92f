"""The script that trains every model: what it holds it does not repeat, and its table is that of its runs."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from training_cases import DEV, TRAIN, WORDS

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "benchmarks").is_dir():
    pytest.skip("needs a checkout", allow_module_level=True)
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks import harness, page, train_models  # noqa: E402
from itm_fast.cli import build_parser  # noqa: E402


@pytest.fixture
def data(tmp_path):
    home = tmp_path / "data"
    home.mkdir()
    for name, split in (("train", TRAIN), ("dev", DEV), ("test", DEV)):
        np.save(home / f"{name}_ims.npy", split.features[:])
        np.save(home / f"{name}_caption_to_image.npy", split.caption_to_image.astype(np.int32))
        (home / f"{name}_caps.txt").write_text("".join(f"{caption}\n" for caption in split.captions))
    WORDS.save(home / train_models.VOCABULARY)
    return home


def test_every_recipe_is_understood():
    for options in train_models.MODELS.values():
        build_parser("train").parse_args(["train", "--output", "x", *options, *train_models.RECIPE])


def test_runs_are_kept_and_reported(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    runs = tmp_path / "runs"
    words = ["--data", str(data), "--output", str(runs), "--epochs", "1", "--threads", "1"]
    words += ["--models", "scan-t2i", "dual", "--seeds", "0", "1"]
    assert train_models.main([*words, "--minutes", "0"]) == 0
    assert "are left; the same command goes on" in capsys.readouterr().err
    assert train_models.main(words) == 0
    table = capsys.readouterr().out
    content = json.loads((tmp_path / "trained_models.json").read_text())
    assert [one["model"] for one in content["results"]] == ["dual", "scan-t2i"]
    for one in content["results"]:
        assert [run["seed"] for run in one["runs"]] == [0, 1]
        assert one["rsum_mean"] == pytest.approx(np.mean([run["held_out"]["rsum"] for run in one["runs"]]))
        assert one["control"]["options"][-3:] == ["0", "--epochs", "1"]
        assert f"| {one['model']} |" in table
    assert content["results"][1]["against_baseline"] in ("above", "below", "within the seeds' spread")
    assert "| chance |" in table
    assert page.trained(content) in table
    moved = np.load(runs / "shuffled" / "train_caption_to_image.npy")
    assert sorted(moved) == sorted(TRAIN.caption_to_image)
    assert (moved != TRAIN.caption_to_image).mean() > 0.5

    monkeypatch.setattr(train_models, "itm_fast", lambda words: 1 / 0)  # nothing is trained again
    assert train_models.main(words) == 0
    with pytest.raises(SystemExit, match="other options"):
        train_models.main([*words[:5], "2", *words[6:]])


def test_an_interrupted_run_goes_on(data, tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    words = ["--data", str(data), "--output", str(tmp_path / "runs"), "--epochs", "1", "--threads", "1"]
    words += ["--models", "dual", "--seeds", "0", "--no-control"]
    program, asked = train_models.itm_fast, []

    def short(words):
        asked.append(words)
        return program([*words, "--max-steps", "1"]) or 1

    monkeypatch.setattr(train_models, "itm_fast", short)
    with pytest.raises(SystemExit, match="training dual-0 failed"):
        train_models.main(words)
    monkeypatch.setattr(train_models, "itm_fast", lambda words: asked.append(words) or program(words))
    assert train_models.main(words) == 0
    assert "--resume" not in asked[0]
    assert "--resume" in asked[1]
