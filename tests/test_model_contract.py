"""What holds for every model's pair scorer: the loop's scores, gradients and training, whatever the padding, the blocks
and the order."""

import copy
import re

import pytest
import torch
from model_cases import MODELS, PUBLISHED, of_hgan, of_tshsr, over, over_backends
from sgraf_cases import LENGTHS, D, R, copied, dropout, features

import itm_fast
from itm_fast._checks import Arguments
from itm_fast._workspace import current_gib
from itm_fast.models import forks
from itm_fast.models._building import ALONE
from itm_fast.models._catalogue import CATALOGUE
from itm_fast.models._common import PaddedScorer
from itm_fast.models._sums import ScoredLoss
from itm_fast.ops import _register
from itm_fast.testing import assert_accurate


@over_backends(*MODELS)
def test_scores_and_gradients_are_the_loops(model, backend):
    module, (image, caption) = model.scorer(), features()
    weight = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    parameters = dict(module.named_parameters())
    found = []
    for run in (model.looped, lambda module, *args: module(*args, LENGTHS)):
        inputs = image.clone().requires_grad_(), caption.clone().requires_grad_()
        with itm_fast.use_backend(backend):
            score = run(module, *inputs)
            grads = torch.autograd.grad((score * weight).sum(), [*inputs, *parameters.values()], materialize_grads=True)
        found.append((score.detach(), grads))
    (want, want_grads), (score, grads) = found
    assert want.std() > 0.01  # or the comparison would see little
    torch.testing.assert_close(score, want, rtol=0, atol=1e-12)
    for name, a, b in zip(["image", "caption", *parameters], grads, want_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-8, msg=name)
        assert b.abs().max() > 1e-6 or any(part in name for part in model.silent), name
    with torch.no_grad(), itm_fast.use_backend(backend):
        torch.testing.assert_close(module(image, caption, LENGTHS), want, rtol=0, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(
    "model,parts",
    [(of_hgan(granularities=(1, 2), scale_global=3.0), ("mfar", "v_graph")), (of_tshsr(), ("context", "tranlo"))],
    ids=["HGAN", "TSHSR"],
)
def test_gradcheck(model, parts):
    module, (image, caption) = model.scorer(D=4, S=3), features(I=2, lengths=[2, 3], D=4)
    image, caption = image.requires_grad_(), caption.requires_grad_()
    assert torch.autograd.gradcheck(lambda *args: module(*args, [2, 3]), (image, caption))
    chosen = {name: p for name, p in module.named_parameters() if any(part in name for part in parts)}

    def score(*values):
        arguments = (image.detach(), caption.detach(), [2, 3])
        return torch.func.functional_call(module, dict(zip(chosen, values)), arguments)

    assert torch.autograd.gradcheck(score, tuple(p.detach().clone().requires_grad_() for p in chosen.values()))


@over("SAF", "TSHSR")
def test_backward_scores_again_under_the_backend_and_the_bound_of_the_forward_pass(model, monkeypatch):
    """Backward runs outside both contexts; the blocks' own ops run there once more."""
    seen = []

    real = _register.resolve

    def resolve(op, *rest):
        seen.append((op, real(op, *rest), current_gib()))
        return seen[-1][1]

    monkeypatch.setattr(_register, "resolve", resolve)
    image, caption = (x.requires_grad_() for x in features())
    with itm_fast.use_backend("reference"), itm_fast.workspace(1e-5):
        score = model.scorer().train()(image, caption, LENGTHS)
    before = len(seen)
    score.sum().backward()
    assert len(seen) > before
    assert {backend for _, backend, _ in seen} == {"reference"}
    assert max(gib for *_, gib in seen) <= 1e-5


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@over(*(name for name in PUBLISHED if MODELS[name].trains))
def test_training_draws_the_loops_dropout_and_updates_its_statistics(model, dtype, p):
    module, (image, caption) = model.scorer(dtype).train(), features(dtype=dtype)
    dropout(module, p)
    state = copied(module)
    gap = 1e-5 if dtype == torch.float32 else 1e-10
    for step in range(2):
        torch.manual_seed(7 + step)
        want = model.looped(module, image, caption, state=state, training=True, dropout=p)
        after = torch.rand(3)
        torch.manual_seed(7 + step)
        with torch.set_grad_enabled(step == 0), itm_fast.workspace((1.0, 1e-7)[step]):
            torch.testing.assert_close(module(image, caption, LENGTHS), want, rtol=0, atol=gap)
        assert torch.equal(torch.rand(3), after)
        for name, value in module.state_dict().items():
            torch.testing.assert_close(value, state[name], rtol=0, atol=gap, msg=name)


@over_backends(*PUBLISHED, "SHAN-full-vector")
def test_blocks_and_order_do_not_change_scores(model, backend):
    module, (image, caption) = model.scorer(), features(I=9)
    order = [4, 0, 6, 2, 1, 5, 3]
    with torch.no_grad(), itm_fast.use_backend(backend):
        want = module(image, caption, LENGTHS)
        for gib in (1e-7, 2e-5, 0.5):
            with itm_fast.workspace(gib):
                torch.testing.assert_close(module(image, caption, LENGTHS), want, rtol=0, atol=1e-12)
        turned = module(image.flip(0), caption[order], [LENGTHS[t] for t in order])
        torch.testing.assert_close(turned, want.flip(0)[:, order], rtol=0, atol=1e-12)

        words, cu_seqlens = itm_fast.pack(caption, LENGTHS)
        torch.testing.assert_close(module(image, words, cu_seqlens), want, rtol=0, atol=0)
        images, captions = module.image_state(image), module.caption_state(words, cu_seqlens)
        rows = slice(int(cu_seqlens[1]), int(cu_seqlens[4]))
        part = module.score(
            tuple(x[2:5] for x in images),
            words[rows],
            cu_seqlens[1:5] - cu_seqlens[1],
            tuple(x[rows] if len(x) == len(words) else x[1:4] for x in captions),
        )
        torch.testing.assert_close(part, want[2:5, 1:4], rtol=0, atol=1e-12)


@over(*MODELS)
def test_padding_never_leaks(model):
    module, (image, caption) = model.scorer(), features()
    regions = [6, 1, 3, 6, 5]
    want = []
    by_region = "v_global_w.embedding_local.1.", "sim_embv.emb_local_bn.", "sim_embv.ln."  # of the region index
    for i, n in enumerate(regions):  # an image alone, cut to its regions
        state = copied(module)
        for name in state:
            if name.startswith(by_region) and state[name].dim():
                state[name] = state[name][:n]
        want.append(model.looped(module, image[i : i + 1, :n], caption, state=state))
    for t, n in enumerate(LENGTHS):
        caption[t, n:] = float("nan")
    for i, n in enumerate(regions):
        image[i, n:] = float("nan")
    image.requires_grad_()
    caption.requires_grad_()
    for grad, gib in ((False, 1e-7), (False, 1.0), (True, 1.0)):
        with torch.set_grad_enabled(grad), itm_fast.workspace(gib):
            score = module(image, caption, LENGTHS, torch.tensor(regions))
        torch.testing.assert_close(score, torch.cat(want), rtol=0, atol=1e-12)
    score.sum().backward()
    assert image.grad.isfinite().all()
    assert not image.grad[1, 1:].any()
    assert not caption.grad[0, 2:].any()
    for name, p in module.named_parameters():
        assert p.grad.isfinite().all() if p.grad is not None else any(part in name for part in model.silent), name


@over_backends(*PUBLISHED)
def test_a_float64_default_changes_nothing(model, backend):
    module, (image, caption) = model.scorer(torch.float32), features(dtype=torch.float32)
    found = []
    for default in (torch.float32, torch.float64):
        torch.set_default_dtype(default)
        try:
            with itm_fast.use_backend(backend):
                score = module(image, caption, LENGTHS)
                found.append([score, *torch.autograd.grad(score.sum(), list(module.parameters()), allow_unused=True)])
        finally:
            torch.set_default_dtype(torch.float32)
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=0)


@over(*PUBLISHED)
@torch.no_grad()
def test_float32_is_as_accurate_as_the_loop(model):
    module, (image, caption) = model.scorer(torch.float32, D=128, S=32), features(D=128, dtype=torch.float32)

    def looped(dtype):
        state = {name: value.to(dtype) for name, value in module.state_dict().items()}
        return [model.looped(module, image.to(dtype), caption.to(dtype), state=state)]

    assert_accurate([module(image, caption, LENGTHS)], looped, torch.float32)


@over("SAF", "HGAN", "SHAN-full")  # the others' ReLU lies in their ops, whose own tests judge it
def test_float32_gradients_are_as_accurate_as_the_loops(model, monkeypatch):
    """With a smooth curve in the place of ReLU: a sum within rounding of zero lets a whole term of a gradient through
    or not, in the loop as in the library, and says nothing about the accuracy of either."""

    def smooth(x):
        return torch.nn.functional.softplus(x, beta=100)

    monkeypatch.setattr(torch, "relu", smooth)
    monkeypatch.setattr(torch.Tensor, "relu", smooth)
    single, inputs = model.scorer(torch.float32, D=128, S=32), features(D=128, dtype=torch.float32)
    weight = torch.randn(5, 7, generator=torch.Generator().manual_seed(2))

    def gradients(run, module, image, caption):
        leaves = [image.clone().requires_grad_(), caption.clone().requires_grad_(), *module.parameters()]
        score = run(module, *leaves[:2])
        return torch.autograd.grad((score * weight.to(score.dtype)).sum(), leaves)

    def of_loop(dtype):
        return gradients(model.looped, copy.deepcopy(single).to(dtype), *(x.to(dtype) for x in inputs))

    found = gradients(lambda module, *args: module(*args, LENGTHS), single, *inputs)
    assert_accurate(found, of_loop, torch.float32)


@pytest.mark.parametrize("grad", [False, True], ids=["tiled", "grad"])
@pytest.mark.parametrize("I,lengths", [(0, LENGTHS), (3, [])], ids=["no-images", "no-captions"])
@over(*PUBLISHED)
def test_empty(model, I, lengths, grad):
    image = torch.nn.functional.normalize(torch.randn(I, R, D, dtype=torch.float64), dim=-1)
    words, cu_seqlens = torch.randn(sum(lengths), D).double(), torch.tensor([0, *lengths]).cumsum(0)
    with torch.set_grad_enabled(grad):
        assert model.scorer()(image, words, cu_seqlens).shape == (I, len(lengths))


@over(*(name for name in PUBLISHED if MODELS[name].trains and name != "RCAR"))  # which has no weights for regions
def test_another_number_of_regions_is_refused(model):
    image, _ = features()
    for wrong, advice in (
        (image[:, :4], r"\[5, 4, 16\]; pad each image to 6 and .*with num_region=4 "),
        (image.repeat(1, 2, 1), r"\[5, 12, 16\]; keep 6 regions of each image, or .*with num_region=12 "),
        (image[0], r"\[6, 16\]$"),
    ):
        with pytest.raises(ValueError, match=rf"R = 6 regions, got {advice}"):
            model.scorer().image_state(wrong)


def scorer_of(name, **options):
    """A model's pair scorer as `itm_fast.models.scorer` makes it, of small sizes where it has sizes."""
    return itm_fast.models.scorer(name, **({} if name in ALONE else {"dim": D, "regions": R}), **options)


WORDS, BOUNDS = torch.ones(10, D), torch.tensor([0, 3, 8, 10])
WRONG = {
    "no-region": ({"region_lengths": torch.tensor([R, 0])}, ValueError, f"region_lengths must lie in 1..{R} .* 0"),
    "over-R": ({"region_lengths": torch.tensor([R, R + 1])}, ValueError, f"region_lengths must lie in 1..{R} .* 7"),
    "floats": ({"region_lengths": torch.tensor([2.0, 3.0])}, TypeError, "region_lengths must be int32 or int64, got"),
    "list": ({"region_lengths": [2, 3]}, TypeError, "region_lengths must be a tensor, got list"),
    "three": ({"region_lengths": torch.tensor([2, 3, 3])}, ValueError, r"region_lengths must be \[I\] with I = 2 as"),
    "rows": ({"region_lengths": torch.tensor([[2, 3]])}, ValueError, r"region_lengths must be \[I\], got \[1, 2\]"),
    "no-word": ({"cu_seqlens": torch.tensor([0, 3, 3, 10])}, ValueError, "caption 1 is empty"),
    "too-few": ({"cu_seqlens": torch.tensor([0, 3, 8, 9])}, ValueError, "cu_seqlens must start at 0 and end at the 10"),
    "float-bounds": ({"cu_seqlens": BOUNDS.float()}, TypeError, "cu_seqlens must be int32 or int64, got"),
    "dtypes": ({"words": WORDS.double()}, TypeError, "words and image must have one dtype, got torch.float64 and"),
    "D": ({"words": WORDS[:, 1:]}, ValueError, rf"words must be \[N, D\] with D = {D} as in image, got"),
    "one-image": ({"image": torch.ones(R, D)}, ValueError, r"image must be \[I, R, D\], got \["),
}


def in_words_of(scorer, said):
    """A message about `image`, `words` or `cu_seqlens` with the names that the scorer's arguments have."""
    for name, own in zip(("image", "words", "cu_seqlens"), scorer.named):
        said = re.sub(rf"\b{name}\b", own, said)
    return said


@pytest.mark.parametrize("given,error,said", WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("name", [*CATALOGUE, *ALONE])
def test_wrong_input_is_refused_in_the_scorers_name(name, given, error, said):
    scorer = scorer_of(name)
    given = {"image": torch.ones(2, R, D), "words": WORDS, "cu_seqlens": BOUNDS, "region_lengths": None, **given}
    if isinstance(scorer, PaddedScorer) and error is ValueError and given["cu_seqlens"] is not BOUNDS:
        said = rf"cap_lens must be the cu_seqlens \[T \+ 1\] of packed words: {said}"
    else:
        said = in_words_of(scorer, said)
    for call, named in ((scorer, ""), (scorer.matched, r"\.matched")):
        with pytest.raises(error, match=f"^{type(scorer).__name__}{named}: {said}"):
            call(*given.values())


WEIGHTS = [name for name in (*CATALOGUE, *ALONE) if next(scorer_of(name).parameters(), None) is not None]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", WEIGHTS)
def test_another_dtype_than_that_of_the_weights_is_refused(name, dtype):
    scorer, image, words = scorer_of(name), torch.ones(2, R, D, dtype=dtype), WORDS.to(dtype)
    first, second, _ = scorer.named
    for call, named in ((scorer, ""), (scorer.matched, r"\.matched")):
        said = f"^{type(scorer).__name__}{named}: {first} and the weights must have one dtype, got {dtype} and "
        with pytest.raises(TypeError, match=f"{said}torch.float32; convert what is given"):
            call(image, words, BOUNDS)
        if dtype == torch.float64:  # which autocast never converts
            with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match=said):
                call(image, words, BOUNDS)


STEPS = "image_state", "caption_state", "score"
# Of the other models every step multiplies by weights.
REFUSE = dict.fromkeys(("imram", "rcar", "gsmn"), STEPS[2:]) | {"hgan": STEPS[:2], "laps_slim": STEPS[:1]}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", WEIGHTS)
def test_steps_that_multiply_by_weights_refuse_another_dtype_than_theirs(name, dtype):
    """Called by themselves, without the checks of `forward`; no step ends in an error of torch's own, and those without
    weights keep the dtype."""
    more = {"imram": {"iteration_step": 2}, "laps_slim": {"dim": D, "num_patches": R - 1}}
    scorer, words = scorer_of(name, **more.get(name, {})), WORDS.to(dtype)
    boxes = (None, torch.rand(2, R, 4).sort(-1).values) if scorer.takes_boxes else ()

    def another(state):
        return tuple(x.to(dtype) if x.is_floating_point() else x for x in state)

    state, caption_state = scorer.image_state(torch.ones(2, R, D), *boxes), scorer.caption_state(WORDS, BOUNDS)
    given = (
        (torch.ones(2, R, D, dtype=dtype), *boxes),
        (words, BOUNDS),
        (another(state), words, BOUNDS, another(caption_state)),
    )
    said = rf"(have one dtype|features of {dtype} cannot be multiplied)"
    for step, args in zip(STEPS, given, strict=True):
        if step in REFUSE.get(name, STEPS):
            with pytest.raises(TypeError, match=said) as raised:
                getattr(scorer, step)(*args)
            assert str(dtype) in str(raised.value)
            assert "torch.float32" in str(raised.value)
        else:
            found = getattr(scorer, step)(*args)
            first = found[:1] if isinstance(found, tuple) else [found]  # GSMN's shares have the dtype of its weights
            assert all(x.dtype == dtype for x in first)


@pytest.mark.parametrize("name", WEIGHTS)
def test_one_more_weight_of_another_dtype_or_device_refuses_nothing(name):
    scorer, check = scorer_of(name).bfloat16(), Arguments("op")
    for more in (torch.zeros(3), torch.zeros(3, dtype=torch.bfloat16, device="meta")):
        scorer.register_parameter("more", torch.nn.Parameter(more))  # which comes before those of its modules
        check.weights("image", WORDS.bfloat16(), scorer)


@pytest.mark.parametrize("name", WEIGHTS)
def test_another_device_than_that_of_the_weights_is_refused(name):
    scorer = scorer_of(name).to("meta")
    said = f"{scorer.named[0]} and the weights must be on one device, got cpu and meta; move one"
    with pytest.raises(ValueError, match=f"^{type(scorer).__name__}: {said}"):
        scorer(torch.ones(2, R, D), WORDS, BOUNDS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_scores_what_has_another_dtype_than_the_weights(dtype):
    scorer = scorer_of("saf").eval()
    with torch.autocast("cpu", torch.bfloat16):
        assert scorer(torch.ones(2, R, D), WORDS.to(dtype), BOUNDS).isfinite().all()


OF_PACKED = r"cap_lens must be the cu_seqlens \[T \+ 1\] of packed words"
OF_PADDED = "cap_lens must"


@pytest.mark.parametrize(
    "caption,lengths,error,said",
    [
        (WORDS, None, TypeError, f"{OF_PACKED}, got None"),
        (WORDS, ["a"], TypeError, rf"{OF_PACKED}, got \['a'\]"),
        (WORDS, 2.5, ValueError, f"{OF_PACKED}, got 2.5"),
        (WORDS, [10], ValueError, f"{OF_PACKED}: cu_seqlens must start at 0 and end at the 10 packed rows, got 10..10"),
        (WORDS, torch.tensor([[0, 10]]), ValueError, rf"{OF_PACKED}, got tensor\(\[\[ 0, 10\]\]\)"),
        (WORDS[None], None, TypeError, f"{OF_PADDED} be integers, got None"),
        (WORDS[None], ["a"], TypeError, rf"{OF_PADDED} be integers, got \['a'\]"),
        (WORDS[None], [2.5], ValueError, f"{OF_PADDED} be whole numbers, got 2.5"),
        (WORDS[None], [0], ValueError, rf"{OF_PADDED} lie in 1..10 \(W\), got 0..0"),
        (WORDS, BOUNDS.to("meta"), ValueError, rf"{OF_PACKED}, got tensor\(.*device='meta'.*"),
        (WORDS[None], BOUNDS.to("meta"), ValueError, f"{OF_PADDED} hold values, got a tensor on the meta device.*"),
        (WORDS[None], [2, 3], ValueError, rf"{OF_PADDED} be \[T\] with T = 1 as in cap_emb, got \[2\]"),
    ],
)
@pytest.mark.parametrize("name", ["sgr", "gsmn", "cmcan"])
def test_wrong_lengths_are_refused_in_the_scorers_name(name, caption, lengths, error, said):
    scorer = itm_fast.models.scorer(name, dim=D, regions=R)
    for call, named in ((scorer, ""), (scorer.matched, r"\.matched")):
        with pytest.raises(error, match=f"^{type(scorer).__name__}{named}: {said}$"):
            call(torch.ones(1, R, D), caption, lengths)


def test_wrong_lengths_are_refused_where_captions_are_padded():
    loss, scorer = ScoredLoss(itm_fast.nn.CrossAttentionScore(), 0.2, True), forks.BiCro(D, 4, "SGR")
    for call, said, of in ((loss, "ScoredLoss: s_l", "s"), (scorer.glo_emb, r"BiCro\.glo_emb: cap_lens", "cap_emb")):
        with pytest.raises(ValueError, match=rf"^{said} must be \[T\] with T = 1 as in {of}, got \[2\]$"):
            call(torch.ones(1, R, D), WORDS[None], [2, 3])


@pytest.mark.parametrize("name", [*CATALOGUE, *ALONE])
def test_a_list_of_captions_is_refused_in_the_scorers_name(name):
    scorer = scorer_of(name)
    argument = scorer.named[1]
    for call, named in ((scorer, ""), (scorer.matched, r"\.matched")):
        said = f"^{type(scorer).__name__}{named}: {argument} must be a tensor.* got list$"
        with pytest.raises(TypeError, match=said):
            call(torch.ones(2, R, D), [torch.ones(3, D), torch.ones(2, D)], [3, 2])
