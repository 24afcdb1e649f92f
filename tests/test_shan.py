"""What SHAN has and other models do not: options, training, checkpoints (test_model_contract.py has the rest)."""

from argparse import Namespace

import pytest
import torch
from model_cases import SHAN_VARIANTS, as_loop
from sgraf_cases import R
from training_cases import DEV, SMALL, TRAIN, WORDS, assert_same_run

import itm_fast
from itm_fast.cli import main
from itm_fast.data import save_splits
from itm_fast.models import SHAN, build, checkpoint, shan
from itm_fast.testing import op_checks
from itm_fast.testing.shan import loop
from itm_fast.training import options, resume, train
from itm_fast.training.checkpoint import LAST

BACKENDS = [*op_checks.backends("hierarchical_alignment_score"), "reference"]


def model_options(**changes):
    opt = options("shan", direction=changes.pop("alignment", "full"), **SMALL, **changes)
    return Namespace(**{**vars(opt), "vocab_size": 30, "img_dim": 12, "device": "cpu"})


@pytest.mark.parametrize("variant", ["full", "full-vector-shared"])
def test_the_whole_model_has_the_loops_gradients(variant):
    changes = SHAN_VARIANTS[variant]
    torch.manual_seed(0)
    opt = model_options(**changes)
    opt.vector_dim = 3
    model = SHAN(opt)
    for module in model.modules:
        module.double()
    model.txt_enc.set_vectors(torch.randn(30, 3))
    images, ids, lengths = torch.randn(4, R, 12, dtype=torch.float64), torch.randint(1, 30, (4, 6)), [6, 2, 5, 3]
    for scored in ("loop", "model"):
        image, caption, _ = model.forward_emb(images, ids, lengths)
        if scored == "loop":
            score = loop(model.sim_enc.state_dict(keep_vars=True), image, caption, lengths, **as_loop(changes))
        else:
            score = model.forward_sim(image, caption, lengths)
        found = torch.autograd.grad(model.criterion(score), model.params)
        if scored == "loop":
            want = found
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gate", shan.OPTIONS["gate"].choices)
def test_gradcheck_of_the_scorer(gate, backend):
    torch.manual_seed(0)
    made = shan.EncoderSimilarity(4, gate=gate).double()
    image, words = torch.randn(2, 3, 4).double(), torch.randn(4, 4).double()
    names, parameters = zip(*made.named_parameters(), strict=True)

    def score(image, words, *parameters):
        states = dict(zip(names, parameters, strict=True))
        with itm_fast.use_backend(backend):
            return torch.func.functional_call(made, states, (image, words, torch.tensor([0, 3, 4])))

    leaves = [x.detach().clone().requires_grad_() for x in (image, words, *parameters)]
    assert torch.autograd.gradcheck(score, leaves)


def test_the_literal_reading_takes_vectors_of_any_length():
    opt = model_options(affinity="dot", no_imgnorm=True, no_txtnorm=True)
    model = SHAN(opt)
    images, ids = 3 * torch.randn(3, R, 12), torch.randint(1, 30, (3, 5))
    image, caption, lengths = model.forward_emb(images, ids, [5, 2, 4])
    assert (image.norm(dim=2) - 1).abs().min() > 0.01
    want = loop(model.sim_enc.state_dict(), image, caption, lengths, affinity="dot")
    torch.testing.assert_close(model.forward_sim(image, caption, lengths), want, rtol=0, atol=1e-5)


def test_parameters_that_an_alignment_does_not_use_are_absent():
    def names(**changes):
        return {n.split(".")[0] for n in shan.EncoderSimilarity(4, **changes).state_dict()} - {
            "region_projection",
            "word_projection",
        }

    assert names() == {"image_gate", "image_pool", "caption_gate", "caption_pool"}
    assert names(gate_sharing=True) == {"image_gate", "image_pool", "caption_pool"}
    assert names(alignment="t2i", gate_sharing=True) == {"caption_gate", "caption_pool"}
    assert names(alignment="i2t") == {"image_gate", "image_pool"}


def test_every_option_reaches_the_scorer():
    changes = {"gate_sharing": True, "affinity": "dot", "pooling": "sum", "projection_bias": True}
    changes |= {"lambda_softmax": 2.0, "mu1": 0.9, "mu2": 0.2}
    made = SHAN(model_options(**changes)).sim_enc
    assert (made.affinity, hasattr(made, "caption_gate"), made.region_projection.bias is None) == ("dot", False, False)
    options = {"direction": "both", "scale": 2.0, "pool": "sum", "local_mix": 0.9, "global_mix": 0.2}
    assert made.options == options
    assert SHAN(model_options(alignment="i2t", gate="vector")).sim_enc.width == SMALL["embed_size"]


@pytest.mark.slow
@pytest.mark.parametrize("alignment", shan.ALIGNMENTS)
def test_it_learns_a_batch_and_its_state_comes_back(alignment):
    torch.manual_seed(0)
    opt = model_options(alignment=alignment)
    opt.embed_size, opt.learning_rate = 64, 0.005
    model = build(opt)
    assert type(model) is SHAN
    images, ids, lengths = torch.randn(6, R, 12), torch.randint(1, 30, (6, 6)), [6, 6, 5, 4, 3, 2]
    model.train_start()
    losses = [model.train_emb(images, ids, lengths).item() for _ in range(40)]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    other = build(opt)
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        scores = [m.forward_sim(*m.forward_emb(images, ids, lengths)) for m in (model, other)]
    assert torch.equal(*scores)


def test_train_emb_takes_region_lengths():
    torch.manual_seed(0)
    model = build(model_options(gate="vector"))
    images = torch.randn(3, R, 12)
    images[0, 2:] = float("nan")
    loss = model.train_emb(images, torch.randint(1, 30, (3, 4)), [4, 3, 2], region_lengths=torch.tensor([2, R, R]))
    assert loss.isfinite()
    assert all(p.isfinite().all() for p in model.params)


def test_autocast_is_near():
    torch.manual_seed(0)
    model = build(model_options())
    images, ids, lengths = torch.randn(4, R, 12), torch.randint(1, 30, (4, 6)), [6, 5, 3, 2]
    want = model.forward_sim(*model.forward_emb(images, ids, lengths))
    with torch.autocast("cpu", torch.bfloat16):
        score = model.forward_sim(*model.forward_emb(images, ids, lengths))
        loss = model.forward_loss(score)
    assert (score - want).abs().max() < 0.05
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.params)


@pytest.mark.parametrize("alignment", shan.ALIGNMENTS)
def test_a_run_writes_a_checkpoint_that_is_evaluated(tmp_path, capsys, alignment):
    save_splits(tmp_path / "tiny.h5", {"train": TRAIN, "dev": DEV})
    small = "--embed-size 16 --word-dim 8 --batch-size 8 --epochs 2 --lr 0.002 --min-count 1 --device cpu --quiet"
    more = ["--direction", alignment, "--gate", "vector", "--no-bi-gru", "--mu1", "0.4", "--pooling", "sum"]
    words = ["train", "--model", "shan", "--data", f"{tmp_path}/tiny.h5", "--output", f"{tmp_path}/run"]
    assert main([*words, *small.split(), *more]) == 0
    opt = checkpoint.load(tmp_path / "run" / checkpoint.BEST).opt
    assert (opt.system, opt.alignment, opt.gate, opt.mu1, opt.pooling) == ("SHAN", alignment, "vector", 0.4, "sum")
    assert (opt.lambda_softmax, opt.mu2, opt.affinity, opt.vector_dim) == (15.0, 0.5, "cosine", 0)
    capsys.readouterr()
    file = str(tmp_path / "run" / checkpoint.BEST)
    assert main(["evaluate", "--checkpoint", file, "--data", f"{tmp_path}/tiny.h5", "--split", "dev"]) == 0
    assert f"SHAN {alignment}" in capsys.readouterr().out
    plan = ["evaluate", "--dry-run", "--workload", "f30k-eval-1k", "--checkpoint", file]
    assert main(plan) == 0
    assert f"SHAN {alignment}: 1,000 images x 5,000 captions" in capsys.readouterr().out


def test_a_run_with_word_vectors_is_resumed_and_keeps_them(tmp_path, capsys):
    file = tmp_path / "glove.txt"
    file.write_text("red 1 2 3\nblue 4 5 6\nzebra 7 8 9\n")
    opt = options("shan", **SMALL, word_vectors=str(file))
    train(opt, TRAIN, DEV, WORDS, tmp_path / "whole", device="cpu")
    assert "glove.txt has 2 of" in capsys.readouterr().err
    train(opt, TRAIN, DEV, WORDS, tmp_path / "parts", progress=False, device="cpu", max_steps=5)
    file.unlink()  # the checkpoint has them
    kept = Namespace(**resume.load(tmp_path / "parts").options)
    train(kept, TRAIN, DEV, WORDS, tmp_path / "parts", progress=False, device="cpu", resuming=True)
    assert_same_run(tmp_path / "parts", tmp_path / "whole")
    found = checkpoint.load(tmp_path / "parts" / LAST)
    assert found.opt.vector_dim == 3
    model = build(found.opt)
    model.load_state_dict(found.model)
    vectors = model.txt_enc.vectors
    assert vectors[WORDS("blue")].tolist() == [4, 5, 6]  # training has not moved them
    assert vectors[WORDS("dog")].tolist() == [0, 0, 0]


def test_without_a_file_it_says_that_words_are_learned_alone(tmp_path, capsys):
    train(options("shan", **SMALL), TRAIN, DEV, WORDS, tmp_path / "run", device="cpu", max_steps=1)
    assert "no file of word vectors is given: all word vectors are learned" in capsys.readouterr().err


def test_published_numbers():
    opt = options("shan")
    assert (opt.alignment, opt.lambda_softmax, opt.mu1, opt.mu2, opt.margin) == ("full", 15.0, 0.3, 0.5, 0.2)
    assert (opt.num_epochs, opt.embed_size, opt.word_dim, opt.gate, opt.pooling) == (30, 1024, 300, "scalar", "mean")
    assert options("shan", direction="i2t", recipe="coco").learning_rate == 5e-4


def test_refusals():
    for name, value in (("alignment", "both"), ("gate", "matrix"), ("affinity", "l2"), ("pooling", "max")):
        opt = model_options()
        setattr(opt, name, value)
        with pytest.raises(ValueError, match=f"SHAN: opt.{name} must be one of .*, got '{value}'"):
            SHAN(opt)
    opt = model_options()
    del opt.mu1
    with pytest.raises(ValueError, match="SHAN: opt lacks mu1"):
        SHAN(opt)
    with pytest.raises(ValueError, match="mu2 must be at most 1, got 2"):
        options("shan", mu2=2)
    with pytest.raises(ValueError, match="direction must be one of full, t2i, i2t, got 'both'"):
        options("shan", direction="both")
    with pytest.raises(ValueError, match=r"\[vocab_size, vector_dim\] = \[30, 0\] with vector_dim > 0, got \[30, 3\]"):
        SHAN(model_options()).txt_enc.set_vectors(torch.zeros(30, 3))
    with pytest.raises(ValueError, match="list of 3 state_dicts"):
        SHAN(model_options()).load_state_dict([{}, {}])
