"""HGAN against its slow loop: scores, gradients, training mode, padding, blocks, adjacency and refusals."""

import pytest
import torch
from sgraf_cases import LENGTHS, R, copied, dropout, features

import itm_fast
from itm_fast.models import sgraf
from itm_fast.models.hgan import HierarchicalAlignment
from itm_fast.testing import assert_accurate, op_checks, rounding
from itm_fast.testing.hgan import loop

BACKENDS = [*op_checks.backends("cross_attention_score"), "reference"]
D = 16
OPTIONS = {
    "published": {},
    "others": {
        "graph_layers": 1,
        "granularities": (2, 8),
        "levels": (0.5, 2.0, 1.5),
        "scale_t2i": 5.0,
        "scale_i2t": 7.0,
        "scale_global": 6.0,
        "share_local": 0.3,
        "share_global": 0.8,
    },
    "bare": {"graph_layers": 0, "granularities": (), "levels": (1.0, 0.0, 0.0), "share_local": 1.0},
    "global": {"granularities": (1,), "levels": (0.0, 0.0, 1.0)},
}
OF_LOOP = ("levels", "scale_t2i", "scale_i2t", "scale_global", "share_local", "share_global")


def scorer(dtype=torch.float64, D=D, **options):
    """Random weights with biases, and graphs whose edges differ."""
    torch.manual_seed(1)
    model = HierarchicalAlignment(D, num_region=R, **options)
    with torch.no_grad():
        for name, x in model.state_dict().items():
            if name.endswith("running_var"):
                x.uniform_(0.5, 1.5)
            elif "bias" in name or name.endswith("running_mean") or ".1.weight" in name:
                x.add_(0.1 * torch.randn(x.shape))
            elif "query" in name or "key" in name:
                x.mul_(4)
    return model.to(dtype).eval()


def looped(model, image, caption, lengths=LENGTHS, state=None, **more):
    options = {name: getattr(model, name) for name in OF_LOOP}
    return loop(state or model.state_dict(keep_vars=True), image, caption, lengths, **options, **more)


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
            grads = torch.autograd.grad((score * weight).sum(), [*inputs, *parameters.values()], materialize_grads=True)
        found.append((score.detach(), grads))
    (want, want_grads), (score, grads) = found
    assert want.std() > 0.01  # or the comparison would see little
    torch.testing.assert_close(score, want, rtol=0, atol=1e-10)
    for name, a, b in zip(["image", "caption", *parameters], grads, want_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-8, msg=name)
    if not options:
        unused = {"v_global_w.embedding_common.0.bias", "t_global_w.embedding_common.0.bias"}  # a softmax drops them
        assert {n for n, g in zip(parameters, want_grads[2:]) if g.abs().max() < 1e-12} <= unused


def test_gradcheck():
    model = scorer(D=4, granularities=(1, 2), scale_global=3.0)
    image, caption = features(I=2, lengths=[2, 3], D=4)
    image, caption = image.requires_grad_(), caption.requires_grad_()
    assert torch.autograd.gradcheck(lambda *args: model(*args, [2, 3]), (image, caption))
    chosen = {name: p for name, p in model.named_parameters() if name.startswith(("mfar", "v_graph"))}

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
        images, (refined, overall) = model.image_state(image), model.caption_state(words, cu_seqlens)
        rows = slice(int(cu_seqlens[1]), int(cu_seqlens[4]))
        part = model.score(
            tuple(x[2:5] for x in images), words[rows], cu_seqlens[1:5] - cu_seqlens[1], (refined[rows], overall[1:4])
        )
        torch.testing.assert_close(part, want[2:5, 1:4], rtol=0, atol=1e-12)


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


def test_adjacency_multiplies_the_exponentials():
    model, (image, caption) = scorer(), features()
    generator = torch.Generator().manual_seed(4)
    near_v = (torch.rand(5, R, R, generator=generator) < 0.5).double()
    near_t = (torch.rand(7, 8, 8, generator=generator) < 0.5).double()
    near_v[1, 2] = 0  # a region without neighbours keeps what it was
    near_t[3] = 0
    want = looped(model, image, caption, image_adjacency=near_v, caption_adjacency=near_t)
    assert (want - looped(model, image, caption)).abs().max() > 1e-3
    words, cu_seqlens = itm_fast.pack(caption, LENGTHS)
    for gib in (1.0, 1e-7):
        with torch.no_grad(), itm_fast.workspace(gib):
            states = model.image_state(image, None, near_v), model.caption_state(words, cu_seqlens, near_t)
            score = model.score(states[0], words, cu_seqlens, states[1])
        torch.testing.assert_close(score, want, rtol=0, atol=1e-10)
    image.requires_grad_()
    model.image_state(image, None, near_v)[1].square().sum().backward()
    assert image.grad.isfinite().all()


@torch.no_grad()
def test_float32_is_as_accurate_as_the_loop():
    model, (image, caption) = scorer(torch.float32, D=128), features(D=128, dtype=torch.float32)
    exact = looped(
        model, image.double(), caption.double(), state={k: v.double() for k, v in model.state_dict().items()}
    )
    assert_accurate(model(image, caption, LENGTHS), looped(model, image, caption), exact)


def test_float32_gradients_are_as_accurate_as_the_loops(monkeypatch):
    """With a smooth curve in the place of ReLU: a sum within rounding of zero lets a whole term of a gradient through
    or not, in the loop as in the library, and says nothing about the accuracy of either."""

    def smooth(x):
        return torch.nn.functional.softplus(x, beta=100)

    monkeypatch.setattr(torch, "relu", smooth)
    monkeypatch.setattr(torch.Tensor, "relu", smooth)
    single, inputs = scorer(torch.float32, D=128), features(D=128, dtype=torch.float32)
    weight = torch.randn(5, 7, generator=torch.Generator().manual_seed(2))

    def gradients(run, model, image, caption):
        leaves = [image.clone().requires_grad_(), caption.clone().requires_grad_(), *model.parameters()]
        score = run(model, *leaves[:2])
        found = torch.autograd.grad((score * weight.to(score.dtype)).sum(), leaves)
        return dict(zip(["image", "caption", *dict(model.named_parameters())], found, strict=True))

    exact = gradients(looped, scorer(torch.float32, D=128).double(), *(x.double() for x in inputs))
    of_loop = gradients(looped, single, *inputs)
    found = gradients(lambda model, *args: model(*args, LENGTHS), single, *inputs)
    for name in exact:
        # What a softmax drops of a bias cancels in its gradient, which is as exact as the terms that cancel.
        judges = [n for n in exact if n == name or ("bias" in name and n.split(".")[0] == name.split(".")[0])]
        largest = max(exact[n].abs().max().item() for n in judges)
        assert_accurate(found[name], of_loop[name], exact[name], term=rounding(torch.float32, largest))


@pytest.mark.parametrize("I,lengths", [(0, LENGTHS), (3, [])])
@torch.no_grad()
def test_empty(I, lengths):
    image = sgraf.l2norm(torch.randn(I, R, D, dtype=torch.float64))
    words, cu_seqlens = torch.randn(sum(lengths), D).double(), torch.tensor([0, *lengths]).cumsum(0)
    assert scorer()(image, words, cu_seqlens).shape == (I, len(lengths))


@pytest.mark.parametrize(
    "change,message",
    [
        ({"granularities": (1, 3)}, "granularities must divide embed_size = 16, got 1, 3"),
        ({"granularities": (0,)}, "granularities must divide"),
        ({"levels": (1, 1)}, "levels must be three weights"),
        ({"levels": (0, 0, 0)}, "levels must be three weights, not all of them 0"),
        ({"graph_layers": -1}, "graph_layers must be at least 0, got -1"),
    ],
    ids=str,
)
def test_refusals(change, message):
    with pytest.raises(ValueError, match=message):
        HierarchicalAlignment(D, **change)


def test_another_number_of_regions_is_refused():
    image, caption = features()
    with pytest.raises(ValueError, match=r"R = 6 regions, got \[5, 4, 16\]"):
        scorer()(image[:, :4], caption, LENGTHS)
