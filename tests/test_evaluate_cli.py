"""`itm-fast evaluate` from checkpoint and data files to tables and files, and what it refuses."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from itm_fast import evaluation
from itm_fast.cli import main
from itm_fast.data import Split, Vocabulary, save_splits
from itm_fast.evaluation import encode, metrics, score_all
from itm_fast.models import build
from itm_fast.models.checkpoint import load
from itm_fast.training import checkpoint

from .test_evaluation_report import AUTO, options, pets


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Three tiny checkpoints and one split, as a folder and as HDF5, with the vocabulary beside the data."""
    root = tmp_path_factory.mktemp("evaluate")
    split, vocabulary = pets()
    for data in (root / "pets_precomp", root / "pets.h5"):
        save_splits(data, {"test": split})
    vocabulary.save(root / "pets_precomp" / "pets_precomp_vocab.json")
    for seed, kind in enumerate(("SGR", "SAF", "SCAN")):
        torch.manual_seed(seed)
        opt = options(kind, len(vocabulary))
        checkpoint.save(
            root / f"{kind}.pth.tar", epoch=3, model=build(opt).state_dict(), best_rsum=1.0, opt=opt, iterations=7
        )
    return root


def test_table_files_and_ensemble(made, tmp_path, capsys):
    code = main(
        ["evaluate", "--checkpoint", f"{made}/SGR.pth.tar", "--checkpoint", f"{made}/SAF.pth.tar", "--data",
         f"{made}/pets_precomp", "--folds", "5", "--output", f"{tmp_path}/out", "--trec", "4", "--no-progress",
         "--scores", f"{tmp_path}/s.npy", "--device", "cpu"]
    )  # fmt: skip
    text = capsys.readouterr()
    assert code == 0, text.err
    assert text.err == ""
    split, vocabulary = pets()
    scores = []
    for kind in ("SGR", "SAF"):
        loaded = load(made / f"{kind}.pth.tar")
        model = build(loaded.opt)
        model.load_state_dict(loaded.model)
        scores.append(score_all(model.scorer, encode(model, split, vocabulary, progress=False), progress=False))
    mean = (scores[0] + scores[1]) / 2
    np.testing.assert_array_equal(np.load(tmp_path / "s.npy"), mean)
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [system["name"] for system in found["systems"]] == ["SGR", "SAF", "SGRAF"]
    for system, score in zip(found["systems"], [*scores, mean], strict=True):
        assert system["pools"][1]["rsum"] == metrics(score, split.caption_to_image).rsum
    assert found["settings"]["epochs"] == [3, 3]
    assert found["settings"]["split"] == "test"
    for line in ("mean of 5 folds of 2 images, 10 captions", "all 10 images, 50 captions", f"pairs/s) by the {AUTO}"):
        assert line in text.out
    assert text.out.startswith((tmp_path / "out" / "results.txt").read_text().rstrip("\n"))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *(f"results.{kind}" for kind in ("txt", "json", "csv", "tex")),
        "ranks.npz",
        "report.html",
        *(f"{side}.{kind}" for side in ("i2t", "t2i") for kind in ("run", "qrels")),
    }


def test_every_option_reaches_the_evaluation(made, tmp_path, monkeypatch):
    """Each value differs from its default."""
    asked, trec = [], []
    real = evaluation.evaluate

    def evaluate(*given, **named):
        asked.append(named)
        return real(*given, **(named | {"pmrp": None}))  # these data are not COCO's

    monkeypatch.setattr(evaluation, "evaluate", evaluate)
    monkeypatch.setattr(evaluation, "write_trec", lambda *given, **named: trec.append((given, named)) or [])
    words = ["evaluate", "--checkpoint", f"{made}/SAF.pth.tar", "--data", f"{made}/pets_precomp", "--no-progress"]
    words += ["--ties", "published", "--batch-size", "7", "--memory-gb", "9.5", "--folds", "2", "--trec", "3"]
    words += ["--scores", f"{tmp_path}/s.npy", "--resume", "--limit-captions", "40", "--output", f"{tmp_path}/out"]
    words += ["--pmrp", "labels"]
    assert main(words) == 0
    assert asked == [
        {
            "names": ["SAF"],
            "folds": 2,
            "ties": "published",
            "batch_size": 7,
            "memory_gb": 9.5,
            "scores": f"{tmp_path}/s.npy",
            "resume": True,
            "progress": False,
            "keep_scores": True,  # for --trec
            "worst": 12,  # for report.html
            "best": None,
            "state": None,
            "together": False,  # as --scores is given
            "pmrp": "labels",
            "settings": asked[0]["settings"],  # tested below
        }
    ]
    ((folder, score, owner), named) = trec[0]
    assert (folder, score.shape, owner.tolist()) == (f"{tmp_path}/out", (8, 40), (np.arange(40) // 5).tolist())
    assert named == {"top": 3, "image_ids": None, "caption_ids": None}
    settings = json.loads((tmp_path / "out" / "results.json").read_text())["settings"]
    assert {name: settings[name] for name in ("ties", "batch_size", "memory_gb", "folds", "limit_captions")} == {
        "ties": "published", "batch_size": 7, "memory_gb": 9.5, "folds": 2, "limit_captions": 40,
    }  # fmt: skip


@pytest.mark.parametrize("ties", ["pessimistic", "optimistic", "expected", "published"])
def test_ties_change_the_table(made, tmp_path, capsys, ties):
    """Captions that are all the same tie for every image."""
    split, vocabulary = pets()
    same = Split(split.features[:], ["old red cat"] * 50, split.caption_to_image)
    save_splits(tmp_path / "same.h5", {"test": same})
    words = ["evaluate", "--checkpoint", f"{made}/SCAN.pth.tar", "--data", f"{tmp_path}/same.h5", "--no-progress"]
    words += ["--vocab", f"{made}/pets_precomp/pets_precomp_vocab.json", "--output", f"{tmp_path}/out"]
    assert main([*words, "--ties", ties]) == 0
    pool = json.loads((tmp_path / "out" / "results.json").read_text())["systems"][0]["pools"][0]
    r1 = {"pessimistic": 0.0, "optimistic": 100.0, "expected": 10.0, "published": 10.0}[ties]
    assert pool["i2t"]["r1"] == pytest.approx(r1)
    assert pool["ties"] == ties
    assert "\nties: rsum " in capsys.readouterr().out


def test_trec_files_name_the_ids_of_the_data(made, tmp_path):
    split, _ = pets()
    ids = {"image_ids": np.arange(10) + 400, "caption_ids": np.arange(50) + 7000}
    save_splits(tmp_path / "ids.h5", {"test": Split(split.features[:], split.captions, split.caption_to_image, **ids)})
    words = ["evaluate", "--checkpoint", f"{made}/SAF.pth.tar", "--data", f"{tmp_path}/ids.h5", "--no-progress"]
    words += ["--vocab", f"{made}/pets_precomp/pets_precomp_vocab.json", "--output", f"{tmp_path}/out", "--trec", "2"]
    assert main(words) == 0
    for side, queries, items in (("i2t", 400, 7000), ("t2i", 7000, 400)):
        right = [line.split() for line in (tmp_path / "out" / f"{side}.qrels").read_text().splitlines()]
        pairs = {(int(line[0]) - queries, int(line[2]) - items) for line in right}
        assert pairs == {(c // 5, c) if side == "i2t" else (c, c // 5) for c in range(50)}
        ran = [line.split() for line in (tmp_path / "out" / f"{side}.run").read_text().splitlines()]
        assert {int(line[0]) - queries for line in ran} == set(range(10 if side == "i2t" else 50))
        assert {int(line[2]) - items for line in ran} <= set(range(50 if side == "i2t" else 10))


def test_unknown_words_are_told_and_warned_of(made, tmp_path, capsys):
    words = Vocabulary.load(made / "pets_precomp" / "pets_precomp_vocab.json")
    others = [*list(words.word2idx)[:4], *(word[::-1] + "q" for word in list(words.word2idx)[4:])]
    Vocabulary(others).save(tmp_path / "other.json")
    command = ["evaluate", "--checkpoint", f"{made}/SAF.pth.tar", "--data", f"{made}/pets_precomp", "--no-progress"]
    command += ["--vocab", f"{tmp_path}/other.json"]
    for more in ([], ["--dry-run"]):
        with pytest.warns(UserWarning, match=r"the vocabulary lacks 100\.0 % of the captions' words"):
            assert main([*command, *more]) == 0
        line = "unknown words: 100.0 % of the words; 100.0 % of the captions have no known word"
        assert line in capsys.readouterr().out.splitlines()


def test_the_speed_line_names_the_backend_that_ran(made, tmp_path, capsys, monkeypatch):
    opt = options("SAF", 12)
    opt.system = "DualEncoder"
    state = build(opt).state_dict()
    checkpoint.save(tmp_path / "dual.pth.tar", epoch=1, model=state, best_rsum=1.0, opt=opt, iterations=1)
    words = ["evaluate", "--data", f"{made}/pets_precomp", "--no-progress", "--checkpoint"]
    vocabulary = ["--vocab", f"{made}/pets_precomp/pets_precomp_vocab.json"]
    assert main([*words, f"{tmp_path}/dual.pth.tar", *vocabulary]) == 0
    assert "pairs/s) by torch's own operations on cpu" in capsys.readouterr().out
    scores = ["--scores", f"{tmp_path}/s.npy"]
    assert main([*words, f"{made}/SAF.pth.tar", *scores]) == 0
    assert f"pairs/s) by the {AUTO} backend on cpu" in capsys.readouterr().out
    assert main([*words, f"{made}/SAF.pth.tar", *scores, "--resume"]) == 0
    assert re.search(r"scored in \d+\.\d s on cpu\n", capsys.readouterr().out)


def test_both_forms_of_data_and_both_backends_agree(made, tmp_path, capsys):
    found = []
    for number, data in enumerate(("pets_precomp", "pets.h5")):
        words = ["evaluate", "--checkpoint", f"{made}/SCAN.pth.tar", "--data", f"{made}/{data}", "--no-progress"]
        words += ["--vocab", f"{made}/pets_precomp/pets_precomp_vocab.json", "--scores", f"{tmp_path}/{number}.npy"]
        assert main([*words, "--backend", ("torch", "reference")[number]]) == 0
        assert f"by the {('torch', 'reference')[number]} backend" in capsys.readouterr().out
        found.append(np.load(tmp_path / f"{number}.npy"))
    np.testing.assert_allclose(found[0], found[1], rtol=0, atol=1e-6)


def test_regions_of_zeros_are_masked_when_asked(made, tmp_path, capsys):
    split, vocabulary = pets()
    features = split.features[:]
    lengths = 1 + np.arange(len(features)) % features.shape[1]
    for row, n in enumerate(lengths):
        features[row, n:] = 0
    known = Split(features, split.captions, split.caption_to_image, lengths)
    save_splits(tmp_path / "padded", {"test": Split(features, split.captions, split.caption_to_image)})
    words = ["evaluate", "--checkpoint", f"{made}/SCAN.pth.tar", "--data", f"{tmp_path}/padded", "--no-progress"]
    words += ["--vocab", f"{made}/pets_precomp/pets_precomp_vocab.json", "--device", "cpu", "--scores"]
    assert main([*words, f"{tmp_path}/masked.npy", "--mask-zero-regions"]) == 0
    with pytest.warns(UserWarning, match="end in regions of zeros.*--mask-zero-regions"):
        assert main([*words, f"{tmp_path}/plain.npy"]) == 0
    loaded = load(made / "SCAN.pth.tar")
    model = build(loaded.opt)
    model.load_state_dict(loaded.model)
    score = score_all(model.scorer, encode(model, known, vocabulary, progress=False), progress=False)
    np.testing.assert_array_equal(np.load(tmp_path / "masked.npy"), score)
    assert not np.array_equal(np.load(tmp_path / "plain.npy"), score)


def test_resume_takes_finished_scores(made, tmp_path, capsys):
    words = ["evaluate", "--checkpoint", f"{made}/SAF.pth.tar", "--data", f"{made}/pets_precomp", "--no-progress"]
    words += ["--scores", f"{tmp_path}/s.npy"]
    assert main(words) == 0
    first = capsys.readouterr().out.split("SAF: encoded")[0]
    assert main(words) == 2
    assert "s.npy exists; give another name" in capsys.readouterr().err
    assert main([*words, "--resume"]) == 0
    assert capsys.readouterr().out.split("SAF: encoded")[0] == first
    words[2] = f"{made}/SGR.pth.tar"
    assert main([*words, "--resume"]) == 2
    assert "was computed with other encoders, scorer" in capsys.readouterr().err


def test_interruption_is_a_sentence_and_code_130(made, tmp_path, capsys, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("itm_fast.nn.CrossAttentionScore.score", stop)
    words = ["evaluate", "--checkpoint", f"{made}/SCAN.pth.tar", "--data", f"{made}/pets_precomp", "--no-progress"]
    assert main([*words, "--scores", f"{tmp_path}/s.npy"]) == 130
    assert "blocks are kept beside" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"s.npy.partial", "s.npy.journal"}


def test_dry_run_prints_the_plan_and_scores_nothing(made, capsys, monkeypatch):
    monkeypatch.setattr("itm_fast.evaluation.pipeline.encode", None)
    words = ["evaluate", "--checkpoint", f"{made}/SAF.pth.tar", "--data", f"{made}/pets_precomp", "--dry-run"]
    assert main([*words, "--memory-gb", "8"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("SAF: 10 images x 50 captions")
    assert "encoded images" in text
    assert "8.000 GB" in text
    assert f"under torchrun: 0.000 GB of disk in {tempfile.gettempdir()}, " in text
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=1))
    assert main([*words, "--state", "there/run"]) == 0
    enough = "0.000 GB of disk in there/run, 0.000 GB free; NOT ENOUGH: name another folder by --state"
    assert enough in capsys.readouterr().out
    assert not Path("there").exists()
    assert main([*words, "--scores", "s.npy"]) == 2
    assert "torchrun" not in capsys.readouterr().out


@pytest.mark.parametrize("members, scores", [(1, []), (3, []), (3, ["--scores", "s.npy"])])
def test_the_plan_of_a_workload_counts_no_matrix_and_all_members(made, capsys, members, scores):
    words = ["evaluate", "--workload", "f30k-eval-1k", "--dry-run", "--memory-gb", "16", *scores]
    assert main([*words, *["--checkpoint", f"{made}/SAF.pth.tar"] * members]) == 0
    text = capsys.readouterr().out
    assert "score matri" not in text
    assert text.count("the same of the other models") == (members if members > 1 and not scores else 0)


def test_plan_of_a_workload_for_a_checkpoint(made, capsys):
    words = ["evaluate", "--workload", "f30k-eval-1k", "--dry-run", "--checkpoint", f"{made}/SAF.pth.tar"]
    assert main([*words, "--memory-gb", "16"]) == 0
    assert "f30k-eval-1k, SAF: 1,000 images x 5,000 captions (77,442 words)" in capsys.readouterr().out


def test_vocabulary_is_found_or_the_places_are_named(made, tmp_path, capsys):
    shutil.copy(made / "pets.h5", tmp_path / "pets.h5")
    words = ["evaluate", "--checkpoint", f"{made}/SAF.pth.tar", "--data", f"{tmp_path}/pets.h5", "--no-progress"]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert "no vocabulary found; give it with --vocab" in error
    assert "Looked for pets_precomp_vocab.json, pets_vocab.json and vocab.json in " in error
    for folder in (tmp_path, tmp_path / "vocab", tmp_path.parent / "vocab", made, "vocab"):
        assert str(folder) in error
    for place in ("pets_precomp_vocab.json", "pets_vocab.json", "vocab.json", "vocab/pets_precomp_vocab.json"):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        shutil.copy(made / "pets_precomp" / "pets_precomp_vocab.json", tmp_path / place)
        assert main(words) == 0, place
        (tmp_path / place).unlink()


def test_another_vocabulary_is_refused(made, tmp_path, capsys):
    Vocabulary.build(["one word"], min_count=1).save(tmp_path / "v.json")
    words = ["evaluate", "--checkpoint", f"{made}/SAF.pth.tar", "--data", f"{made}/pets_precomp", "--no-progress"]
    assert main([*words, "--vocab", f"{tmp_path}/v.json"]) == 2
    assert f"SAF.pth.tar embeds 12 words, and {tmp_path}/v.json has 6" in capsys.readouterr().err


def test_two_checkpoints_of_one_kind_are_told_apart(made, tmp_path, capsys):
    words = ["evaluate", "--data", f"{made}/pets_precomp", "--no-progress"]
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        shutil.copy(made / "SAF.pth.tar", tmp_path / folder / "model_best.pth.tar")
        words += ["--checkpoint", f"{tmp_path}/{folder}/model_best.pth.tar"]
    assert main(words) == 0
    text = capsys.readouterr().out
    assert "SAF (one/model_best.pth.tar)" in text
    assert "SAF (two/model_best.pth.tar)" in text


@pytest.mark.parametrize(
    "words, sentence",
    [
        ([], "give --checkpoint"),
        (["--checkpoint", "SAF", "--data", "pets_precomp", "--resume"], "name it with --scores"),
        (["--checkpoint", "SAF", "--data", "pets_precomp", "--trec", "5"], "--trec writes its files to --output"),
        (["--workload", "coco-eval-5k"], "give --dry-run"),
        (["--workload", "coco-eval-5k", "--dry-run", "--data", "pets_precomp"], "does not read --data"),
        (["--workload", "coco-eval-5k", "--dry-run", "--folds", "5"], "does not read --folds"),
        (["--workload", "coco-eval-5k", "--dry-run", "--output", "x", "--trec", "9"], "does not read --output, --trec"),
        (["--workload", "coco-eval-5k", "--dry-run", "--scores", "x.npy", "--resume"], "does not read --resume"),
        (["--workload", "coco-eval-5k", "--dry-run", "--split", "x", "--ties", "expected"], "not read --split, --ties"),
        (["--workload", "coco-eval-5k", "--dry-run", "--device", "x"], "device must be such as cpu, cuda or"),
        (["--checkpoint", "SAF", "--data", "nowhere"], "nowhere does not exist"),
        (["--checkpoint", "nothing", "--data", "pets_precomp"], "nothing.pth.tar: No such file"),
        (["--checkpoint", "SAF", "--data", "pets_precomp", "--split", "testall"], "splits in this folder: test"),
        (["--checkpoint", "SAF", "--data", "pets_precomp", "--folds", "4"], "10 images do not divide into 4"),
        (["--checkpoint", "SAF", "--data", "pets_precomp", "--backend", "cuda"], "cuda"),
    ],
)
def test_refusals_are_sentences(words, sentence, made, capsys):
    for option, prefix, end in (("--checkpoint", f"{made}/", ".pth.tar"), ("--data", f"{made}/", "")):
        if option in words:
            at = words.index(option) + 1
            words = [*words[:at], prefix + words[at] + end, *words[at + 1 :]]
    assert main(["evaluate", *words, "--no-progress"]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert "Traceback" not in error
    assert len(error.strip().splitlines()) == 1


def test_features_of_another_size_are_refused(made, tmp_path, capsys):
    data = Split(np.zeros((2, 36, 5), np.float32), ["a red cat", "two dog"], np.array([0, 1]))
    save_splits(tmp_path / "other.h5", {"test": data})
    words = ["evaluate", "--checkpoint", f"{made}/SAF.pth.tar", "--data", f"{tmp_path}/other.h5", "--no-progress"]
    assert main([*words, "--vocab", f"{made}/pets_precomp/pets_precomp_vocab.json"]) == 2
    assert "5 features per region" in capsys.readouterr().err


def test_help_states_folds_ties_and_examples(capsys):
    with pytest.raises(SystemExit):
        main(["evaluate", "--help"])
    text = capsys.readouterr().out
    for word in ("COCO 1K", "pessimistic", "NaN", "--split testall --folds 5", "10^9 bytes", "eccv"):
        assert word in text


def test_the_vocabulary_beside_the_checkpoint_comes_before_one_near_the_data(made, tmp_path, capsys):
    words = Vocabulary.load(made / "pets_precomp" / "pets_precomp_vocab.json")
    other = [*list(words.word2idx)[:4], *reversed(list(words.word2idx)[4:])]
    shutil.copytree(made / "pets_precomp", tmp_path / "pets_precomp")
    Vocabulary(other).save(tmp_path / "pets_precomp" / "pets_precomp_vocab.json")
    (tmp_path / "run").mkdir()
    shutil.copy(made / "SAF.pth.tar", tmp_path / "run")
    words.save(tmp_path / "run" / "pets_precomp_vocab.json")
    command = ["evaluate", "--checkpoint", f"{tmp_path}/run/SAF.pth.tar", "--data", f"{tmp_path}/pets_precomp"]
    assert main([*command, "--no-progress"]) == 0
    assert f"vocabulary: {tmp_path}/run/pets_precomp_vocab.json" in capsys.readouterr().out


@pytest.mark.parametrize("more", [("--trec", "0"), ("--folds", "0")])
def test_what_cannot_be_written_or_cut_is_refused_before_scoring(made, tmp_path, capsys, monkeypatch, more):
    monkeypatch.setattr("itm_fast.evaluation.evaluate", lambda *_, **__: pytest.fail("scored"))
    (tmp_path / "file").write_text("")
    words = ["evaluate", "--checkpoint", f"{made}/SAF.pth.tar", "--data", f"{made}/pets_precomp", "--no-progress"]
    assert main([*words, "--output", f"{tmp_path}/file"]) == 2
    assert main([*words, "--output", f"{tmp_path}/out", *more]) == 2
    assert "at least 1" in capsys.readouterr().err
