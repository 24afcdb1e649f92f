"""Search in a gallery: exact search is the ranking of evaluation, and two-stage search says what it misses."""

from __future__ import annotations

import json
import sys
from argparse import Namespace

import numpy as np
import pytest
import torch

import itm_fast
from itm_fast import Gallery
from itm_fast.data import Split
from itm_fast.evaluation import encode, metrics, score_all
from itm_fast.gallery import gallery as module
from itm_fast.gallery import measured, pooled, scoring
from itm_fast.gallery.pooled import FaissIndex, ProductIndex
from itm_fast.models import Loaded, build
from itm_fast.models.dual_encoder import MeanCosine

from .test_evaluation_report import options, pets
from .test_rebuild import OPTIONS

IMAGES = 12


def loaded(kind: str, seed: int = 0) -> Loaded:
    _, vocabulary = pets(IMAGES)
    torch.manual_seed(seed)
    model = build(options(kind, len(vocabulary)))
    model.val_start()
    return Loaded(model, vocabulary, "SCAN t2i" if kind == "SCAN" else kind)


def ragged(images: int = IMAGES) -> Split:
    """Images with different region counts."""
    split, _ = pets(images)
    return Split(split.features[:], split.captions, split.caption_to_image, 30 + np.arange(images) % 7)


@pytest.fixture(scope="module")
def scan() -> Loaded:
    return loaded("SCAN")


@pytest.fixture(scope="module")
def sgr() -> Loaded:
    return loaded("SGR", 1)


def matrix(model: Loaded, split: Split, dtype=torch.float32) -> np.ndarray:
    encoded = encode(model.model, split, model.vocab, progress=False)
    encoded.image.copy_(encoded.image.to(dtype))
    return score_all(model.model.scorer, encoded, progress=False)


def ranked(score: np.ndarray) -> np.ndarray:
    """Images of each caption, best first, equal scores in the order of the images."""
    return np.argsort(-score, axis=0, kind="stable").T


@pytest.fixture
def small_parts(monkeypatch):
    """Rows of 5 images, and 7 captions, in memory at once."""
    monkeypatch.setattr(scoring, "_CHUNK", 5 * 36 * 8 * 4)
    monkeypatch.setattr(module, "_GROUP", 35)


@pytest.mark.parametrize("kind", ["SCAN", "SGR"])
def test_exact_search_is_the_ranking_of_evaluation(kind, tmp_path, small_parts):
    model, split = loaded(kind), ragged()
    gallery = Gallery.build(model, split, tmp_path / "g", progress=False, batch_size=128)
    found = gallery.search(split.captions[:35], k=IMAGES)
    score = matrix(model, split)[:, :35]
    if itm_fast.why_not("cpu") is None:  # other backends may give a pair other last bits in another block
        np.testing.assert_array_equal(found.images, ranked(score))
    np.testing.assert_allclose(found.scores, np.take_along_axis(score, ranked(score).T, axis=0).T, rtol=1e-5, atol=1e-6)
    owner = split.caption_to_image[:35]
    right = metrics(score, owner, ties="optimistic").t2i
    for k in (1, 5, 10):
        recall = np.mean([image in row[:k] for image, row in zip(owner, found.images, strict=True)])
        assert 100 * recall == pytest.approx(getattr(right, f"r{k}"))
    assert not found.approximate
    assert "exact: " in repr(found)
    assert "APPROXIMATE" not in str(found)


def test_captions_are_searched_in_groups(scan, tmp_path, small_parts, monkeypatch):
    split = ragged()
    gallery = Gallery.build(scan, split, tmp_path / "g", progress=False)
    read = []
    real = scoring.Images.read
    monkeypatch.setattr(scoring.Images, "read", lambda self, images: read.append(images) or real(self, images))
    found = gallery.search(split.captions, k=3)
    assert len(split.captions) > module._GROUP
    assert read == [slice(0, 5), slice(5, 10), slice(10, 12)] * 2  # so many rows are in memory at once
    np.testing.assert_allclose(found.scores, -np.sort(-matrix(scan, split), axis=0)[:3].T, rtol=1e-5, atol=1e-6)
    assert gallery.search(split.captions[:2], k=99).images.shape == (2, IMAGES)


def test_a_model_in_training_is_searched_as_in_evaluation(sgr, tmp_path):
    """Without dropout; afterwards it is in training again."""
    gallery = Gallery.build(sgr, ragged(), tmp_path / "g", progress=False)
    wanted = gallery.search(["red dog", "two cats"], k=4)
    sgr.model.train_start()
    try:
        found = gallery.search(["red dog", "two cats"], k=4)
        assert all(part.training for part in sgr.model.modules)
    finally:
        sgr.model.val_start()
    np.testing.assert_array_equal(found.scores, wanted.scores)


def test_half_precision_is_the_exact_search_of_rounded_rows(scan, tmp_path):
    split = ragged()
    whole = Gallery.build(scan, split, tmp_path / "g", progress=False)
    half = Gallery.build(scan, split, tmp_path / "h", dtype="float16", progress=False)
    sizes = [(one.path / "image.npy").stat().st_size - 128 for one in (whole, half)]
    assert sizes[0] == 2 * sizes[1] == IMAGES * 36 * 8 * 4
    score = matrix(scan, split, torch.float16)[:, :20]
    found = half.search(split.captions[:20], k=4)
    np.testing.assert_allclose(found.scores, -np.sort(-score, axis=0)[:4].T, rtol=1e-5, atol=1e-6)
    assert np.load(half.path / "image.npy").dtype == np.float16


@pytest.mark.parametrize("kind", ["SCAN", "SGR"])
def test_two_stages_with_all_candidates_are_exact_search(kind, scan, tmp_path, small_parts):
    model, split = loaded(kind), ragged()
    first = scan if kind == "SGR" else None
    gallery = Gallery.build(model, split, tmp_path / "g", first=first, progress=False)
    exact = gallery.search(split.captions[:9], k=4)
    found = gallery.search(split.captions[:9], k=4, candidates=IMAGES, first=first, sample=split.captions[9:15])
    if itm_fast.why_not("cpu") is None:
        np.testing.assert_array_equal(found.images, exact.images)
        np.testing.assert_array_equal(found.scores, exact.scores)
        assert found.recall.value == found.recall.high == 1.0
    np.testing.assert_allclose(found.scores, exact.scores, rtol=1e-5, atol=1e-6)
    # Named approximate wherever it is shown, and never as the model's recall:
    assert found.approximate
    shown = json.dumps(found.to_dict())
    for text in (repr(found), str(found), shown):
        assert "APPROXIMATE" in text
        assert "of the 4 best of exact search are found (95 % interval" in text
    assert json.loads(shown)["approximate"] is True
    assert json.loads(shown)["recall_of_exact_search"]["of_exact_search"] == found.recall.value


@pytest.mark.parametrize("name", OPTIONS)
def test_every_model_is_searched(name, scan, tmp_path):
    split, vocabulary = ragged(), scan.vocab
    torch.manual_seed(0)
    opt = Namespace(**vars(OPTIONS[name]), vocab_size=len(vocabulary), device="cpu")
    model = Loaded(build(opt), vocabulary, name)
    gallery = Gallery.build(model, split, tmp_path / "g", first=scan, progress=False)
    texts = split.captions[:6]
    wanted = -np.sort(-matrix(model, split)[:, :6], axis=0)[:5].T
    for more in ({}, {"candidates": IMAGES, "first": scan, "sample": texts[:2]}):
        np.testing.assert_allclose(gallery.search(texts, k=5, **more).scores, wanted, rtol=1e-4, atol=1e-5)


def test_recall_is_that_of_the_sample_and_is_measured_once(sgr, scan, tmp_path, monkeypatch):
    split = ragged()
    monkeypatch.setattr(measured, "SAMPLE", 15)
    gallery = Gallery.build(sgr, split, tmp_path / "g", first=scan, progress=False)
    sample = gallery.about.sample
    assert set(sample) <= set(split.captions)
    assert len(sample) == len(set(sample)) == 15
    exact = gallery.search(sample, k=3)
    found = gallery.search(sample, k=3, candidates=5, first=scan)
    hits = [len(set(a) & set(b)) / 3 for a, b in zip(exact.images.tolist(), found.images.tolist(), strict=True)]
    assert found.recall.value == pytest.approx(np.mean(hits))
    assert 0 < found.recall.low < found.recall.value < found.recall.high < 1
    assert (found.recall.captions, found.recall.k, found.recall.candidates) == (len(sample), 3, 5)
    kept = json.loads((tmp_path / "g" / "recall.json").read_text())
    assert len(kept) == 2  # the exact images of the sample, and one recall

    again = Gallery.open(tmp_path / "g", sgr)
    monkeypatch.setattr(module, "search_all", lambda *_, **__: pytest.fail("the sample was searched again"))
    assert again.search(["a red cat"], k=3, candidates=5, first=scan).recall == found.recall
    assert again.recall(2, candidates=5, first=scan).k == 2  # of the exact images that are kept
    (tmp_path / "g" / "recall.json").write_text("{")
    monkeypatch.undo()
    assert Gallery.open(tmp_path / "g", sgr).recall(3, candidates=5, first=scan) == found.recall


def test_candidates_are_the_nearest_by_the_first_checkpoint(sgr, scan, tmp_path):
    """Of its own mean regions and mean words, padding left out."""
    split = ragged()
    gallery = Gallery.build(sgr, split, tmp_path / "g", first=scan, progress=False)
    texts = split.captions[:8]
    found = gallery.search(texts, k=4, candidates=4, first=scan, sample=texts[:2])
    cosines = score_all(MeanCosine(), encode(scan.model, split, scan.vocab, progress=False), progress=False)[:, :8]
    np.testing.assert_array_equal(np.sort(found.images), np.sort(ranked(cosines)[:, :4]))


def test_an_index_of_the_callers(scan, tmp_path):
    """Rows may repeat, and -1 stands for none, as in faiss. Its recall is kept in this process alone."""
    split = ragged()
    gallery = Gallery.build(scan, split.features[:], tmp_path / "g", progress=False)

    class Fixed:
        rows = (3, 1, -1, 3, 5)

        def search(self, queries, k):
            assert queries.dtype == np.float32
            assert (queries.shape[1], k) == (8, 5)
            rows = np.array([self.rows] * len(queries))
            rows[:, 4] += (rows[:, 4] == 5) * (np.arange(len(queries)) % 6)  # another one for each caption
            return np.zeros((len(queries), 5)), rows

    index, texts = Fixed(), split.captions[:6]
    with pytest.raises(ValueError, match=r"this gallery was built without; give some as sample="):
        gallery.search(texts, k=2, candidates=5, index=index)
    found = gallery.search(texts, k=3, candidates=5, index=index, sample=split.captions[:9])
    assert np.sort(found.images).tolist() == [[1, 3, 5 + caption] for caption in range(6)]
    assert (found.recall.index, found.recall.captions) == ("Fixed", 9)
    assert "Fixed" not in (tmp_path / "g" / "recall.json").read_text()
    for rows, message in (
        ((3, 1, -1, 3, -1), "the index found 2 images for a caption, and the 3 best are asked for"),
        ((3, 1, 12, 4, 5), "rows 1 to 12, and the gallery has 12 images: the index is of another gallery"),
        ((3.0, 1, 2, 4, 5), r"must return scores and row numbers \[6, 5\], got row numbers float64"),
    ):
        index.rows = rows
        with pytest.raises(ValueError, match=message):
            gallery.search(texts, k=3, candidates=5, index=index, sample=split.captions[:9])


def test_products_in_parts_are_all_products(monkeypatch):
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((50, 6)).astype(np.float32)
    queries = rng.standard_normal((9, 6)).astype(np.float32)
    monkeypatch.setattr(pooled, "_CHUNK", 9 * 7)
    scores, items = ProductIndex(vectors, torch.device("cpu")).search(queries, 10)
    wanted = ranked(vectors @ queries.T)[:, :10]
    np.testing.assert_array_equal(items, wanted)
    np.testing.assert_allclose(scores, np.take_along_axis(queries @ vectors.T, wanted, 1), rtol=1e-5, atol=1e-6)


def test_faiss_above_a_million(monkeypatch):
    vectors = np.random.default_rng(0).standard_normal((400, 6)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    assert isinstance(pooled.index_over(vectors, torch.device("cpu")), ProductIndex)
    monkeypatch.setattr(pooled, "MANY", 399)
    monkeypatch.setitem(sys.modules, "faiss", None)
    monkeypatch.setattr(pooled, "find_spec", lambda name: None)
    assert isinstance(pooled.index_over(vectors, torch.device("cpu")), ProductIndex)
    monkeypatch.undo()
    pytest.importorskip("faiss")
    monkeypatch.setattr(pooled, "MANY", 399)
    index = pooled.index_over(vectors, torch.device("cpu"))
    assert isinstance(index, FaissIndex)
    np.testing.assert_array_equal(index.search(vectors[:20], 1)[1], np.arange(20)[:, None])
