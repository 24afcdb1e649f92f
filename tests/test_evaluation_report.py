"""TREC files, CxC and ECCV metrics, and the whole evaluation of several models."""

from __future__ import annotations

import builtins
import importlib.util
from argparse import Namespace

import numpy as np
import pytest
import torch

import itm_fast
from itm_fast._files import atomic_write
from itm_fast.data import Split, Vocabulary
from itm_fast.evaluation import (
    encode,
    evaluate,
    fold_metrics,
    memory,
    metrics,
    relevance,
    relevance_metrics,
    score_all,
    why_no_relevance,
    write_trec,
)
from itm_fast.models import build

needs_eccv = pytest.mark.skipif(
    importlib.util.find_spec("eccv_caption") is None, reason="needs the extra itm-fast[eccv]"
)

AUTO = "cpu" if itm_fast.why_not("cpu") is None else "torch"  # what runs when no backend is asked for


def options(kind: str, vocabulary: int, device: str = "cpu") -> Namespace:
    opt = Namespace(
        grad_clip=2.0, img_dim=6, embed_size=8, precomp_enc_type="basic", no_imgnorm=False, no_txtnorm=False,
        vocab_size=vocabulary, word_dim=5, num_layers=1, bi_gru=True, margin=0.2, max_violation=True,
        learning_rate=2e-4, data_name="pets_precomp", vocab_path="./vocab/", device=device,
    )  # fmt: skip
    if kind == "SCAN":
        opt.cross_attn, opt.raw_feature_norm, opt.agg_func = "t2i", "clipped_l2norm", "LogSumExp"
        opt.lambda_softmax, opt.lambda_lse = 9.0, 6.0
    else:
        opt.module_name, opt.sgr_step, opt.sim_dim = kind, 3, 4
    return opt


def pets(images: int = 10, per_image: int = 5, regions: int = 36) -> tuple[Split, Vocabulary]:
    rng = np.random.default_rng(0)
    words = ["red", "cat", "dog", "sits", "on", "mat", "two", "old"]
    texts = [" ".join(rng.choice(words, rng.integers(2, 9))) for _ in range(images * per_image)]
    features = rng.standard_normal((images, regions, 6)).astype(np.float32)
    return Split(features, texts, np.arange(len(texts)) // per_image), Vocabulary.build(texts, min_count=1)


def models(vocabulary: Vocabulary, *kinds: str) -> list:
    made = []
    for seed, kind in enumerate(kinds):
        torch.manual_seed(seed)
        made.append(build(options(kind, len(vocabulary))))
    return made


def test_files_are_whole_or_not_there(tmp_path):
    file = atomic_write(tmp_path / "x.txt")
    file.__enter__().write("half")
    assert not file.__exit__(RuntimeError, RuntimeError(), None)
    assert not list(tmp_path.iterdir())
    with atomic_write(tmp_path / "x.txt") as file:
        file.write("whole")
        assert not (tmp_path / "x.txt").exists()
    assert (tmp_path / "x.txt").read_text() == "whole"


def test_trec_files_rank_as_the_scores_do(tmp_path):
    score = np.random.default_rng(0).permutation(60).reshape(4, 15).astype(np.float32) / 7
    owner = np.random.default_rng(1).integers(0, 4, 15)
    write_trec(tmp_path, score, owner, top=3, image_ids=np.arange(4) + 100, caption_ids=np.arange(15) + 900)
    for side, table, queries, items in (("i2t", score, 100, 900), ("t2i", score.T, 900, 100)):
        lines = [line.split() for line in (tmp_path / f"{side}.run").read_text().splitlines()]
        assert len(lines) == 3 * len(table)
        for query, row in enumerate(table):
            mine = lines[3 * query : 3 * query + 3]
            best = np.argsort(row)[::-1][:3]
            assert [line[2] for line in mine] == [str(items + item) for item in best]
            assert [np.float32(line[4]) for line in mine] == row[best].tolist()
            assert all(line[0] == str(queries + query) and line[1] == "Q0" and line[5] == "itm-fast" for line in mine)
            assert [line[3] for line in mine] == ["1", "2", "3"]
        right = {tuple(line.split()) for line in (tmp_path / f"{side}.qrels").read_text().splitlines()}
        pairs = [(owner[c] + 100, c + 900) for c in range(15)]
        assert right == {
            (str(a), "0", str(b), "1") for a, b in (pairs if side == "i2t" else [pair[::-1] for pair in pairs])
        }
    with pytest.raises(ValueError, match="top must be at least 1"):
        write_trec(tmp_path, score, owner, top=0)


@pytest.mark.parametrize("kinds", [("SCAN",), ("SGR", "SAF"), ("SGR", "SAF", "SCAN")])
@pytest.mark.parametrize("in_file", [False, True])
def test_evaluate_reports_each_model_and_their_mean(kinds, in_file, tmp_path):
    split, vocabulary = pets()
    nets = models(vocabulary, *kinds)
    scores = [score_all(n.scorer, encode(n, split, vocabulary, progress=False), progress=False) for n in nets]
    out = tmp_path / "s.npy" if in_file else None
    found = evaluate(nets, split, vocabulary, folds=5, scores=out, progress=False, names=kinds)
    for system, score in zip(found.systems, scores, strict=False):
        assert system.pools[1].metrics == metrics(score, split.caption_to_image)
        assert system.pools[0].folds == tuple(fold_metrics(score, split.caption_to_image, 5))
        assert system.pairs_per_second is not None
    np.testing.assert_allclose(found.score, np.mean(scores, axis=0, dtype=np.float64), rtol=1e-6)
    if len(kinds) > 1:
        assert found.systems[-1].name == "mean of the scores"
        assert found.systems[-1].pools[1].metrics == metrics(found.score, split.caption_to_image)
        members = [f"s-{number}.npy" for number in range(1, len(kinds) + 1)]
    else:
        assert len(found.systems) == 1
        members = []
    if in_file:
        np.testing.assert_array_equal(np.load(out), found.score)
        assert {path.name for path in tmp_path.glob("*.npy")} == {"s.npy", *members}
        with pytest.raises(FileExistsError):
            evaluate(nets, split, vocabulary, scores=out, progress=False)
        again = evaluate(nets, split, vocabulary, scores=out, resume=True, progress=False)
        np.testing.assert_array_equal(again.score, found.score)
        assert again.systems[0].pairs_per_second is None
    assert found.settings["backend"] == AUTO
    assert found.relevance_missing == relevance.why_no_relevance(None, None)


def test_the_file_of_the_mean_is_not_overwritten(tmp_path):
    split, vocabulary = pets()
    (tmp_path / "s.npy").touch()
    with pytest.raises(FileExistsError, match=r"s\.npy exists"):
        evaluate(models(vocabulary, "SGR", "SAF"), split, vocabulary, scores=tmp_path / "s.npy", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["s.npy"]


def test_evaluate_leaves_the_members_scores_apart_from_their_sum():
    split, vocabulary = pets()
    nets = models(vocabulary, "SGR", "SAF")
    alone = evaluate(nets[0], split, vocabulary, progress=False)
    both = evaluate(nets, split, vocabulary, progress=False)
    assert both.systems[0].pools == alone.systems[0].pools


def test_evaluate_refuses_before_it_encodes(monkeypatch):
    split, vocabulary = pets()
    nets = models(vocabulary, "SGR")
    monkeypatch.setattr("itm_fast.evaluation.pipeline.encode", None)
    with pytest.raises(ValueError, match="10 images do not divide into 3 equal folds"):
        evaluate(nets, split, vocabulary, folds=3)
    with pytest.raises(ValueError, match=r"a memory budget of 0\.01 GB cannot hold"):
        evaluate(nets, split, vocabulary, memory_gb=0.01)
    with pytest.raises(ValueError, match="one name per model"):
        evaluate(nets, split, vocabulary, names=["a", "b"])
    other = Split(np.zeros((2, 36, 7), np.float32), ["a"], np.array([0]))
    with pytest.raises(ValueError, match="7 features per region"):
        evaluate(nets, other, vocabulary)


def test_the_least_budget_is_enough_to_the_end(monkeypatch):
    monkeypatch.setattr(memory, "_process_bytes", lambda _: 10**9)  # nothing else is freed or taken meanwhile
    split, vocabulary = pets()
    nets = models(vocabulary, "SGR", "SAF")
    with pytest.raises(ValueError, match="the least that can is") as refusal:
        evaluate(nets, split, vocabulary, memory_gb=0.01)
    least = float(str(refusal.value).split("the least that can is ")[1].split(" GB")[0])
    assert len(evaluate(nets, split, vocabulary, memory_gb=least + 0.01, progress=False).systems) == 3


def test_why_no_relevance_says_what_is_missing(monkeypatch):
    ids = np.arange(3)
    assert "neither" in why_no_relevance(None, None)
    assert "no image ids" in why_no_relevance(None, ids)
    assert "no caption ids" in why_no_relevance(ids, None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install '.[eccv]'" in why_no_relevance(ids, ids)
    with pytest.raises(ValueError, match="pip install"):
        relevance_metrics(np.zeros((3, 3), np.float32), ids, ids)


@needs_eccv
def test_other_ids_than_coco_5k_are_named():
    assert "5,000 of its image ids, such as" in why_no_relevance(np.arange(3) + 10**9, np.arange(3))


@pytest.fixture(scope="module")
def coco() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Random scores of COCO's 5,000 x 25,000 test set, the right pairs raised, with its ids. Many scores are equal."""
    labels = relevance._labels()
    captions = np.asarray(labels.coco_ids)
    owners = [labels.coco_gts["t2i"][int(caption)][0] for caption in captions]
    images = np.array(list(dict.fromkeys(owners)))
    position = {int(image): index for index, image in enumerate(images)}
    owner = np.array([position[image] for image in owners])
    score = np.random.default_rng(0).random((5000, 25000), dtype=np.float32)
    score[owner, np.arange(25000)] = 1 - np.random.default_rng(1).random(25000, dtype=np.float32) ** 3 * 0.02
    return (score * 2**14).round() / 2**14, owner, images, captions


@pytest.mark.slow
@needs_eccv
def test_recalls_equal_the_eccv_package_on_coco_5k(coco):
    score, owner, images, captions = coco
    labels = relevance._labels()
    ranked = relevance._ranked(score, images, captions, labels.coco_gts, 10, ["pessimistic"])["pessimistic"]
    found = metrics(score, owner)
    for number, k in enumerate((1, 5, 10)):
        theirs = labels.coco_5k_recalls(ranked, "all", K=k)
        assert found.i2t.recalls[number] == pytest.approx(100 * theirs["i2t"], abs=1e-9)
        assert found.t2i.recalls[number] == pytest.approx(100 * theirs["t2i"], abs=1e-9)
    assert 0.5 < found.i2t.r1 < 99.5
    assert 0.5 < found.t2i.r1 < 99.5


@pytest.mark.slow
@needs_eccv
def test_cxc_and_eccv_metrics_equal_their_definitions(coco):
    """Against sorts written here, over a part of the queries in every direction."""
    score, _, images, captions = coco
    labels = relevance._labels()
    found = relevance_metrics(score, images, captions)
    for side, queries, items, table in (("i2t", images, captions, score), ("t2i", captions, images, score.T)):
        at = {int(query): index for index, query in enumerate(queries)}
        maps, precisions, firsts = [], [], []
        for query, right in labels.eccv_gts[side].items():
            right = set(right)
            is_right = np.isin(items, list(right))
            hits = is_right[np.lexsort((is_right, -table[at[query]]))[: len(right)]]  # a right item loses a tie
            maps.append(np.sum(np.cumsum(hits) / np.arange(1, len(hits) + 1) * hits) / len(hits))
            precisions.append(hits.mean())
            firsts.append(hits[0])
        assert found["eccv_map_at_r"][side] == pytest.approx(100 * np.mean(maps), abs=1e-9)
        assert found["eccv_rprecision"][side] == pytest.approx(100 * np.mean(precisions), abs=1e-9)
        assert found["eccv_r1"][side] == pytest.approx(100 * np.mean(firsts), abs=1e-9)
    i2t = {query: set(right) for query, right in labels.cxc_gts["i2t"].items()}
    at = {int(image): index for index, image in enumerate(images)}
    wrong = [np.isin(captions, list(right), invert=True) for right in i2t.values()]
    tables = [score[at[image]] for image in i2t]
    hits = [row[~is_wrong].max() > row[is_wrong].max() for row, is_wrong in zip(tables, wrong, strict=True)]
    assert found["cxc_r1"]["i2t"] == pytest.approx(100 * np.mean(hits), abs=1e-9)
    assert set(found) == {"cxc_r1", "cxc_r5", "cxc_r10", "eccv_map_at_r", "eccv_rprecision", "eccv_r1"}


def test_evaluation_needs_no_eccv_package(monkeypatch):
    original = builtins.__import__

    def without(name, *args, **keywords):
        if name.startswith("eccv_caption"):
            raise ModuleNotFoundError(name)
        return original(name, *args, **keywords)

    monkeypatch.setattr(builtins, "__import__", without)
    split, vocabulary = pets()
    assert evaluate(models(vocabulary, "SAF"), split, vocabulary, progress=False).systems[0].relevance is None
