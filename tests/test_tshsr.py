"""TSHSR against its slow loop: scores, gradients, training mode, padding, blocks, memory and refusals."""

import pytest
import torch
from cpu_cases import scratch_of
from sgraf_cases import LENGTHS, R, copied, dropout, features

import itm_fast
from itm_fast.models import _pair_blocks, sgraf
from itm_fast.models.tshsr import TwoStreamReasoning
from itm_fast.ops import _pairs
from itm_fast.testing import assert_accurate, op_checks
from itm_fast.testing.tshsr import loop

BACKENDS = [*op_checks.backends("cross_attention_similarity"), "reference"]
D, S = 16, 8
OPTIONS = {
    "published": {},
    "others": {"context_nodes": (3, 2, 1), "steps": 2, "scale_t2i": 5.0, "scale_i2t": 7.0},
    "one level": {"context_nodes": (2,), "steps": 1},
}


def scorer(dtype=torch.float64, D=D, S=S, **options):
    """Small biases and enlarged queries, keys and assignments: with others all nodes become equal."""
    torch.manual_seed(1)
    model = TwoStreamReasoning(D, S, num_region=R, **options)
    with torch.no_grad():
        for name, x in model.state_dict().items():
            if name.endswith("running_var"):
                x.uniform_(0.5, 1.5)
            elif name.endswith(("bias", "running_mean")) or ".1.weight" in name:
                x.add_(0.1 * torch.randn(x.shape))
            elif "query" in name or "key" in name or "context" in name:
                x.mul_(6)
        for stream in (model.t2i, model.i2t):
            stream.sim_eval_w.weight.mul_(4)
    return model.to(dtype).eval()


def looped(model, image, caption, lengths=LENGTHS, state=None, **more):
    scales = {"scale_t2i": model.scale_t2i, "scale_i2t": model.scale_i2t}
    return loop(state or model.state_dict(keep_vars=True), image, caption, lengths, **scales, **more)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_scores_and_gradients_are_the_loops(options, backend):
    model, (image, caption) = scorer(**options), features()
    weight = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    parameters = dict(model.named_parameters())
    found = []
    for run in (looped, lambda model, *args: model(*args, LENGTHS)):
        inputs = image.clone().requires_grad_(), caption.clone().requires_grad_()
        with itm_fast.use_backend(backend):
            score = run(model, *inputs)
            grads = torch.autograd.grad((score * weight).sum(), [*inputs, *parameters.values()])
        found.append((score.detach(), grads))
    (want, want_grads), (score, grads) = found
    assert want.std() > 0.01  # or the comparison would see little
    torch.testing.assert_close(score, want, rtol=0, atol=1e-10)
    for name, a, b in zip(["image", "caption", *parameters], grads, want_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-8, msg=name)
    silent = {name for name, g in zip(parameters, want_grads[2:]) if g.abs().max() < 1e-12}
    assert all("embedding_common.0.bias" in name or "graph_key_w.bias" in name for name in silent)


def test_gradcheck():
    model = scorer(D=4, S=3)
    image, caption = features(I=2, lengths=[2, 3], D=4)
    image, caption = image.requires_grad_(), caption.requires_grad_()
    assert torch.autograd.gradcheck(lambda *args: model(*args, [2, 3]), (image, caption))
    chosen = {name: p for name, p in model.named_parameters() if "context" in name or "tranlo" in name}

    def score(*values):
        arguments = (image.detach(), caption.detach(), [2, 3])
        return torch.func.functional_call(model, dict(zip(chosen, values)), arguments)

    assert torch.autograd.gradcheck(score, tuple(p.detach().clone().requires_grad_() for p in chosen.values()))


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_training_draws_and_moves_what_the_loop_does(p):
    model, (image, caption) = scorer().train(), features()
    dropout(model, p)
    state = copied(model)
    for step in range(2):
        torch.manual_seed(7 + step)
        want = looped(model, image, caption, state=state, training=True, dropout=p)
        after = torch.rand(3)
        torch.manual_seed(7 + step)
        torch.testing.assert_close(model(image, caption, LENGTHS), want, rtol=0, atol=1e-10)
        assert torch.equal(torch.rand(3), after)
        for name, value in model.state_dict().items():
            torch.testing.assert_close(value, state[name], rtol=0, atol=1e-10, msg=name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_blocks_and_order_do_not_change_scores(backend):
    model, (image, caption) = scorer(), features(I=9)
    order = [4, 0, 6, 2, 1, 5, 3]
    with torch.no_grad(), itm_fast.use_backend(backend):
        want = model(image, caption, LENGTHS)
        for gib in (1e-7, 2e-5, 0.5):
            with itm_fast.workspace(gib):
                torch.testing.assert_close(model(image, caption, LENGTHS), want, rtol=0, atol=1e-12)
        turned = model(image.flip(0), caption[order], [LENGTHS[t] for t in order])
        torch.testing.assert_close(turned, want.flip(0)[:, order], rtol=0, atol=1e-12)
        words, cu_seqlens = itm_fast.pack(caption, LENGTHS)
        images, captions = model.image_state(image), model.caption_state(words, cu_seqlens)
        part = model.score(
            tuple(x[2:5] for x in images),
            words[cu_seqlens[1] : cu_seqlens[4]],
            cu_seqlens[1:5] - cu_seqlens[1],
            tuple(x[1:4] for x in captions),
        )
        torch.testing.assert_close(part, want[2:5, 1:4], rtol=0, atol=1e-12)


def test_small_blocks_and_few_pairs_give_the_same_gradients(monkeypatch):
    model, (image, caption) = scorer(), features(I=9)
    few = torch.zeros(9, 7, dtype=torch.float64)
    few[torch.tensor([0, 0, 5, 8]), torch.tensor([2, 3, 3, 6])] = torch.tensor([1.0, -2, 0.5, 3]).double()
    taken, rule = [], _pairs.backward

    def counted(dense, axes, grad, needs, args):
        return rule(lambda part, *rest: taken.append(part.numel()) or dense(part, *rest), axes, grad, needs, args)

    monkeypatch.setattr(_pair_blocks._pairs, "backward", counted)
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
    assert taken == [8, 4, 1] * 3 + [63] * 3


def test_what_needs_no_gradient_gets_none():
    model, (image, caption) = scorer(), features()
    for p in model.parameters():
        p.requires_grad_(False)
    model.i2t.context[0].weight.requires_grad_()
    model(image, caption, LENGTHS).sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is not None] == ["i2t.context.0.weight"]
    assert image.grad is None


def test_padding_never_leaks():
    model, (image, caption) = scorer(), features()
    regions = [6, 1, 3, 6, 5]
    want = []
    for i, n in enumerate(regions):  # an image alone, cut to its regions; the BatchNorm's channel is the region index
        state = copied(model)
        for name in ("weight", "bias", "running_mean", "running_var"):
            key = f"v_global_w.embedding_local.1.{name}"
            state[key] = state[key][:n]
        want.append(looped(model, image[i : i + 1, :n], caption, state=state))
    for t, n in enumerate(LENGTHS):
        caption[t, n:] = float("nan")
    for i, n in enumerate(regions):
        image[i, n:] = float("nan")
    image.requires_grad_()
    caption.requires_grad_()
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            score = model(image, caption, LENGTHS, torch.tensor(regions))
        torch.testing.assert_close(score, torch.cat(want), rtol=0, atol=1e-10)
    score.sum().backward()
    assert image.grad.isfinite().all()
    assert not image.grad[1, 1:].any()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@torch.no_grad()
def test_float32_is_as_accurate_as_the_loop():
    model, (image, caption) = scorer(torch.float32, D=128, S=32), features(D=128, dtype=torch.float32)
    state = {name: value.double() for name, value in model.state_dict().items()}
    exact = looped(model, image.double(), caption.double(), state=state)
    assert_accurate(model(image, caption, LENGTHS), looped(model, image, caption), exact)


def test_autocast_scores_and_differentiates():
    model, (image, caption) = scorer(torch.float32), features(dtype=torch.float32)
    want = model(image, caption, LENGTHS)
    with torch.autocast("cpu", torch.bfloat16):
        score = model(image, caption, LENGTHS)
    torch.testing.assert_close(score, want, rtol=0, atol=0.05)
    score.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


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


@pytest.mark.parametrize("I,lengths", [(0, LENGTHS), (3, [])])
@torch.no_grad()
def test_empty(I, lengths):
    image = sgraf.l2norm(torch.randn(I, R, D, dtype=torch.float64))
    words, cu_seqlens = torch.randn(sum(lengths), D).double(), torch.tensor([0, *lengths]).cumsum(0)
    assert scorer()(image, words, cu_seqlens).shape == (I, len(lengths))


def test_refusals():
    with pytest.raises(ValueError, match=r"context_nodes must be positive, one number a level, got \[4, 0\]"):
        TwoStreamReasoning(D, S, (4, 0))
    with pytest.raises(ValueError, match=r"context_nodes must be positive, one number a level, got \[\]"):
        TwoStreamReasoning(D, S, ())
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        TwoStreamReasoning(D, S, steps=0)
    image, caption = features()
    with pytest.raises(ValueError, match=r"R = 6 regions, got \[5, 4, 16\]"):
        scorer()(image[:, :4], caption, LENGTHS)
