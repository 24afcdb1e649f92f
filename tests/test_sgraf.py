"""SGRAF's drop-in against its published loop, and both against vectors of the published code."""

from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import itm_fast
from itm_fast.models import SGRAF, build, sgraf
from itm_fast.testing import assert_accurate
from itm_fast.testing.sgraf import loop, reason

FOLDER = Path(__file__).parent / "golden"
BACKENDS = ["torch", "reference"]
HEADS = ["SGR", "SAF"]
LENGTHS = [2, 7, 5, 1, 7, 3, 5]  # unsorted; 2 is <start> and <end> alone
R, D, S = 6, 16, 8


def golden(head, mode):
    with np.load(FOLDER / f"sgraf_{head.lower()}_{mode}.npz", allow_pickle=False) as file:
        return {key: torch.from_numpy(file[key]) for key in file}


def under(tensors, prefix):
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def dropout(module, p):
    for child in module.modules():
        if isinstance(child, nn.Dropout):
            child.p = p


def scorer(head, dtype=torch.float64, D=D, S=S):
    """Random weights with small biases and enlarged queries and keys: with others, reasoning makes all nodes equal
    and no test sees the edges or which node is read."""
    torch.manual_seed(1)
    model = sgraf.EncoderSimilarity(D, S, head, num_region=R)
    with torch.no_grad():
        for name, x in model.state_dict().items():
            if name.endswith("running_var"):
                x.uniform_(0.5, 1.5)
            elif name.endswith(("bias", "running_mean")) or ".1.weight" in name:
                x.add_(0.1 * torch.randn(x.shape))
            elif "query" in name or "key" in name:
                x.mul_(6)
        model.sim_eval_w.weight.mul_(4)
    return model.to(dtype).eval()


def copied(module):
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def features(I=5, lengths=LENGTHS, D=D, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    image = torch.randn(I, R, D, generator=generator, dtype=torch.float64)
    caption = torch.randn(len(lengths), max(lengths) + 1, D, generator=generator, dtype=torch.float64)
    return sgraf.l2norm(image).to(dtype), sgraf.l2norm(caption).to(dtype)


def options(**changes):
    opt = Namespace(
        grad_clip=2.0,
        img_dim=12,
        embed_size=D,
        no_imgnorm=False,
        vocab_size=30,
        word_dim=10,
        num_layers=1,
        bi_gru=True,
        no_txtnorm=False,
        sim_dim=S,
        module_name="SGR",
        sgr_step=3,
        margin=0.2,
        max_violation=True,
        learning_rate=0.002,
        num_region=R,
        device="cpu",
    )
    return Namespace(**{**vars(opt), **changes})


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
    scorer("SGR")(image, caption, LENGTHS)
    assert not calls
    with itm_fast.workspace(1e-5):
        scorer("SGR")(image, caption, LENGTHS)
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


@pytest.mark.parametrize("head", HEADS)
def test_shards_are_the_loop_whatever_the_shard_size(head):
    model = SGRAF(options(module_name=head))
    model.val_start()
    image, caption = features()
    want = loop(model.sim_enc.state_dict(), image.float(), caption.float(), LENGTHS)
    for size in (2, 100):
        found = sgraf.shard_attn_scores(model, image.numpy(), caption.numpy(), LENGTHS, options(), shard_size=size)
        assert isinstance(found, np.ndarray)
        assert found.dtype == np.float64
        np.testing.assert_allclose(found, want.numpy(), rtol=0, atol=1e-6)


class Logger:
    def __init__(self):
        self.seen = {}

    def update(self, name, value, n=0):
        self.seen.setdefault(name, []).append((value, n))


@pytest.mark.parametrize("head", HEADS)
def test_train_emb_learns_a_batch(head):
    torch.manual_seed(0)
    opt = options(module_name=head, embed_size=64, sim_dim=64, learning_rate=0.005)
    model = build(opt)
    assert type(model) is SGRAF
    assert model.scorer is model.sim_enc
    model.logger = Logger()
    images, ids = torch.randn(6, R, 12), torch.randint(1, 30, (6, 6))
    lengths = [6, 6, 5, 4, 3, 2]
    for _ in range(50):
        model.train_start()
        model.train_emb(images, ids, lengths, list(range(6)))
    losses = [value for value, n in model.logger.seen["Loss"] if n == 6]
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])
    assert model.Eiters == 50
    assert model.logger.seen["Eit"][-1] == (50, 0)
    assert model.logger.seen["lr"][0] == (0.005, 0)
    assert len({id(p) for p in model.params}) == sum(len(list(m.parameters())) for m in model.modules)
    if head == "SAF":
        assert model.sim_enc.SAF_module.bn.num_batches_tracked == 50 * 6

    model.val_start()
    other = SGRAF(opt)
    other.load_state_dict(model.state_dict())
    other.val_start()
    with torch.no_grad():
        image, caption, found = model.forward_emb(images, ids, lengths)
        assert found is lengths
        torch.testing.assert_close(
            other.forward_sim(*other.forward_emb(images, ids, lengths)),
            model.forward_sim(image, caption, found),
            rtol=0,
            atol=0,
        )


def test_train_emb_takes_region_lengths():
    torch.manual_seed(0)
    model = SGRAF(options())
    model.train_start()
    images = torch.randn(3, R, 12)
    images[0, 2:] = float("nan")
    loss = model.train_emb(images, torch.randint(1, 30, (3, 4)), [4, 3, 2], region_lengths=torch.tensor([2, R, R]))
    assert loss.isfinite()
    assert all(p.isfinite().all() for p in model.params)


def test_autocast_runs_and_learns():
    torch.manual_seed(0)
    model = SGRAF(options(module_name="SAF"))
    images, ids, lengths = torch.randn(4, R, 12), torch.randint(1, 30, (4, 6)), [6, 5, 3, 2]
    model.val_start()
    want = model.forward_sim(*model.forward_emb(images, ids, lengths))
    with torch.autocast("cpu", torch.bfloat16):
        score = model.forward_sim(*model.forward_emb(images, ids, lengths))
        loss = model.forward_loss(score)
    assert (score - want).abs().max() < 0.02
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.params)


@pytest.mark.parametrize("head", HEADS)
def test_no_captions_and_no_images(head):
    model = scorer(head)
    image, caption = features()
    words, cu_seqlens = itm_fast.pack(caption, LENGTHS)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            assert model(image, words[:0], cu_seqlens[:1]).shape == (5, 0)
            assert model(image[:0], words, cu_seqlens).shape == (0, 7)


def test_refusals():
    for name in ("AVE", "sgr"):
        with pytest.raises(ValueError, match=f"module_name must be one of SGR, SAF, got '{name}'"):
            SGRAF(options(module_name=name))
    with pytest.raises(ValueError, match="module_name must be one of SGR, SAF, got 'AVE'"):
        sgraf.EncoderSimilarity(D, S)
    opt = options()
    del opt.sim_dim
    with pytest.raises(ValueError, match="SGRAF: opt lacks sim_dim"):
        SGRAF(opt)
    image, caption = features()
    with pytest.raises(ValueError, match=r"R = 6 regions, got \[5, 4, 16\]"):
        scorer("SGR")(image[:, :4], caption, LENGTHS)
    with pytest.raises(ValueError, match="list of 3 state_dicts"):
        SGRAF(options()).load_state_dict([{}, {}])
