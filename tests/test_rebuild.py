"""From a checkpoint to a model that scores: what is asked for, and what is refused before anything is built."""

from __future__ import annotations

import argparse
import math
import time

import pytest
import torch

from itm_fast.models import build, checkpoint
from itm_fast.models._building import outline
from itm_fast.models._catalogue import CATALOGUE
from itm_fast.training import options, rebuild
from itm_fast.training.setup import affordable

SIZES = {"img_dim": 6, "embed_size": 8, "word_dim": 4}
OPTIONS = {
    "sgr": options("sgr", sim_dim=4, **SIZES),
    "saf": options("saf", sim_dim=4, **SIZES),
    "scan": options("scan", **SIZES),
    "scan mean": options("scan", agg_func="Mean", **SIZES),
    "imram": options("imram", iteration_step=2, **SIZES),
    "rcar": options("rcar", sim_dim=4, **SIZES),
    "cmcan": options("cmcan", sim_dim=4, **SIZES),
    "shan": options("shan", **SIZES),
    "hgan": options("hgan", granularities=[1, 2], **SIZES),
    "tshsr": options("tshsr", sim_dim=4, context_nodes=[2], **SIZES),
    "bfan": options("bfan", **SIZES),
    "chan": options("chan", **SIZES),
    "naaf": options("naaf", **SIZES),
    "maxsim": options("maxsim", **SIZES),
    "dual": options("dual", **SIZES),
}
FOR_TRAINING = ("max_violation", "learning_rate", "grad_clip", "margin", "batch_size", "seed", "num_epochs", "val_step")
NOT_READ = {"saf": ("sgr_step",), "scan mean": ("lambda_lse",)}


def found(model: str, **changes) -> checkpoint.Checkpoint:
    """A checkpoint of a model, its options changed afterwards."""
    opt = argparse.Namespace(**vars(OPTIONS[model]))
    torch.manual_seed(0)
    states = build(argparse.Namespace(**vars(opt), vocab_size=9, device="cpu")).state_dict()
    for name, value in changes.items():
        setattr(opt, name, value)
    return checkpoint.Checkpoint(1, states, None, opt, None, path="x.pth.tar")


def test_every_model_is_here():
    assert {name.split()[0] for name in OPTIONS} == set(CATALOGUE)


@pytest.mark.parametrize("model", OPTIONS)
def test_scoring_asks_for_no_option_of_training(model):
    whole = rebuild(found(model), "cpu")
    bare = found(model)
    for name in (*FOR_TRAINING, *NOT_READ.get(model, ())):
        delattr(bare.opt, name)
    odd = found(model, **dict.fromkeys(FOR_TRAINING, math.nan))
    for other in (rebuild(bare, "cpu"), rebuild(odd, "cpu")):
        pairs = zip(whole.params, other.params, strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
        assert other.device == torch.device("cpu")


@pytest.mark.parametrize("model, name", [("sgr", "sgr_step"), ("scan", "lambda_lse"), ("scan", "lambda_softmax")])
def test_scoring_names_what_it_lacks(model, name):
    bare = found(model)
    delattr(bare.opt, name)
    with pytest.raises(ValueError, match=rf"^x\.pth\.tar: S.*: opt lacks {name}; give"):
        rebuild(bare)


@pytest.mark.parametrize(
    "model, changes, sentence",
    [
        ("sgr", {"num_layers": 10**6}, "num_layers must be at most 100, got 1000000"),
        ("sgr", {"sgr_step": 10**6}, "sgr_step must be at most 100, got 1000000"),
        ("hgan", {"graph_layers": 10**6}, "graph_layers must be at most 100, got 1000000"),
        ("tshsr", {"context_nodes": [1] * 101}, "context_nodes must be at most 100 numbers, got 101"),
        ("sgr", {"sim_dim": 0}, "sim_dim must be at least 1, got 0"),
        ("saf", {"embed_size": -8}, "embed_size must be at least 1, got -8"),
        ("scan", {"word_dim": True}, "word_dim must be a whole number, got True"),
        ("scan", {"img_dim": "6"}, "img_dim must be a whole number, got '6'"),
        ("scan", {"embed_size": 8.0}, "embed_size must be a whole number, got 8.0"),
        ("scan", {"num_layers": None}, "num_layers must be a whole number, got None"),
        ("saf", {"num_region": 0}, "num_region must be at least 1, got 0"),
        ("scan", {"lambda_softmax": math.nan}, "lambda_softmax must be a finite number, got nan"),
        ("scan", {"lambda_softmax": 10**400}, "lambda_softmax must be a finite number, got 10"),
        ("scan", {"lambda_lse": -math.inf}, "lambda_lse must be a finite number, got -inf"),
        ("scan", {"bi_gru": "False"}, "bi_gru must be true or false, got 'False'"),
        ("scan", {"cross_attn": 3}, "cross_attn must be text, got 3"),
        ("shan", {"vector_dim": -1}, "vector_dim must be at least 0, got -1"),
        ("shan", {"mu1": 1.5}, "mu1 must be at most 1, got 1.5"),
        ("hgan", {"levels": "111"}, "levels must be a list of numbers, got '111'"),
        ("hgan", {"granularities": [1.0]}, r"granularities must be a list of numbers, got \[1.0\]"),
        ("sgr", {"embed_size": 10**8}, r"img_enc.fc.weight is \[100000000, 6\], and the weights given are \[8, 6\]"),
        ("sgr", {"embed_size": 2**63}, "embed_size must be at most 9223372036854775807, got"),
        ("sgr", {"embed_size": 2**62}, "no model can be built with these options: Storage size"),
        ("sgr", {"sim_dim": 5}, r"sim_enc.sim_tranloc_w.weight is \[5, 8\], and the weights given are \[4, 8\]"),
        ("sgr", {"num_layers": 2}, r"with txt_enc.cap_rnn.weight_ih_l1 \[24, 16\], which the weights given lack"),
        ("saf", {"num_region": 5}, r"embedding_local.1.weight is \[5\], and the weights given are \[36\]"),
        ("scan", {"bi_gru": 0}, "Unexpected key"),
    ],
)  # fmt: skip
def test_what_cannot_be_built_is_refused_at_once(monkeypatch, model, changes, sentence):
    broken = found(model, **changes)
    monkeypatch.setattr(torch.nn.Module, "load_state_dict", _load if "Unexpected" in sentence else None)
    start = time.process_time()
    with pytest.raises(ValueError, match=f"^x.pth.tar: .*{sentence}") as refusal:
        rebuild(broken)
    assert "\n" not in str(refusal.value)
    assert time.process_time() - start < 5


_load = torch.nn.Module.load_state_dict


def test_a_checkpoint_from_before_batch_counters_loads():
    old = found("saf")
    for state in old.model:
        for name in [name for name in state if name.endswith("num_batches_tracked")]:
            del state[name]
        state._metadata = {name: {} for name in state._metadata}
    assert rebuild(old).device.type in ("cpu", "cuda")


def test_weights_without_words_are_named():
    other = found("dual")
    del other.model[1]["embed.weight"]
    with pytest.raises(ValueError, match=r"^x\.pth\.tar: no part of the model has word embeddings"):
        rebuild(other)
    other.model[1]["embed.weight"] = torch.tensor(1.0)
    with pytest.raises(ValueError, match=r"^x\.pth\.tar: no part of the model has word embeddings"):
        rebuild(other)


def test_an_outline_takes_no_memory():
    large = outline(argparse.Namespace(**vars(options("sgr", embed_size=10**6)), vocab_size=9))
    assert {p.device.type for p in large.params} == {"meta"}


def test_a_model_must_fit_the_memory_that_is_free(monkeypatch):
    opt = argparse.Namespace(**vars(OPTIONS["dual"]), vocab_size=9)
    bytes_needed = 16 * sum(p.numel() for p in build(opt).params)
    monkeypatch.setattr("itm_fast.training.setup.available_bytes", lambda device: bytes_needed)
    affordable(opt, torch.device("cpu"))
    monkeypatch.setattr("itm_fast.training.setup.available_bytes", lambda device: bytes_needed - 1)
    with pytest.raises(ValueError, match=r"takes 0\.0 GB to train, and 0\.0 GB are free on cpu; choose smaller sizes"):
        affordable(opt, torch.device("cpu"))


@pytest.mark.parametrize("told", [{"vocab_checksum": "ab12"}, {}])
def test_the_model_knows_the_checksum_of_its_words(told):
    assert rebuild(found("dual", **told)).vocab_checksum == told.get("vocab_checksum")
