"""`itm-fast evaluate` with checkpoints of other repositories, of two networks, in a folder, of another vocabulary."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from itm_fast.cli import main
from itm_fast.data import Split, Vocabulary, save_splits
from itm_fast.models import build
from itm_fast.models.checkpoint import load
from itm_fast.training import checkpoint

from .test_evaluation_report import options, pets

# The options of NCR's run.py that SGRAF's lack; those of SGRAF that it lacks are left out below.
NCR = {"noise_ratio": 0.2, "warmup_epoch": 1, "soft_margin": "exponential", "gpu": "0", "seed": 1}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Data, a vocabulary, and two networks of one recipe, apart and in one file."""
    root = tmp_path_factory.mktemp("members")
    split, vocabulary = pets()
    save_splits(root / "pets", {"test": split})
    vocabulary.save(root / "vocab.json")
    opt = options("SGR", len(vocabulary))
    states = []
    for seed, name in enumerate("AB"):
        torch.manual_seed(seed)
        states.append(build(opt).state_dict())
        checkpoint.save(root / f"{name}.pth.tar", epoch=3, model=states[-1], best_rsum=1.0, opt=opt, iterations=7)
    bare = {name: value for name, value in vars(opt).items() if name not in ("max_violation", "device")}
    content = {"epoch": 3, "best_rsum": np.float64(12.0), "opt": argparse.Namespace(**{**bare, **NCR})}
    (root / "ncr").mkdir()
    torch.save({**content, "model_A": states[0], "model_B": states[1]}, root / "ncr" / "model_best.pth.tar")
    return root


def _evaluate(made, *checkpoints, more=()):
    words = [w for name in checkpoints for w in ("--checkpoint", f"{made}/{name}")]
    data = ["--data", f"{made}/pets", "--vocab", f"{made}/vocab.json", "--no-progress", "--device", "cpu"]
    return main(["evaluate", *words, *data, *more])


@pytest.mark.parametrize("name", ["ncr", "ncr/model_best.pth.tar"], ids=["folder", "file"])
def test_two_networks_are_an_ensemble(made, tmp_path, capsys, name):
    assert _evaluate(made, "A.pth.tar", "B.pth.tar", more=["--scores", f"{tmp_path}/two.npy"]) == 0
    more = ["--scores", f"{tmp_path}/one.npy", "--output", f"{tmp_path}/out"]
    assert _evaluate(made, name, more=more) == 0, capsys.readouterr().err
    for end in ("", "-1", "-2"):
        np.testing.assert_array_equal(np.load(tmp_path / f"one{end}.npy"), np.load(tmp_path / f"two{end}.npy"))
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [system["name"] for system in found["systems"]] == ["SGR A", "SGR B", "mean of the scores"]
    assert found["settings"]["checkpoints"] == [f"{made}/ncr/model_best.pth.tar"] * 2
    assert found["settings"]["epochs"] == [3, 3]


def test_networks_of_two_files_are_told_apart(made, capsys):
    (made / "again").mkdir()
    (made / "again" / "model_best.pth.tar").symlink_to(made / "ncr" / "model_best.pth.tar")
    assert _evaluate(made, "ncr", "again", more=["--dry-run"]) == 0
    text = capsys.readouterr().out
    for name in ("SGR A (ncr/", "SGR B (ncr/", "SGR A (again/", "SGR B (again/"):
        assert f"{name}model_best.pth.tar): 10 images" in text


def test_the_plan_of_a_workload_counts_both_networks(made, capsys):
    assert main(["evaluate", "--workload", "f30k-eval-1k", "--dry-run", "--checkpoint", f"{made}/ncr"]) == 0
    text = capsys.readouterr().out
    assert "f30k-eval-1k, SGR A: " in text
    assert "f30k-eval-1k, SGR B: " in text


def test_the_vocabulary_beside_a_checkpoint_is_found_from_its_folder(made, capsys):
    words = Vocabulary.load(made / "vocab.json")
    words.save(made / "ncr" / "vocab.json")
    assert main(["evaluate", "--checkpoint", f"{made}/ncr", "--data", f"{made}/pets", "--no-progress"]) == 0
    assert f"vocabulary: {made}/ncr/vocab.json\n" in capsys.readouterr().out


def test_another_vocabulary_of_the_same_size_is_refused(made, tmp_path, capsys):
    right = Vocabulary.load(made / "vocab.json")
    found = load(made / "A.pth.tar")
    opt = argparse.Namespace(**vars(found.opt), vocab_checksum=right.checksum())
    path = made / "signed.pth.tar"
    checkpoint.save(path, epoch=3, model=found.model, best_rsum=1.0, opt=opt, iterations=7)
    other = [*list(right.word2idx)[:-1], "zebra"]
    Vocabulary(other).save(tmp_path / "other.json")
    assert _evaluate(made, "signed.pth.tar", more=["--dry-run"]) == 0
    data = ["--data", f"{made}/pets", "--vocab", f"{tmp_path}/other.json", "--dry-run"]
    assert main(["evaluate", "--checkpoint", f"{made}/A.pth.tar", *data]) == 0, "older checkpoints have no checksum"
    capsys.readouterr()
    both = ["--checkpoint", f"{made}/A.pth.tar", "--checkpoint", str(path)]
    assert main(["evaluate", *both, *data]) == 2
    error = capsys.readouterr().err
    assert f"{path} was trained with other words than the 12 of {tmp_path}/other.json; give the vocabulary" in error


def test_features_of_another_size_are_named_before_anything_is_scored(made, tmp_path, capsys):
    other = Split(np.zeros((2, 36, 5), np.float32), ["a red cat", "two dog"], np.array([0, 1]))
    save_splits(tmp_path / "other", {"test": other})
    words = ["--data", f"{tmp_path}/other", "--vocab", f"{made}/vocab.json", "--dry-run"]
    assert main(["evaluate", "--checkpoint", f"{made}/A.pth.tar", *words]) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path}/other: the test split has 5 features per region, and {made}/A.pth.tar was trained on 6" in error
