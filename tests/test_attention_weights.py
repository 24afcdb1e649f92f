"""`cross_attention_score` with other weights than the softmax, other similarities than the cosine, and the pools of
negative similarities."""

import functools
import itertools

import pytest
import torch

import itm_fast
from itm_fast.ops import _examples, _first_use
from itm_fast.ops import cross_attention_score as op
from itm_fast.ops._attention import NEGATIVE, NORMS, POOLS, SIMILARITIES, WEIGHTS, attention_weights
from itm_fast.ops._declare import DECLARED
from itm_fast.ops._torch._attention import attended_norm
from itm_fast.testing import inputs, op_checks
from itm_fast.testing.bfan import attend

BACKENDS = op_checks.backends("cross_attention_score")
over_backends = pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
COUNTS = torch.tensor([6, 1, 4])
SCALED = {"scale": 5.0, "pool_scale": 4.0}
OTHERS = [pair for pair in itertools.product(WEIGHTS, SIMILARITIES) if pair != ("softmax", "cosine")]


def case(region_lengths=None, lengths=(4, 1, 9), R=6, **options):
    """Rows that are no unit vectors, of images one of which may have one region."""
    image, words, cu_seqlens = inputs(3, lengths, R, 16, dtype=torch.float64)

    def call(image, words, backend):
        edge, counts = op_checks.beside(image, cu_seqlens, region_lengths)
        return op(image, words, edge, region_lengths=counts, backend=backend, **{**SCALED, **options})

    return call, (1.3 * image, 0.8 * words)


def norms(weights):
    """Norms under which no two affinities are equal: with l2norm those of a caption of one word are all 1."""
    return ("none", "clipped") if weights in ("hard", "threshold") else ("clipped_l2norm", "none")


@pytest.mark.parametrize("direction", ["t2i", "i2t"])
@pytest.mark.parametrize("weights,similarity", OTHERS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_and_gradients(backend, weights, similarity, direction):
    pools = ("mean", "lse"), NEGATIVE
    for region_lengths, norm, pool in zip((None, COUNTS), norms(weights), pools[SIMILARITIES.index(similarity) % 2]):
        options = dict(direction=direction, affinity_norm=norm, weights=weights, similarity=similarity, pool=pool)
        call, args = case(region_lengths, threshold=0.45, **options)
        for dtype in (torch.float64, torch.float32):
            op_checks.check_forward(call, args, dtype, backend)
        op_checks.check_gradients(call, args, torch.float64, backend)


@pytest.mark.parametrize("pool", NEGATIVE)
@pytest.mark.parametrize("backend", BACKENDS)
def test_sets_longer_than_a_vector_and_a_chunk(backend, pool):
    for direction in ("t2i", "i2t"):
        call, args = case(
            None, (460, 3), 40, direction=direction, affinity_norm="none", weights="hard", similarity="product",
            pool=pool, threshold=0.5,
        )  # fmt: skip
        op_checks.check_forward(call, args, torch.float64, backend)
        op_checks.check_gradients(call, args, torch.float64, backend)


@over_backends
def test_maxsim_is_a_product_and_a_maximum(backend):
    image, words, cu_seqlens = inputs(4, (3, 1, 7), 5, 24, dtype=torch.float64)
    largest = (image @ words.t()).amax(1).split(cu_seqlens.diff().tolist(), 1)
    maxsim = dict(affinity_norm="none", weights="hard", similarity="product", backend=backend)
    for pool, want in (("mean", [x.mean(1) for x in largest]), ("sum", [x.sum(1) for x in largest])):
        found = op(image, words, cu_seqlens, pool=pool, **maxsim)
        torch.testing.assert_close(found, torch.stack(want, 1), rtol=0, atol=1e-14)


@over_backends
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_equal_contexts_share(backend, similarity):
    """Twice the same region: twice as much of it for focal weights, half the gradient each for the largest."""
    image, words, cu_seqlens = inputs(1, (3,), 4, 16, dtype=torch.float64)
    twice = torch.cat([image, image], 1).requires_grad_()
    once = image.clone().requires_grad_()
    options = dict(affinity_norm="none", weights="hard", similarity=similarity, backend=backend)
    scores = [op(x, words, cu_seqlens, **options) for x in (once, twice)]
    torch.testing.assert_close(*scores, rtol=0, atol=1e-14)
    torch.autograd.backward(scores, [torch.ones_like(s) for s in scores])
    torch.testing.assert_close(twice.grad, torch.cat([once.grad, once.grad], 1) / 2, rtol=0, atol=1e-14)


@over_backends
@pytest.mark.parametrize("weights", ["focal_equal", "focal_prob"])
def test_contexts_of_equal_weight_are_all_kept(backend, weights):
    image, words, cu_seqlens = inputs(3, (4, 1), 6, 16, dtype=torch.float64, requires_grad=True)
    options = dict(direction="i2t", scale=20.0, backend=backend)
    focal, soft = (op(image, words, cu_seqlens, weights=w, **options) for w in (weights, "softmax"))
    torch.testing.assert_close(focal[:, 1], soft[:, 1], rtol=0, atol=1e-14)  # one word has all the weight
    assert (focal[:, 0] - soft[:, 0]).abs().min() > 1e-4
    focal.sum().backward()
    assert image.grad.isfinite().all()


@over_backends
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_a_word_above_no_threshold_counts_zero_and_has_no_gradient(backend, similarity):
    image, words, cu_seqlens = inputs(2, (3, 2), 5, 16, dtype=torch.float64, requires_grad=True)
    options = dict(affinity_norm="none", weights="threshold", threshold=2.0, pool="sum", backend=backend)
    score = op(image, words, cu_seqlens, similarity=similarity, **options)
    score.sum().backward()
    assert score.eq(0).all()
    assert image.grad.eq(0).all()
    assert words.grad.eq(0).all()


@over_backends
@pytest.mark.parametrize("weights", WEIGHTS)
def test_nan_stays_nan_and_in_its_caption(backend, weights):
    for pool, similarity in itertools.product(("mean", *NEGATIVE), ("product", "cosine")):
        options = dict(affinity_norm="none", weights=weights, similarity=similarity, pool=pool)
        call, (image, words) = case(None, (3, 2, 4), **options)
        words = words.clone()
        words[4, 3] = torch.nan
        assert call(image, words, backend).isnan().tolist() == [[False, True, False]] * 3, pool


def test_focal_weights_are_those_of_the_published_functions():
    generator = torch.Generator().manual_seed(5)
    logits = 4 * torch.rand(1, 7, 9, generator=generator, dtype=torch.float64)
    for focal_type in ("equal", "prob"):
        context = torch.eye(7, dtype=torch.float64)[None]  # so that the attended vectors are the weights
        query = logits.transpose(1, 2)
        loop = attend(query, context, 20.0, focal_type)[0]
        affinity = torch.nn.functional.leaky_relu(logits, 0.1)
        affinity = affinity / (affinity.norm(dim=2, keepdim=True) + 1e-8)
        found = attention_weights(20.0 * affinity, f"focal_{focal_type}", 0.0, dim=1)
        torch.testing.assert_close(found[0].t(), loop, rtol=0, atol=1e-14)


def test_kernels_of_each_kind_are_checked_before_their_first_use(monkeypatch):
    """Kernels of one direction, or kind of weights or similarities, say nothing about those of another."""
    checked = []
    monkeypatch.setattr(_first_use, "_verdicts", {})
    monkeypatch.setattr(_first_use._triton, "interpreted", lambda: False)
    monkeypatch.setattr(_examples, "problem", lambda *args, chosen=(): checked.append(chosen))
    op_, device = DECLARED["cross_attention_score"], torch.device("cpu")
    both = {"weights": "hard", "similarity": "product"}
    pooled = {"affinity_norm": "softmax", "pool": "mean"}
    for change in ({}, {"weights": "hard"}, {}, both, {"weights": "hard"}, {"direction": "i2t"}, pooled, pooled):
        aside = op_.put_aside({**op_.choosing.defaults, **change})
        assert aside("cross_attention_score", "triton", device, torch.float32) is None
    assert [dict(chosen) for chosen in checked] == [{}, {"weights": "hard"}, both, {"direction": "i2t"}, pooled]


def wrong_beside(monkeypatch, options):
    """Let all backends but the reference compute with these options in place of those given."""
    real = DECLARED["cross_attention_score"].function

    @functools.wraps(real)
    def wrong(*args, backend, **given):
        return real(*args, backend=backend, **given | (options if backend != "reference" else {}))

    monkeypatch.setattr(DECLARED["cross_attention_score"], "function", wrong)


VALUES = [*(("affinity_norm", norm) for norm in NORMS), *(("pool", pool) for pool in (*POOLS, *NEGATIVE))]
STANDING_OUT = "max", *NEGATIVE  # pools that are checked where one similarity lies far above the others


@pytest.mark.parametrize("direction", ["t2i", "i2t"])
@pytest.mark.parametrize("option", VALUES, ids="-".join)
def test_the_check_of_first_use_finds_the_kernels_of_another_norm_or_pool(option, direction, monkeypatch):
    """Also beside other weights, whose example has a norm and a pool of its own."""
    if option[1] in STANDING_OUT:
        monkeypatch.setattr(_examples, "SMALL", _examples.PUBLISHED)
    defaults = DECLARED["cross_attention_score"].choosing.defaults
    beside = {"weights": "hard"} if option == ("affinity_norm", "softmax") else {}
    given = dict([option], direction=direction, **beside)
    chosen = tuple((name, given[name]) for name in defaults if given.get(name, defaults[name]) != defaults[name])
    name, value = option
    other: dict[str, str] = {}
    wrong_beside(monkeypatch, other)
    for dtype in (torch.bfloat16, torch.float32):
        check = "cross_attention_score", "torch", torch.device("cpu"), dtype, True
        assert _examples.problem(*check, chosen=chosen) is None
    for instead in ("none", "softmax") if name == "affinity_norm" else ("mean", "lse"):
        if instead != value:
            other[name] = instead
            assert _examples.problem(*check, chosen=chosen) is not None, other


@pytest.mark.parametrize("pool", STANDING_OUT)
def test_the_check_of_first_use_finds_wrong_gradients_and_thresholds_of_a_pool(pool, monkeypatch):
    monkeypatch.setattr(_examples, "SMALL", _examples.PUBLISHED)
    given = "cross_attention_score", "torch", torch.device("cpu"), torch.float32, True
    if pool in NEGATIVE:
        with monkeypatch.context() as patch:
            wrong_beside(patch, {"threshold": 1.0})
            assert "result" in _examples.problem(*given, chosen=(("pool", pool),))
    real = DECLARED["cross_attention_score"].function

    @functools.wraps(real)
    def wrong(*args, backend, **options):
        found = real(*args, backend=backend, **options)
        return found if backend == "reference" else 2 * found - found.detach()

    monkeypatch.setattr(DECLARED["cross_attention_score"], "function", wrong)
    assert "gradient" in _examples.problem(*given, chosen=(("pool", pool),))


@pytest.mark.parametrize("weights", WEIGHTS[1:])
def test_the_check_of_first_use_finds_the_kernels_of_other_weights(weights, monkeypatch):
    other: dict[str, str] = {}
    monkeypatch.setattr(_examples, "SMALL", _examples.SMALL._replace(regions=36, dim=40))
    wrong_beside(monkeypatch, other)
    for dtype in (torch.float32, torch.float16):
        for instead in WEIGHTS:
            other["weights"] = instead
            given = "cross_attention_score", "torch", torch.device("cpu"), dtype, True
            found = _examples.problem(*given, chosen=(("weights", weights),))
            assert (found is None) == (instead == weights), (instead, found)


def test_the_check_of_the_other_direction_has_the_default_norm(monkeypatch):
    norm: dict[str, str] = {}
    wrong_beside(monkeypatch, norm)
    given = "cross_attention_score", "torch", torch.device("cpu"), torch.float32, True
    for norm["affinity_norm"], finds in (("clipped_l2norm", False), ("none", True)):
        found = _examples.problem(*given, chosen=(("direction", "i2t"),))
        assert (found is not None) == finds, norm


def test_kernels_in_cuda_say_what_they_lack():
    op_ = DECLARED["cross_attention_score"]
    image, words, cu_seqlens = inputs(2, (3, 2), 5, 16)
    given = dict(image=image, words=words, cu_seqlens=cu_seqlens, weights="softmax", similarity="cosine", pool="lse")
    size = {"I": 2, "R": 5, "D": 16}
    assert op_.too_large("cuda", size, given) is None
    given["pool"] = "smoothed_negative"
    assert op_.too_large("cuda", size, given) == "its kernels have no pool 'smoothed_negative'"
    assert op_.too_large("triton", size, given) is None


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(weights="max"), "weights must be one of softmax, focal_equal, focal_prob, hard, threshold, got 'max'"),
        (dict(similarity="dot"), "similarity must be one of cosine, product, projection, got 'dot'"),
        (dict(threshold=float("nan")), "threshold must be a number, got nan"),
        (dict(threshold=float("inf")), "threshold must be a finite number, got inf"),
        (dict(pool="smoothed_negative", pool_scale=-1.0), "pool_scale must be more than 0"),
    ],
    ids=str,
)
def test_refusals(change, message):
    with pytest.raises(ValueError, match=message):
        itm_fast.cross_attention_score(*inputs(2, (3, 2), 5, 16), **change)


def test_queries_that_attend_to_nothing_need_no_vector():
    """A product with all contexts for each such query made NAAF slower than its loop."""
    alpha, gram = torch.tensor([[[0.0, 1.0], [0.0, 0.0]]]), torch.eye(2)[None]
    unread = torch.full((1, 2, 3), torch.nan)
    assert attended_norm(alpha, gram, unread)[0].tolist() == [pytest.approx(0.0), 1.0]
