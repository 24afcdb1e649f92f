"""From the file of a published checkpoint to scores in three lines, and what is refused on the way."""

from __future__ import annotations

import argparse
import shutil

import numpy as np
import pytest
import torch

import itm_fast
from itm_fast.data import Vocabulary, open_split
from itm_fast.data.openclipart import CHECKPOINTS, FOLDER, VOCABULARY
from itm_fast.evaluation import encode, score, score_all
from itm_fast.models import checkpoint, load
from itm_fast.training import checkpoint as writing
from itm_fast.training import options

NAMES = {"sgr": "SGR", "saf": "SAF", "scan": "SCAN t2i"}
CAPTIONS = ["a red apple", "a black cat on a chair", "two green trees"]


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """The scan checkpoint in a folder without its vocabulary."""
    monkeypatch.chdir(tmp_path)  # the checkpoint says that it was trained in the working folder
    (tmp_path / "run").mkdir()
    return shutil.copy(CHECKPOINTS["scan"], tmp_path / "run" / "model_best.pth.tar")


@pytest.fixture
def two(tmp_path):
    """A checkpoint of two networks, model_A and model_B, whose weights differ."""
    opt = argparse.Namespace(**vars(options("dual", img_dim=6, embed_size=8, word_dim=4)))
    content = {"opt": opt}
    for seed, name in enumerate("AB"):
        torch.manual_seed(seed)
        content[f"model_{name}"] = itm_fast.models.build(argparse.Namespace(**vars(opt), vocab_size=9)).state_dict()
    torch.save(content, tmp_path / "two.pth.tar")
    return tmp_path / "two.pth.tar", content


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_becomes_a_model_its_words_and_its_name(name):
    loaded = load(CHECKPOINTS[name], "cpu")
    assert loaded.name == NAMES[name]
    assert loaded.vocab.checksum() == Vocabulary.load(VOCABULARY).checksum()
    assert not any(part.training for module in loaded.model.modules for part in module.modules())
    for mine, theirs in zip(loaded.model.state_dict(), checkpoint.load(CHECKPOINTS[name]).model, strict=True):
        assert all(torch.equal(mine[key], theirs[key].to(mine[key])) for key in theirs)


def test_features_and_texts_become_scores():
    split = open_split(FOLDER, "test").first(9)
    features, texts = split.features[:], split.captions
    loaded = load(str(CHECKPOINTS["saf"]), torch.device("cpu"))
    found = score(loaded.model, features, texts, loaded.vocab)
    assert found.shape == (len(features), len(texts))
    assert found.dtype == np.float32
    want = score_all(loaded.model.scorer, encode(loaded.model, split, loaded.vocab, progress=False), progress=False)
    assert np.array_equal(found, want)
    cut = np.full(len(features), 30)
    fewer = score(loaded.model, features, texts, loaded.vocab, region_lengths=cut)
    assert np.abs(fewer - found).max() > 1e-4
    moved = features.copy()
    moved[:, 30:] = 7.0
    assert np.array_equal(score(loaded.model, moved, texts, loaded.vocab, region_lengths=cut), fewer)


def test_scores_need_words():
    loaded = load(CHECKPOINTS["scan"])
    with pytest.raises(ValueError, match="vocab is None"):
        score(loaded.model, np.ones((1, 36, 128), np.float32), CAPTIONS, None)
    with pytest.raises(TypeError, match=r"must be a Vocabulary, got str; read one with itm_fast\.data\.Vocab"):
        score(loaded.model, np.ones((1, 36, 128), np.float32), CAPTIONS, "vocab.json")
    with pytest.raises(TypeError, match="must be a list of texts"):
        score(loaded.model, np.ones((1, 36, 128), np.float32), "a cat", loaded.vocab)
    with pytest.raises(ValueError, match="100 features per region"):
        score(loaded.model, np.ones((1, 36, 100), np.float32), CAPTIONS, loaded.vocab)


def test_the_folder_of_a_run_stands_for_its_best_checkpoint(alone, tmp_path):
    assert load(tmp_path / "run").name == "SCAN t2i"
    assert load(alone).vocab is None


def test_the_first_vocabulary_beside_the_checkpoint_must_be_the_models(alone, tmp_path):
    shutil.copy(VOCABULARY, tmp_path / "run" / "vocab.json")
    assert len(load(alone).vocab) == len(Vocabulary.load(VOCABULARY))
    other = tmp_path / "run" / "openclipart_vocab.json"  # looked for before vocab.json
    Vocabulary.build(["a cat"], min_count=1).save(other)
    with pytest.raises(ValueError, match=r"embeds 875 words, and .*openclipart_vocab\.json has 6; .*: vocab=FILE"):
        load(alone)
    assert len(load(alone, vocab=tmp_path / "run" / "vocab.json").vocab) == 875


def test_a_vocabulary_that_is_named_must_be_the_models(alone, tmp_path):
    assert len(load(alone, vocab=VOCABULARY).vocab) == len(Vocabulary.load(VOCABULARY))
    other = tmp_path / "other.json"
    Vocabulary.build(["a cat"], min_count=1).save(other)
    with pytest.raises(ValueError, match=r"embeds 875 words, and .*other\.json has 6; give the vocabulary that it was"):
        load(alone, vocab=other)
    with pytest.raises(FileNotFoundError, match=r"none\.json"):
        load(alone, vocab=tmp_path / "none.json")


def test_words_of_equal_number_are_told_apart_by_their_checksum(tmp_path):
    words = Vocabulary.build(["a cat"], min_count=1)
    opt = options("dual", img_dim=6, embed_size=8, word_dim=4)
    states = itm_fast.models.build(argparse.Namespace(**vars(opt), vocab_size=len(words))).state_dict()
    opt.vocab_checksum = words.checksum()
    file = tmp_path / "x.pth.tar"
    writing.save(file, epoch=1, model=states, best_rsum=1.0, opt=opt, iterations=1)
    words.save(tmp_path / "vocab.json")
    assert load(file).vocab.checksum() == words.checksum()
    Vocabulary.build(["a dog"], min_count=1).save(tmp_path / "data_vocab.json")  # looked for before vocab.json
    for named in (None, tmp_path / "data_vocab.json"):
        with pytest.raises(ValueError, match="was trained with other words than the 6 of"):
            load(file, vocab=named)


def test_of_two_networks_one_is_chosen(two):
    file, content = two
    with pytest.raises(ValueError, match=r"two\.pth\.tar: holds 2 networks \(A, B\); choose one, such as network='A'"):
        load(file)
    for name in "AB":
        loaded = load(file, "cpu", network=name)
        assert loaded.name == f"DualEncoder {name}"
        assert torch.equal(loaded.model.img_enc.fc.weight, content[f"model_{name}"][0]["fc.weight"])
    with pytest.raises(ValueError, match="has no network 'C'; it holds the networks A, B"):
        load(file, network="C")
    with pytest.raises(ValueError, match="has no network 'A'; it holds one network; leave `network` out"):
        load(CHECKPOINTS["scan"], network="A")


@pytest.mark.parametrize(
    "device, sentence", [("gpu", "device must be such as cpu"), ("cuda:99", "cuda:99 is not there")]
)
def test_a_device_that_is_not_there_is_refused_before_the_file_is_read(device, sentence, tmp_path):
    with pytest.raises(ValueError, match=sentence):
        load(tmp_path / "none.pth.tar", device)


def test_mistaken_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.pth\.tar"):
        load(tmp_path / "none.pth.tar")
    with pytest.raises(ValueError, match=r"is a folder without model_best\.pth\.tar; it holds nothing"):
        load(tmp_path)
    whole = CHECKPOINTS["scan"].read_bytes()
    half = tmp_path / "half.pth.tar"
    half.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"half\.pth\.tar: cannot be read as a torch file; it is damaged, cut short"):
        load(half)
    content = torch.load(CHECKPOINTS["scan"], weights_only=False)
    del content["model"][1]["embed.weight"]
    torch.save(content, half)
    with pytest.raises(ValueError, match=r"half\.pth\.tar: no part of the model has word embeddings"):
        load(half)
