"""A score file is used again only for the inputs it was made from; another model's vocabulary is refused."""

from __future__ import annotations

import dataclasses
import itertools
from argparse import Namespace

import numpy as np
import pytest
import torch

from itm_fast.cli import main
from itm_fast.data import Split, Vocabulary, save_splits
from itm_fast.evaluation import encode, evaluate, score_all
from itm_fast.evaluation.encoding import weights_checksum
from itm_fast.models import build
from itm_fast.models._catalogue import CATALOGUE
from itm_fast.training import options as recipe

from .test_evaluate_cli import made  # noqa: F401
from .test_evaluation_report import models, pets
from .test_evaluation_scoring import Scorer, random_encoded


def test_masked_and_unmasked_regions_do_not_share_a_score_file(made, tmp_path, capsys):  # noqa: F811
    split, vocabulary = pets()
    features = split.features[:]
    features[:, 20:] = 0
    save_splits(tmp_path / "padded", {"test": Split(features, split.captions, split.caption_to_image)})
    vocabulary.save(tmp_path / "padded" / "padded_vocab.json")
    plain = ["evaluate", "--checkpoint", f"{made}/SGR.pth.tar", "--data", f"{tmp_path}/padded", "--no-progress"]
    masked = [*plain, "--mask-zero-regions"]
    for number, (first, then) in enumerate(((plain, masked), (masked, plain))):
        scores = ["--scores", f"{tmp_path}/{number}.npy"]
        assert main([*first, *scores]) == 0
        assert main([*first, *scores, "--resume"]) == 0
        capsys.readouterr()
        assert main([*then, *scores, "--resume"]) == 2
        assert "it was computed with other region counts;" in capsys.readouterr().err
    assert not np.array_equal(np.load(tmp_path / "0.npy"), np.load(tmp_path / "1.npy"))


_LENGTHS = ["region_lengths", "no region_lengths"]


@pytest.mark.parametrize(
    "by_hand, change",
    [*((True, change) for change in ("image", "words", "cu_seqlens", "dtype", *_LENGTHS)),
     *((False, change) for change in _LENGTHS)],
)  # fmt: skip
def test_scores_of_other_embeddings_are_not_used_again(tmp_path, by_hand, change):
    encoded = random_encoded(5, 6)
    if by_hand:
        encoded = dataclasses.replace(encoded, fingerprint={})
    out = tmp_path / "x.npy"
    score_all(Scorer(), encoded, out=out, progress=False)
    scorer = Scorer()
    score_all(scorer, dataclasses.replace(encoded), out=out, resume=True, progress=False)
    assert scorer.calls["score"] == 0
    bounds = encoded.cu_seqlens.clone()
    bounds[1:-1] = torch.arange(1, len(bounds) - 1)
    assert not torch.equal(bounds, encoded.cu_seqlens)
    others = {
        "image": {"image": encoded.image + 1},
        "words": {"words": encoded.words + 1},
        "cu_seqlens": {"cu_seqlens": bounds},
        "region_lengths": {"region_lengths": encoded.region_lengths % 5 + 1},
        "no region_lengths": {"region_lengths": None},
        "dtype": {"image": encoded.image.double(), "words": encoded.words.double()},
    }
    other = dataclasses.replace(encoded, **others[change])
    with pytest.raises(ValueError, match=r"computed with other (images|captions|region counts)"):
        score_all(Scorer().to(other.image.dtype), other, out=out, resume=True, progress=False)


_TWO = {  # options that change the scores of the same weights, with two values each
    "all": {"no_imgnorm": (False, True), "no_txtnorm": (False, True)},
    "scan": {
        "cross_attn": ("t2i", "i2t"), "raw_feature_norm": ("clipped_l2norm", "softmax"), "lambda_softmax": (9.0, 4.0),
        "agg_func": ("LogSumExp", "Mean"), "lambda_lse": (6.0, 5.0),
    },
}  # fmt: skip


@pytest.mark.parametrize("name", CATALOGUE)
def test_options_that_change_the_scores_change_the_identity_of_every_model(name):
    small = {"img_dim": 6, "embed_size": 16, "word_dim": 5, "sim_dim": 4}
    own = vars(recipe(name))
    small = {key: value for key, value in small.items() if key in own}
    for option, values in {**_TWO["all"], **_TWO.get(name, {})}.items():
        found = set()
        for value in values:
            torch.manual_seed(0)
            changed = recipe(name, **{**small, option: value})
            model = build(Namespace(**{**vars(changed), "vocab_size": 9, "device": "cpu"}))
            found.add(weights_checksum(model.img_enc, model.txt_enc, model.scorer))
        assert len(found) == len(values), option


@pytest.mark.parametrize("call", ["evaluate", "encode"])
def test_other_words_than_a_model_was_trained_with_are_refused(call, monkeypatch):
    split, vocabulary = pets()
    words = sorted(vocabulary.word2idx, key=vocabulary.word2idx.get)
    other = Vocabulary([*words[:4], *reversed(words[4:])])
    assert len(other) == len(vocabulary)
    nets = models(vocabulary, "SGR", "SAF")
    for net in nets:
        net.vocab_checksum = vocabulary.checksum()

    def run(known, *which):
        if call == "evaluate":
            return evaluate(list(which), split, known, progress=False)
        return [encode(net, split, known, progress=False) for net in which]

    run(vocabulary, *nets)
    monkeypatch.setattr("itm_fast.data.caption_batches", lambda *_: pytest.fail("captions were read"))
    with pytest.raises(ValueError, match=rf"SGRAF model was trained with other words than the {len(other)} of"):
        run(other, nets[0])
    del nets[0].vocab_checksum
    with pytest.raises(ValueError, match="trained with other words"):
        run(other, nets[1]) if call == "encode" else run(other, *nets)
    monkeypatch.undo()
    run(other, nets[0])  # a model that tells nothing takes what it is given


def test_every_key_of_either_side_counts(tmp_path):
    prints = [{}, {"features": "1"}, {"features": "1", "captions": "2"}]
    for number, (mine, theirs) in enumerate(itertools.permutations(prints, 2)):
        encoded = random_encoded(2, 3)
        out = tmp_path / f"{number}.npy"
        score_all(Scorer(), dataclasses.replace(encoded, fingerprint=mine), out=out, progress=False)
        with pytest.raises(ValueError, match="computed with other"):
            score_all(Scorer(), dataclasses.replace(encoded, fingerprint=theirs), out=out, resume=True, progress=False)
