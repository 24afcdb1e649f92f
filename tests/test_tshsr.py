"""TSHSR's gradients in blocks and of few pairs, autocast, memory and refusals (test_model_contract.py has the rest)."""

import pytest
import torch
from cpu_cases import scratch_of
from model_cases import MODELS
from sgraf_cases import LENGTHS, D, S, features

import itm_fast
from itm_fast.models.tshsr import TwoStreamReasoning
from itm_fast.ops import _recompute


def test_small_blocks_and_few_pairs_give_the_same_gradients(monkeypatch):
    model, (image, caption) = MODELS["TSHSR"].scorer(), features(I=9)
    few = torch.zeros(9, 7, dtype=torch.float64)
    few[torch.tensor([0, 0, 5, 8]), torch.tensor([2, 3, 3, 6])] = torch.tensor([1.0, -2, 0.5, 3]).double()
    taken, rule = [], _recompute.of_pairs

    def counted(dense, axes, grad, needs, args):
        return rule(lambda part, *rest: taken.append(part.numel()) or dense(part, *rest), axes, grad, needs, args)

    monkeypatch.setattr(_recompute, "of_pairs", counted)
    for upstream in (few, torch.linspace(-1, 1, 63, dtype=torch.float64).view(9, 7)):
        found = []
        for gib in (1.0, 1e-7):
            inputs = image.clone().requires_grad_(), caption.clone().requires_grad_()
            with itm_fast.workspace(gib):
                score = model(*inputs, LENGTHS, torch.tensor([6, 6, 3, 1, 6, 3, 6, 6, 5]))
            leaves = [*inputs, *model.parameters()]
            found.append(torch.autograd.grad(score, leaves, upstream))
        inputs = image.clone().requires_grad_(), caption.clone().requires_grad_()
        with itm_fast.use_backend("reference"):
            score = model(*inputs, LENGTHS, torch.tensor([6, 6, 3, 1, 6, 3, 6, 6, 5]))
            found.append(torch.autograd.grad(score, [*inputs, *model.parameters()], upstream))
        for a, b, c in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
            torch.testing.assert_close(a, c, rtol=0, atol=1e-10)
    assert taken == [63] * 3  # few pairs are taken alone


def test_what_needs_no_gradient_gets_none():
    model, (image, caption) = MODELS["TSHSR"].scorer(), features()
    for p in model.parameters():
        p.requires_grad_(False)
    model.i2t.context[0].weight.requires_grad_()
    model(image, caption, LENGTHS).sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is not None] == ["i2t.context.0.weight"]
    assert image.grad is None


def test_autocast_scores_and_differentiates():
    model, (image, caption) = MODELS["TSHSR"].scorer(torch.float32), features(dtype=torch.float32)
    want = model(image, caption, LENGTHS)
    with torch.autocast("cpu", torch.bfloat16):
        score = model(image, caption, LENGTHS)
    torch.testing.assert_close(score, want, rtol=0, atol=0.05)
    score.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.slow
def test_scratch_is_bounded_however_many_pairs():
    setup = [
        "from itm_fast.models.tshsr import TwoStreamReasoning",
        "scorer = TwoStreamReasoning(64, 64).eval()",
        "words, bounds = torch.randn(12 * 90, 64), 12 * torch.arange(91)",
        "with torch.no_grad(): state, captions = scorer.image_state(torch.randn(90, 36, 64)), "
        "scorer.caption_state(words, bounds)",
        "torch.set_grad_enabled(False)",
        "scorer.score(tuple(x[:2] for x in state), words[:24], bounds[:3], tuple(x[:2] for x in captions))",
    ]
    # The nodes of all pairs are 8100 x 60 x 64 x 4 bytes, 120 MiB a copy; the workspace is 64 MiB, and the kernels keep
    # some of their own, whatever the block.
    call = "[itm_fast.workspace(1 / 16).__enter__(), scorer.score(state, words, bounds, captions)][1]"
    assert scratch_of(setup, call) < 112 << 20


def test_refusals():
    with pytest.raises(ValueError, match=r"context_nodes must be positive, one number a level, got \[4, 0\]"):
        TwoStreamReasoning(D, S, (4, 0))
    with pytest.raises(ValueError, match=r"context_nodes must be positive, one number a level, got \[\]"):
        TwoStreamReasoning(D, S, ())
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        TwoStreamReasoning(D, S, steps=0)
