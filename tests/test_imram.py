"""IMRAM's scorer against vectors of the published code, and its published checkpoints."""

import argparse

import pytest
import torch
from family_cases import check, golden
from sgraf_cases import under

import itm_fast
from itm_fast.models import build, load
from itm_fast.models.imram import IterativeMatching
from itm_fast.testing.imram import loop
from itm_fast.training import options

FILES = "full_norm", "text_nonorm", "image_norm"


@pytest.mark.parametrize("backend", ["cpu", "torch", "reference"])
@pytest.mark.parametrize("name", FILES)
def test_published_vectors(name, backend):
    if backend == "cpu" and (reason := itm_fast.why_not("cpu")):
        pytest.skip(reason)
    want = golden(f"imram_{name}")
    check(want, IterativeMatching(64, **under(want, "option/")).double(), backend)


@pytest.mark.parametrize("name", FILES)
def test_the_loop_is_the_published_one(name):
    want = golden(f"imram_{name}")
    score = loop(under(want, "param/"), want["image"], want["caption"], want["lengths"], **under(want, "option/"))
    torch.testing.assert_close(score, want["score"], rtol=0, atol=1e-10)


def test_a_published_checkpoint_of_several_gpus_is_read(tmp_path):
    opt = argparse.Namespace(**vars(options("imram", img_dim=6, embed_size=8, word_dim=4)), vocab_size=9)
    torch.manual_seed(0)
    model = build(opt)
    weights = {
        f"module.{part}.{name}": x
        for part in ("img_enc", "txt_enc")
        for name, x in getattr(model, part).state_dict().items()
    }
    weights |= {f"module.{name}": x for name, x in model.sim_enc.state_dict().items()}
    assert {"module.img_enc.fc_local.weight", "module.txt_enc.rnn.weight_ih_l0", "module.gate_t2i.bias"} <= set(weights)
    del opt.system, opt.vocab_size
    opt.cross_attn = "t2i"  # which its parser has from SCAN's
    torch.save({"model": weights, "opt": opt}, tmp_path / "model_best.pth.tar")
    loaded = load(tmp_path, "cpu")
    assert loaded.name == "IMRAM"
    assert all(torch.equal(a, b) for a, b in zip(loaded.model.params, model.params, strict=True))


def test_refusals():
    with pytest.raises(ValueError, match="iteration_step must be at least 1, got 0"):
        IterativeMatching(8, iteration_step=0)
    with pytest.raises(ValueError, match="model_mode must be one of text_IMRAM, image_IMRAM, full_IMRAM, got 'vse'"):
        IterativeMatching(8, "vse")
