"""RCAR's scorer and encoder against vectors of the published code, and its published checkpoints."""

import argparse

import pytest
import torch
from cpu_cases import needs_cpu
from family_cases import check, golden
from sgraf_cases import dropout, under

import itm_fast
from itm_fast.models import build, load, rcar
from itm_fast.testing import inputs
from itm_fast.testing.rcar import loop
from itm_fast.training import options

FILES = "t2i_rcar2", "i2t_rcar3", "i2t_rar2", "t2i_rcr2", "i2t_rcr3"


@pytest.mark.parametrize("backend", ["cpu", "torch", "reference"])
@pytest.mark.parametrize("name", FILES)
def test_published_vectors(name, backend):
    if backend == "cpu" and (reason := itm_fast.why_not("cpu")):
        pytest.skip(reason)
    want = golden(f"rcar_{name}")
    scorer = rcar.RegulatedMatching(64, 32, **under(want, "option/")).double().train(backend == "cpu")
    dropout(scorer, 0.0)
    check(want, scorer, backend)


@needs_cpu
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("direction", rcar.DIRECTIONS)
@pytest.mark.parametrize("regulator,step", [("coop_rcar", 1), ("coop_rcar", 3), ("only_rar", 2), ("only_rcr", 2)])
def test_one_pass_in_cpp_gives_the_scores_of_the_ops(regulator, step, direction, training):
    """Odd sizes, captions longer than a chunk of queries, images of fewer regions, and dropout."""
    torch.manual_seed(0)
    scorer = rcar.RegulatedMatching(37, 67 if training else 7, direction, regulator, step).double().train(training)
    for parameter in scorer.parameters():  # so that weights are clamped, and temperatures become 0
        torch.nn.init.normal_(parameter, 0, 0.7)
    image, words, cu_seqlens = inputs(5, [13, 1, 130, 36, 15], 9, 37, dtype=torch.float64)
    given = torch.nn.functional.normalize(image, dim=-1), torch.nn.functional.normalize(words, dim=-1), cu_seqlens
    for counts in (None, torch.tensor([9, 3, 1, 9, 5])):
        found = []
        for backend in ("cpu", "torch"):
            torch.manual_seed(2)
            with torch.no_grad(), itm_fast.use_backend(backend):
                found.append(scorer(*given, counts))
        torch.testing.assert_close(*found, rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", ["torch", pytest.param("cpu", marks=needs_cpu)])
@pytest.mark.parametrize("direction", rcar.DIRECTIONS)
def test_dropout_of_everything(direction, backend):
    """Of rate 1, as F.dropout does it: zeros, not 0 / 0."""
    torch.manual_seed(0)
    scorer = rcar.RegulatedMatching(16, 7, direction).double()
    dropout(scorer, 1.0)
    image, words, cu_seqlens = inputs(3, (4, 4), 5, 16, dtype=torch.float64)
    with itm_fast.use_backend(backend):
        found = scorer(image.requires_grad_(), words, cu_seqlens)
    options = {"attn_type": direction, "smooth": scorer.smooth, "training": True, "dropout": 1.0}
    want = loop(scorer.state_dict(), image, words.view(2, 4, 16), [4, 4], **options)
    torch.testing.assert_close(found, want, rtol=0, atol=1e-12)
    gradients = (torch.autograd.grad(x.sum(), image)[0] for x in (found, want))
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", FILES)
def test_the_loop_is_the_published_one(name):
    want = golden(f"rcar_{name}")
    score = loop(under(want, "param/"), want["image"], want["caption"], want["lengths"], **under(want, "option/"))
    torch.testing.assert_close(score, want["score"], rtol=0, atol=1e-10)


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_published_vectors_of_the_image_encoder(mode):
    want = golden(f"encoder_rcar_{mode}")
    state = under(want, "param/")
    encoder = rcar.EncoderImage(want["features"].shape[2], want["image"].shape[2]).double().train(mode == "train")
    assert set(encoder.state_dict()) == set(state)
    encoder.load_state_dict(state)
    features = want["features"].requires_grad_()
    image = encoder(features)
    image.backward(want["d_image"])
    torch.testing.assert_close(image, want["image"], rtol=0, atol=1e-10)
    torch.testing.assert_close(features.grad, want["d_features"], rtol=0, atol=1e-8)
    for name, gradient in under(want, "grad/").items():
        found = encoder.get_parameter(name).grad
        torch.testing.assert_close(torch.zeros_like(gradient) if found is None else found, gradient, rtol=0, atol=1e-8)
    for name, buffer in under(want, "after/").items():
        torch.testing.assert_close(encoder.state_dict()[name], buffer, rtol=0, atol=1e-10)


def test_a_published_checkpoint_of_several_gpus_is_read(tmp_path):
    opt = argparse.Namespace(**vars(options("rcar", sim_dim=4, img_dim=6, embed_size=8, word_dim=4)), vocab_size=9)
    torch.manual_seed(0)
    model = build(opt)
    weights = {}
    for part in model.parts:
        weights |= {f"module.{part}.{name}": x for name, x in getattr(model, part).state_dict().items()}
    assert {"module.img_enc.mlp.bns.1.weight", "module.sim_enc.rcr_modules.0.rcr_matrix_w.2.bias"} <= set(weights)
    del opt.system, opt.vocab_size
    torch.save({"model": weights, "opt": opt}, tmp_path / "model_best.pth.tar")
    loaded = load(tmp_path, "cpu")
    assert loaded.name == "RCAR t2i"
    assert all(torch.equal(a, b) for a, b in zip(loaded.model.params, model.params, strict=True))


def test_refusals():
    with pytest.raises(ValueError, match="step must be at least 1 and sim_dim at least 2, got 0 and 4"):
        rcar.RegulatedMatching(8, 4, step=0)
    with pytest.raises(ValueError, match="self_regulator must be one of coop_rcar, only_rar, only_rcr, got 'rar'"):
        rcar.RegulatedMatching(8, 4, self_regulator="rar")
    scorer = rcar.RegulatedMatching(8, 4)
    scorer.rar_modules[0].eval()
    with pytest.raises(ValueError, match=r"all its Dropout modules must have one rate .* got rates \[0.0, 0.4\]"):
        scorer(torch.randn(2, 36, 8), torch.randn(3, 5, 8), [5, 2, 4])
