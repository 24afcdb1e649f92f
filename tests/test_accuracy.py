"""The accuracy rule: right programs pass however they sum, and mistakes do not, however ill conditioned the problem."""

import functools

import pytest
import test_cross_attention_score
import test_cross_attention_similarity
import torch

from itm_fast.ops import _attention
from itm_fast.testing import accuracy, assert_accurate, op_checks, rounding

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def score(norm="l1norm"):
    """One caption has one word: a / |a| of its affinities, of which some are nearly zero, has next to no gradient."""
    regions = torch.tensor([6, 1, 4])
    return test_cross_attention_score.case(3, (4, 1, 3, 4), 6, 16, regions, affinity_norm=norm, pool="mean")


def similarity():
    return test_cross_attention_similarity.case(3, (4, 1, 3), 6, 16, 8)


CASES = pytest.mark.parametrize("make", [score, similarity])
OVER_DTYPES = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def outcome(case, dtype, rounded):
    """The reference's result and gradients."""
    call, args = case
    result = call(*(a.to(rounded).to(dtype) for a in args), backend="reference")
    return [result, *op_checks.gradients(call, args, dtype, "reference", rounded)]


def last(terms):
    *_, found = terms
    return found


def one_by_one(a, b):
    """A sum of products from first to last, each step rounded."""
    total = a.new_zeros(())
    for term in (a * b).unbind():
        total = total + term
    return total


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("n", [2, 64, 1024])
def test_a_sum_may_go_in_any_order_even_where_it_cancels(n, dtype):
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        a, b = (torch.randn(n, generator=generator, dtype=dtype) for _ in range(2))
        a, b = torch.cat([a, a]), torch.cat([b, b * (2.0**-12 - 1)])  # the sum is a 4096th of its terms
        assert_accurate([one_by_one(a, b)], lambda kind, a=a, b=b: [a.to(kind) @ b.to(kind)], dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_factors_of_products_may_be_rounded_to_half_precision(dtype):
    """The computed factors y nearly cancel in the result, so rounding them moves it by more than storing it does."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(64, 64, generator=generator).to(dtype), torch.randn(64, generator=generator).to(dtype)
    a[32:] = a[:32]
    a[32:, 0] *= 1.0625
    signs = torch.tensor([1.0, -1.0]).repeat_interleave(32)

    def reference(kind):
        wide = torch.promote_types(kind, torch.float32)
        return [(signs.to(wide) @ (a.to(wide) @ b.to(wide))).to(kind)]

    y = (a.float() @ b.float()).to(dtype)
    found = [(signs @ y.float()).to(dtype)]
    assert_accurate(found, reference, dtype, products=dtype)
    with pytest.raises(AssertionError, match="exceeds"):  # where products are of float32 it would be a mistake
        assert_accurate(found, reference, dtype)


def total(x):
    return [x.sum(0)]


def product(x):
    return [x.t() @ x.new_ones(len(x))]


def gradient_of_a_factor(x):
    """The factor is one row, so its gradient is the sum over all rows."""
    factor = x.new_ones(x.shape[1], requires_grad=True)
    return torch.autograd.grad((x * factor).sum(), factor)


def one_after_another(x):
    found = torch.zeros_like(x[0])
    for row in x:
        found = found + row
    return found


@pytest.mark.parametrize("reference", [total, product, gradient_of_a_factor])
@pytest.mark.parametrize("n", [64, 4096])
def test_a_sum_of_positive_terms_may_go_from_first_to_last_or_in_blocks(n, reference):
    x = torch.rand(n, 16, generator=torch.Generator().manual_seed(0))
    blocks = torch.stack([one_after_another(block) for block in x.split(32)])
    for found in (one_after_another(x), one_after_another(blocks)):
        assert_accurate([found], lambda kind: reference(x.to(kind)), torch.float32)


def test_a_sum_may_take_all_positive_terms_first():
    x = torch.rand(4096, 16, generator=torch.Generator().manual_seed(0))
    x = torch.cat([x, -x])
    assert_accurate([one_after_another(x)], lambda kind: total(x.to(kind)), torch.float32)


@pytest.mark.parametrize("reference", [total, product, gradient_of_a_factor])
def test_a_term_left_out_of_a_long_sum_is_seen(reference):
    x = torch.rand(4096, 16, generator=torch.Generator().manual_seed(0))
    with pytest.raises(AssertionError, match="exceeds"):
        assert_accurate([one_after_another(x[1:])], lambda kind: reference(x.to(kind)), torch.float32)


def drawn(a, b):
    """What rounding may add to a product of float32 vectors."""
    return last(rounding(lambda kind: [a.to(kind) @ b.to(kind)], [a.double() @ b.double()], torch.float32))[0]


@pytest.mark.parametrize("n", [64, 4096])
def test_the_term_follows_the_number_of_terms(n):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(n, generator=generator) for _ in range(2))
    # Each of n additions is off by a unit of all the terms at most.
    one = torch.finfo(torch.float32).eps / 2 * n**0.5 * (a * b).abs().sum().item()
    assert 0.5 < drawn(a, b) / (accuracy.SIGMAS * one) < 2


def test_the_term_follows_the_condition():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.rand(64, generator=generator) for _ in range(2))
    twice, cancelling = torch.cat([a, a]), torch.cat([b, b * (2.0**-12 - 1)])
    assert twice @ cancelling < 1e-3 * (a @ b)
    assert 0.5 < drawn(twice, cancelling) / drawn(a, b) < 8  # that of the terms, not of the sum


@CASES
@OVER_DTYPES
def test_the_reference_passes(make, dtype):
    assert_accurate(outcome(make(), dtype, dtype), lambda kind: outcome(make(), kind, dtype), dtype)


attend = _attention.attend


def without_a_region(query, context, norm, scale, *weights):
    return attend(query, context[:-1] if len(context) > 1 else context, norm, scale, *weights)


def without_a_feature(query, context, norm, scale, *weights):
    """One of the 16 terms of an affinity."""
    affinity = context[:, 1:] @ query[:, 1:].t()
    return (scale * _attention.affinity_norm(affinity, norm, 1)).softmax(0).t() @ context


def another_scale(query, context, norm, scale, *weights):
    return attend(query, context, norm, 1.01 * scale, *weights)


MISTAKES = [(m, d) for m in (without_a_region, without_a_feature) for d in DTYPES]
MISTAKES += [(another_scale, d) for d in DTYPES[:2]]  # half precision rounds by as much


@pytest.mark.slow
@CASES
@pytest.mark.parametrize("mistake,dtype", MISTAKES)
def test_a_mistake_is_seen(make, mistake, dtype, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(_attention, "attend", mistake)
        found = outcome(make(), dtype, dtype)
    want = functools.cache(lambda kind: outcome(make(), kind, dtype))
    for part in (slice(0, 1), slice(1, None)):  # the result alone shows it, and so do the gradients
        with pytest.raises(AssertionError, match="exceeds"):
            assert_accurate(found[part], lambda kind, part=part: want(kind)[part], dtype)


def test_eps_in_the_wrong_place_is_seen(monkeypatch):
    def inside(x, dim=-1):
        return x / (x.square().sum(dim, keepdim=True) + _attention.EPS).sqrt()

    case = similarity()
    with monkeypatch.context() as patch:
        patch.setattr(_attention, "l2norm", inside)
        found = outcome(case, torch.float64, torch.float64)
    with pytest.raises(AssertionError, match="exceeds"):
        assert_accurate(found, lambda kind: outcome(case, kind, torch.float64), torch.float64)


def test_what_is_not_finite_or_of_another_shape_is_seen():
    x = torch.ones(3)
    with pytest.raises(AssertionError, match="not finite"):
        assert_accurate([x * torch.nan], lambda kind: [x.to(kind)], torch.float32)
    with pytest.raises(AssertionError, match=r"shape \[2\], want \[3\]"):
        assert_accurate([x[:2]], lambda kind: [x.to(kind)], torch.float32)


def test_a_gradient_that_cancels_in_a_softmax_has_a_term():
    # A bias of all of a softmax's arguments changes nothing: its exact gradient is 0, and the computed one a sum of
    # differences of terms of size 1000 / 30.
    x = torch.randn(40, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def slope(kind):
        bias = torch.zeros((), dtype=kind, requires_grad=True)
        return torch.autograd.grad(((x.to(kind) + bias).softmax(1) * (x.to(kind) + 1000)).sum(), bias)

    unit = torch.finfo(torch.float32).eps / 2
    assert last(rounding(slope, slope(torch.float64), torch.float32))[0] > 1000 * unit
    assert_accurate(slope(torch.float32), slope, torch.float32)
