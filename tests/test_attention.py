"""`itm_fast.attention`: the weights of every model give its score."""

import numpy as np
import pytest
import torch
from model_cases import MODELS
from sgraf_cases import D, R

import itm_fast
from itm_fast import nn
from itm_fast.data import open_split
from itm_fast.data.openclipart import CHECKPOINTS, FOLDER
from itm_fast.models.dual_encoder import MeanCosine

WORDS = 6


def pair(dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    rows = (torch.randn(n, D, generator=generator, dtype=dtype) for n in (R, WORDS))
    return [torch.nn.functional.normalize(x, dim=1) for x in rows]


def expected(scorer, image, words):
    return scorer(image[None], words, torch.tensor([0, len(words)], dtype=torch.int32)).item()


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_the_weights_of_every_model_give_its_score(name):
    scorer = MODELS[name].scorer()
    image, words = pair()
    found = scorer.attention(image, words)
    assert found.score == pytest.approx(expected(scorer, image, words), rel=1e-9)
    shapes = {"regions": [WORDS, R], "words": [R, WORDS], "nodes": [1 + WORDS], "word_pool": [WORDS]}
    assert found.weights
    for kind, weights in found.weights.items():
        assert list(weights.shape) == shapes.get(kind, list(weights.shape))
        if kind in ("cosines", "confidence"):
            continue
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights.sum(-1)), rtol=0, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("direction", ["t2i", "i2t"])
@pytest.mark.parametrize(("norm", "pool"), [("clipped_l2norm", "lse"), ("softmax", "max"), ("none", "sum")])
def test_scan(direction, norm, pool):
    scorer, (image, words) = nn.CrossAttentionScore(direction, norm, 7.0, pool, 3.0), pair()
    found = scorer.attention(image, words)
    assert found.score == pytest.approx(expected(scorer, image, words), rel=1e-9)
    weight = found.weights["regions" if direction == "t2i" else "words"]
    assert list(weight.shape) == ([WORDS, R] if direction == "t2i" else [R, WORDS])
    assert len(found.weights["cosines"]) == len(weight)


@pytest.mark.parametrize("name", ["scan", "sgr", "saf"])
def test_trained_models(name):
    loaded = itm_fast.models.load(CHECKPOINTS[name], "cpu")
    features = open_split(FOLDER, "test").features[4:5][0]
    found = itm_fast.attention(loaded.model, features, "a red apple", loaded.vocab)
    assert found.tokens == ("<start>", "a", "red", "apple", "<end>")
    score = itm_fast.evaluation.score(loaded.model, features[None], ["a red apple"], loaded.vocab)
    assert found.score == pytest.approx(float(score[0, 0]), abs=1e-5)
    same = itm_fast.attention(loaded.model, torch.from_numpy(np.array(features)), "a red apple", loaded.vocab)
    assert same.score == found.score


def test_mistakes():
    loaded = itm_fast.models.load(CHECKPOINTS["saf"], "cpu")
    features = open_split(FOLDER, "test").features[:2]
    with pytest.raises(ValueError, match=r"must be the features \[R, F\] of one image, got \[2, 36, 128\]"):
        itm_fast.attention(loaded.model, features, "a red apple", loaded.vocab)
    with pytest.raises(ValueError, match="the caption is empty"):
        itm_fast.attention(loaded.model, features[0], "  ", loaded.vocab)
    loaded.model.train_start()
    with pytest.raises(ValueError, match="in training mode"):
        itm_fast.attention(loaded.model, features[0], "a red apple", loaded.vocab)
    with pytest.raises(NotImplementedError, match="MeanCosine has no attention weights to show"):
        MeanCosine().attention(*pair())
