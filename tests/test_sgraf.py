"""SGRAF's drop-in against its published loop, and both against vectors of the published code."""

import pytest
import torch
from model_cases import MODELS
from sgraf_cases import BACKENDS, HEADS, LENGTHS, D, R, S, copied, dropout, features, golden, under

import itm_fast
from itm_fast.models import sgraf
from itm_fast.ops import _recompute
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


def test_saf_training_without_gradients_updates_the_same_statistics():
    image, caption = features()
    models = [MODELS["SAF"].scorer().train() for _ in range(2)]
    for model in models:
        dropout(model, 0.0)
    with itm_fast.workspace(1e-7), torch.no_grad():  # so small that every caption is a block
        first = models[0](image, caption, LENGTHS)
    torch.testing.assert_close(first, models[1](image, caption, LENGTHS), rtol=0, atol=1e-12)
    for a, b in zip(models[0].buffers(), models[1].buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    assert models[0].SAF_module.bn.num_batches_tracked == len(LENGTHS)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("head", HEADS)
def test_checkpointed_blocks_give_the_same_gradients_and_statistics(head, training):
    image, caption = features()
    weight = torch.linspace(-1, 1, 35, dtype=torch.float64).view(5, 7)
    found = []
    for gib in (1.0, 1e-7):
        model = MODELS[head].scorer().train(training)
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
    monkeypatch.setattr(_recompute, "checkpoint", lambda f, *args, **kwargs: calls.append(kwargs) or f(*args))
    image, caption = features()
    model = MODELS["SAF"].scorer().train()
    model(image, caption, LENGTHS)
    assert not calls
    with itm_fast.workspace(1e-5):
        model(image, caption, LENGTHS)
    assert calls
    assert all(kwargs["use_reentrant"] is False for kwargs in calls)


@pytest.mark.parametrize("head", HEADS)
def test_region_statistics_in_training_are_over_real_regions(head):
    image, caption = features()
    models = [MODELS[head].scorer().train() for _ in range(3)]
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
