"""CMCAN's scorer against vectors of the published code, its neighbours, and its published checkpoints."""

import argparse
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cpu_cases import needs_cpu
from family_cases import check, golden
from sgraf_cases import LENGTHS, D, R, dropout, features, under

import itm_fast
from itm_fast.models import build, load
from itm_fast.models.cmcan import ConfidenceMatching
from itm_fast.testing import inputs
from itm_fast.testing.cmcan import loop
from itm_fast.training import options


@pytest.mark.parametrize("backend", ["cpu", "torch", "reference"])
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_published_vectors(mode, backend):
    if backend == "cpu" and (reason := itm_fast.why_not("cpu")):
        pytest.skip(reason)
    want = golden(f"cmcan_{mode}")
    scorer = ConfidenceMatching(48, 32).double().train(mode == "train")
    dropout(scorer, 0.0)
    check(want, scorer, backend, adjacency=want["adjacency"])


@needs_cpu
@torch.no_grad()
def test_one_pass_in_cpp_gives_the_scores_of_the_ops():
    """Odd sizes, captions longer than a chunk of words, and images of fewer regions."""
    torch.manual_seed(0)
    scorer = ConfidenceMatching(37, 7, num_region=9).double().eval()
    for parameter in scorer.parameters():
        torch.nn.init.normal_(parameter, 0, 0.3)
    image, words, cu_seqlens = inputs(5, [13, 1, 130, 36, 15], 9, 37, dtype=torch.float64)
    given = torch.nn.functional.normalize(image, dim=-1), torch.nn.functional.normalize(words, dim=-1), cu_seqlens
    for counts in (None, torch.tensor([9, 3, 1, 9, 5])):
        with itm_fast.use_backend("cpu"):
            found = scorer(*given, counts)
        with itm_fast.use_backend("torch"):
            torch.testing.assert_close(found, scorer(*given, counts), rtol=0, atol=1e-12)


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_the_loop_is_the_published_one(mode):
    want = golden(f"cmcan_{mode}")
    given = under(want, "param/"), want["image"], want["caption"], want["lengths"], want["adjacency"]
    torch.testing.assert_close(loop(*given, training=mode == "train", dropout=0.0), want["score"], rtol=0, atol=1e-10)


@torch.no_grad()
def test_neighbours_are_those_of_the_regions_that_are_there():
    image, caption = features(I=3)
    scorer = ConfidenceMatching(D, 8, num_region=R).double().eval()
    near = torch.zeros(3, R, R)
    near[:, 0, [0, 1, 2]] = 1
    near[:, 3, 1] = 1
    whole = scorer(image, caption, LENGTHS, adjacency=near)
    assert (whole - scorer(image, caption, LENGTHS)).abs().max() > 1e-6
    torch.testing.assert_close(whole, scorer(image, caption, LENGTHS, torch.tensor([R] * 3), near), rtol=0, atol=1e-12)
    near[1, 0, 5] = 1  # a neighbour that is padding
    counts = torch.tensor([R, 4, R])
    found = scorer(image, caption, LENGTHS, counts, near)
    near[1, 0, 5] = 0
    image[1, 4:] = float("nan")
    near[1, 0, 0] = 1
    again = scorer(image, caption, LENGTHS, counts, near)
    assert found.isfinite().all()
    torch.testing.assert_close(again[0::2], whole[0::2], rtol=0, atol=1e-12)


def test_two_threads_keep_their_own_neighbours(monkeypatch):
    image, caption = features(I=2)
    scorer = ConfidenceMatching(D, 8, num_region=R).double().eval()
    near = torch.eye(R).expand(2, R, R).clone()
    near[:, 0, 1:4] = 1
    given = [None, near]
    with torch.no_grad():
        expected = [scorer(image, caption, LENGTHS, adjacency=each) for each in given]
    assert (expected[0] - expected[1]).abs().max() > 1e-6
    barrier, state = threading.Barrier(2), ConfidenceMatching.image_state

    def together(*args):
        barrier.wait(300)
        found = state(*args)
        barrier.wait(300)
        return found

    def score(each):
        with torch.no_grad():
            return scorer(image, caption, LENGTHS, adjacency=each)

    monkeypatch.setattr(ConfidenceMatching, "image_state", together)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(score, given))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_published_checkpoint_is_read(tmp_path):
    opt = argparse.Namespace(**vars(options("cmcan", sim_dim=4, img_dim=6, embed_size=8, word_dim=4)), vocab_size=9)
    torch.manual_seed(0)
    model = build(opt)
    assert "t_global_w.embedding_local.0.weight" in model.state_dict()[3]
    assert "module_t.0.graph_query_w.weight" in model.state_dict()[4]
    del opt.system, opt.vocab_size
    torch.save({"model": model.state_dict(), "opt": opt}, tmp_path / "model_best.pth.tar")
    loaded = load(tmp_path, "cpu")
    assert loaded.name == "CMCAN"
    assert all(torch.equal(a, b) for a, b in zip(loaded.model.params, model.params, strict=True))


def test_refusals():
    image, caption = features(I=2)
    scorer = ConfidenceMatching(D, 8, num_region=R).double().eval()
    for near, message in (
        (torch.zeros(2, R, R + 1), r"adjacency must be \[I, R, R\] with I = 2 and the R of image, got \[2, 6, 7\]"),
        (torch.ones(2, R, R), "a region has more than 5 neighbours"),
    ):
        with pytest.raises(ValueError, match=message):
            scorer(image, caption, LENGTHS, adjacency=near)
    with pytest.raises(ValueError, match="self_layers must be at least 1, got 0"):
        ConfidenceMatching(8, 4, 0)
