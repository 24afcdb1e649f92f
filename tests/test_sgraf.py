"""SGRAF's drop-in against its published loop, and both against vectors of the published code."""


import pytest
import torch
from sgraf_cases import BACKENDS, HEADS, LENGTHS, D, R, S, copied, dropout, features, golden, scorer, under

import itm_fast
from itm_fast.models import sgraf
from itm_fast.testing import assert_accurate
from itm_fast.testing.sgraf import loop, reason


@pytest.mark.parametrize("backend", [*BACKENDS, "loop"])
@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("head", HEADS)
def test_published_vectors(head, mode, backend):
    want = golden(head, mode)
    image, caption, lengths = want["image"].requires_grad_(), want["caption"].requires_grad_(), want["lengths"].tolist()
    parameters = want_parameters = under(want, "grad/")
    if backend == "loop":
        state = under(want, "param/")
        parameters = {name: state[name].requires_grad_() for name in want_parameters}
        score = loop(state, image, caption, lengths, training=mode == "train", dropout=0.0)
    else:
        model = sgraf.EncoderSimilarity(64, 32, head, 3, num_region=image.shape[1]).double()
        assert list(model.state_dict()) == list(under(want, "param/"))
        model.load_state_dict(under(want, "param/"))
        model.train(mode == "train")
        dropout(model, 0.0)
        with itm_fast.use_backend(backend):
            score = model(image, caption, lengths)
        parameters, state = dict(model.named_parameters()), model.state_dict()
    score.backward(want["d_score"])
    torch.testing.assert_close(score, want["score"], rtol=0, atol=1e-10)
    torch.testing.assert_close(image.grad, want["d_image"], rtol=0, atol=1e-8)
    torch.testing.assert_close(caption.grad, want["d_caption"], rtol=0, atol=1e-8)
    assert set(parameters) == set(want_parameters)
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter.grad, want_parameters[name], rtol=0, atol=1e-8, msg=name)
    buffers = under(want, "after/")
    assert (mode == "train") == bool(buffers)
    for name, buffer in buffers.items():
        torch.testing.assert_close(state[name], buffer, rtol=0, atol=1e-10, msg=name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("grad", [False, True], ids=["tiled", "grad"])
@pytest.mark.parametrize("head", HEADS)
def test_equals_the_loop_on_ragged_captions(head, grad, backend):
    model = scorer(head)
    image, caption = features()
    with torch.set_grad_enabled(grad), itm_fast.use_backend(backend):
        score = model(image, caption, LENGTHS)
    assert score.requires_grad == grad
    want = loop(model.state_dict(), image, caption, LENGTHS)
    assert want.std() > 0.01  # or the comparison would see little
    torch.testing.assert_close(score, want, rtol=0, atol=1e-12, check_dtype=False)


@pytest.mark.parametrize("steps", [0, 1, 2])
@torch.no_grad()
def test_other_numbers_of_steps(steps):
    model = sgraf.EncoderSimilarity(D, S, "SGR", steps, num_region=R).double().eval()
    image, caption = features()
    if steps:
        want = loop(model.state_dict(), image, caption, LENGTHS)
    else:  # the global node as it came
        image_global = model.image_state(image)[1]
        (caption_global,) = model.caption_state(*itm_fast.pack(caption, LENGTHS))
        z = sgraf.l2norm(model.sim_tranglo_w((image_global[:, None] - caption_global).square()))
        want = model.sim_eval_w(z).squeeze(2).sigmoid()
    torch.testing.assert_close(model(image, caption, LENGTHS), want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("head", HEADS)
def test_training_draws_and_moves_what_the_loop_does(head, dtype, p):
    model = scorer(head, dtype).train()
    dropout(model, p)
    image, caption = features(dtype=dtype)
    state = copied(model)
    gap = 1e-5 if dtype == torch.float32 else 1e-10
    for step in range(2):
        torch.manual_seed(7 + step)
        want = loop(state, image, caption, LENGTHS, training=True, dropout=p)
        after = torch.rand(3)
        torch.manual_seed(7 + step)
        score = model(image, caption, LENGTHS)
        torch.testing.assert_close(score, want, rtol=0, atol=gap)
        assert torch.equal(torch.rand(3), after)
        for name, value in model.state_dict().items():
            torch.testing.assert_close(value, state[name], rtol=0, atol=gap, msg=name)


def test_saf_training_without_gradients_moves_the_same_statistics():
    image, caption = features()
    models = [scorer("SAF").train() for _ in range(2)]
    for model in models:
        dropout(model, 0.0)
    with itm_fast.workspace(1e-7), torch.no_grad():  # so small that every caption is a block
        first = models[0](image, caption, LENGTHS)
    torch.testing.assert_close(first, models[1](image, caption, LENGTHS), rtol=0, atol=1e-12)
    for a, b in zip(models[0].buffers(), models[1].buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    assert models[0].SAF_module.bn.num_batches_tracked == len(LENGTHS)


@pytest.mark.parametrize("head", HEADS)
def test_blocks_and_order_do_not_change_scores(head):
    model = scorer(head)
    image, caption = features(I=9)
    order = [4, 0, 6, 2, 1, 5, 3]
    with torch.no_grad():
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
        torch.testing.assert_close(model(image, words, cu_seqlens), want, rtol=0, atol=0)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("head", HEADS)
def test_checkpointed_blocks_give_the_same_gradients_and_statistics(head, training):
    image, caption = features()
    weight = torch.linspace(-1, 1, 35, dtype=torch.float64).view(5, 7)
    found = []
    for gib in (1.0, 1e-7):
        model = scorer(head).train(training)
        inputs = image.clone().requires_grad_(), caption.clone().requires_grad_()
        torch.manual_seed(0)
        with itm_fast.workspace(gib):
            score = model(*inputs, LENGTHS)
            (score * weight).sum().backward()
        gradients = [x.grad for x in (*inputs, *model.parameters())]
        found.append([score, *gradients, *model.buffers()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_large_training_batches_are_checkpointed(monkeypatch):
    calls = []
    monkeypatch.setattr(sgraf, "checkpoint", lambda f, *args, **kwargs: calls.append(kwargs) or f(*args))
    image, caption = features()
    model = scorer("SAF").train()
    model(image, caption, LENGTHS)
    assert not calls
    with itm_fast.workspace(1e-5):
        model(image, caption, LENGTHS)
    assert calls
    assert all(kwargs["use_reentrant"] is False for kwargs in calls)


@pytest.mark.parametrize("head", HEADS)
def test_padding_never_leaks(head):
    model = scorer(head)
    image, caption = features()
    regions = [6, 1, 3, 6, 5]
    want = []
    for i, n in enumerate(regions):  # an image alone, cut to its regions; the BatchNorm's channel is the region index
        state = copied(model)
        for name in ("weight", "bias", "running_mean", "running_var"):
            key = f"v_global_w.embedding_local.1.{name}"
            state[key] = state[key][:n]
        want.append(loop(state, image[i : i + 1, :n], caption, LENGTHS))
    for t, n in enumerate(LENGTHS):
        caption[t, n:] = float("nan")
    for i, n in enumerate(regions):
        image[i, n:] = float("nan")
    image.requires_grad_()
    caption.requires_grad_()
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            score = model(image, caption, LENGTHS, torch.tensor(regions))
        torch.testing.assert_close(score, torch.cat(want), rtol=0, atol=1e-12)
    score.sum().backward()
    assert image.grad.isfinite().all()
    assert not image.grad[1, 1:].any()
    assert not caption.grad[0, 2:].any()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("head", HEADS)
def test_region_statistics_in_training_are_over_real_regions(head):
    image, caption = features()
    models = [scorer(head).train() for _ in range(3)]
    for model in models:
        dropout(model, 0.0)
    # All regions given is what no region_lengths is.
    whole = models[0](image, caption, LENGTHS, torch.full((5,), R))
    torch.testing.assert_close(whole, models[1](image, caption, LENGTHS), rtol=0, atol=1e-12)
    for a, b in zip(models[0].buffers(), models[1].buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)

    regions = torch.tensor([5, 1, 3, 5, 4])  # no image has the sixth
    model, old = models[2], copied(models[2])
    poisoned = image.clone()
    for i, n in enumerate(regions.tolist()):
        poisoned[i, n:] = float("nan")
    model(poisoned, caption, LENGTHS, regions)
    linear, norm = model.v_global_w.embedding_local[:2]
    for r in range(R):
        values = linear(image[regions > r, r]).flatten()
        mean, var = (old[f"v_global_w.embedding_local.1.running_{name}"][r] for name in ("mean", "var"))
        if r < 5:
            mean, var = 0.9 * mean + 0.1 * values.mean(), 0.9 * var + 0.1 * values.var()
        torch.testing.assert_close(norm.running_mean[r], mean, rtol=0, atol=1e-12)
        torch.testing.assert_close(norm.running_var[r], var, rtol=0, atol=1e-12)
    assert all(buffer.isfinite().all() for buffer in model.buffers())


@pytest.mark.parametrize("head", HEADS)
def test_float32_is_as_accurate_as_the_loop(head):
    model = scorer(head, torch.float32, D=128, S=32)
    image, caption = features(D=128, dtype=torch.float32)
    exact = loop({k: v.double() for k, v in model.state_dict().items()}, image.double(), caption.double(), LENGTHS)
    same = loop(model.state_dict(), image, caption, LENGTHS)
    with torch.no_grad():
        assert_accurate(model(image, caption, LENGTHS), same, exact)


def test_published_modules_are_the_loops():
    torch.manual_seed(0)
    nodes = torch.rand(4, 9, S)
    step = sgraf.GraphReasoning(S)
    named = {f"step.{name}": value for name, value in step.state_dict().items()}
    torch.testing.assert_close(step(nodes), reason(named, "step", nodes))

    filtration = sgraf.AttentionFiltration(S).train()
    twin = sgraf.AttentionFiltration(S)
    twin.load_state_dict(filtration.state_dict())
    gate = torch.sigmoid(twin.bn(twin.attn_sim_w(nodes).permute(0, 2, 1)))
    want = sgraf.l2norm(torch.matmul(sgraf.l1norm(gate, -1), nodes).squeeze(1))
    torch.testing.assert_close(filtration(nodes), want)
    for a, b in zip(filtration.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(a, b)

    caption = sgraf.TextSA(S, 0.4).eval()
    words = torch.randn(3, 5, S)
    flat = caption.packed(words.flatten(0, 1), torch.tensor([0, 5, 10, 15], dtype=torch.int32))
    torch.testing.assert_close(caption(words, words.mean(1)), flat)
