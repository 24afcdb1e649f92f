"""PMRP: against the eccv-caption package, against sorted lists where scores are equal, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest

from itm_fast.cli import main
from itm_fast.data import Split
from itm_fast.evaluation import evaluate
from itm_fast.evaluation.plausible import FILES, load_plausible, plausible_of, plausible_r_precision

from .test_evaluation_report import models, pets


@pytest.fixture
def case(tmp_path):
    rng = np.random.default_rng(0)
    images, captions = np.arange(12) + 100, np.arange(30) + 500
    right = rng.random((12, 30)) < 0.3
    right[0, :] = True
    labels = {
        "i2t": {int(images[i]): captions[right[i]].tolist() for i in range(12) if right[i].any()},
        "t2i": {int(captions[t]): images[right[:, t]].tolist() for t in range(30)},
    }
    for side, name in FILES.items():
        (tmp_path / name).write_text(json.dumps(labels[side]))
    return images, captions, right, tmp_path


def test_the_numbers_are_those_of_eccv_caption(case):
    package = pytest.importorskip("eccv_caption")
    images, captions, _, folder = case
    score = np.random.default_rng(1).permutation(360).reshape(12, 30).astype(np.float32)
    found = plausible_r_precision(score, images, captions, load_plausible(folder))
    ranked = {
        "i2t": {int(images[i]): captions[np.argsort(-score[i])].tolist() for i in range(12)},
        "t2i": {int(captions[t]): images[np.argsort(-score[:, t])].tolist() for t in range(30)},
    }
    expected = package.Metrics(extra_file_dir=str(folder)).pmrp(ranked, "all")
    for rule in ("pessimistic", "optimistic", "published"):
        assert found[rule] == pytest.approx({side: 100 * value for side, value in expected.items()})


@pytest.mark.parametrize("rule", ["pessimistic", "optimistic", "published"])
def test_ties_are_ranked_by_their_rule(case, rule):
    images, captions, right, folder = case
    score = np.random.default_rng(2).integers(0, 4, (12, 30)).astype(np.float32)
    found = plausible_r_precision(score, images, captions, load_plausible(folder))[rule]
    for side, rows, marks in (("i2t", score, right), ("t2i", score.T, right.T)):
        shares = []
        for row, own in zip(rows, marks, strict=True):
            second = {"pessimistic": own, "optimistic": ~own, "published": -np.arange(len(row))}[rule]
            shares.append(own[np.lexsort((second, -row))][: own.sum()].mean())
        assert found[side] == pytest.approx(100 * np.mean(shares))


def test_the_metrics_command_reports_it(case, capsys):
    images, captions, right, folder = case
    score = np.random.default_rng(3).integers(0, 9, (12, 30)).astype(np.float32)
    np.save(folder / "scores.npy", score)
    np.save(folder / "images.npy", images)
    (folder / "captions.txt").write_text("\n".join(map(str, captions)))
    owner = [int(np.flatnonzero(right[:, t])[0]) for t in range(30)]
    (folder / "owner.json").write_text(json.dumps(owner))
    words = ["metrics", f"{folder}/scores.npy", "--captions-to-images", f"{folder}/owner.json"]
    words += ["--image-ids", f"{folder}/images.npy", "--pmrp", str(folder), "--ties", "optimistic"]
    assert main(words) == 2
    assert "PMRP needs COCO image and caption ids" in capsys.readouterr().err
    words += ["--caption-ids", f"{folder}/captions.txt", "--output", f"{folder}/out"]
    assert main(words) == 0
    assert "plausible matches, %, ties optimistic" in capsys.readouterr().out
    found = json.loads((folder / "out" / "results.json").read_text())["systems"][0]
    expected = plausible_r_precision(score, images, captions, load_plausible(folder))
    assert found["relevance"] == {"pmrp": expected["optimistic"]}
    assert found["relevance_by_ties"]["published"] == {"pmrp": expected["published"]}
    assert "pmrp_optimistic" in (folder / "out" / "results.csv").read_text()
    assert r"Model & PMRP & PMRP \\" in (folder / "out" / "results.tex").read_text()
    (folder / "captions.txt").write_text("a b")
    assert main(words) == 2
    assert "must hold integers, one for each image or caption" in capsys.readouterr().err


def test_labels_that_do_not_fit_are_refused(case):
    images, captions, _, folder = case
    with pytest.raises(ValueError, match=r"1 of its image ids, 100, is not in this data; .* \(--split testall\)"):
        plausible_of(folder, images[1:], captions)
    with pytest.raises(ValueError, match=r"30 of its caption ids, such as 500, are not in this data$"):
        plausible_of(folder, images, captions + 30)
    with pytest.raises(ValueError, match=r"this data has no caption ids: .* SPLIT_ids.txt and SPLIT_capids.txt"):
        plausible_of(folder, images, None)
    (folder / FILES["t2i"]).write_text("[1, 2]")
    with pytest.raises(ValueError, match="must hold an object"):
        load_plausible(folder)
    with pytest.raises(FileNotFoundError, match=r"No such file .* must hold pm_\S+ and pm_\S+, which the eccv-caption"):
        load_plausible(folder / "none")


def test_evaluate_reports_it_where_there_is_a_matrix(case):
    _, _, _, folder = case
    split, vocabulary = pets()
    given = (split.features, split.captions, split.caption_to_image)
    split = Split(*given, image_ids=np.arange(10) + 100, caption_ids=np.arange(50) + 500)
    right = np.random.default_rng(4).random((10, 50)) < 0.3
    labels = {
        "i2t": {100 + i: (500 + np.flatnonzero(right[i])).tolist() for i in range(10)},
        "t2i": {500 + t: (100 + np.flatnonzero(right[:, t])).tolist() for t in range(50) if right[:, t].any()},
    }
    for side, name in FILES.items():
        (folder / name).write_text(json.dumps(labels[side]))
    nets = models(vocabulary, "SCAN", "SAF")
    found = evaluate(nets, split, vocabulary, scores=folder / "s.npy", progress=False, pmrp=folder, ties="optimistic")
    for system, file in zip(found.systems, ("s-1.npy", "s-2.npy", "s.npy"), strict=True):
        expected = plausible_r_precision(np.load(folder / file), split.image_ids, split.caption_ids, labels)
        assert system.relevance["pmrp"] == expected["optimistic"]
        assert {rule: sides["pmrp"] for rule, sides in system.relevance_by_ties.items()} == expected
    assert found.settings["relevance_ties"] == "optimistic"
    with pytest.raises(ValueError, match="PMRP is computed from the score matrix; give scores"):
        evaluate(nets, split, vocabulary, keep_scores=False, pmrp=folder)
    # What does not fit is refused before anything is scored.
    with pytest.raises(ValueError, match="PMRP needs COCO image and caption ids"):
        evaluate(nets, Split(*given), vocabulary, scores=folder / "none.npy", progress=False, pmrp=folder)
    assert not list(folder.glob("none*"))


def test_evaluate_says_that_it_needs_the_scores(capsys):
    assert main(["evaluate", "--checkpoint", "x.pth.tar", "--data", "x", "--pmrp", "labels"]) == 2
    assert "keep it with --scores FILE.npy" in capsys.readouterr().err
