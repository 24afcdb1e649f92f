"""What the native alignment scores promise beyond the other backends: bits, bounded scratch, every processor."""

import pytest
import test_hierarchical_alignment_score
import torch
from cpu_cases import at_level, needs_cpu, over_lesser_processors, scratch_of
from pair_score_cases import edges
from test_hierarchical_alignment_score import DIRECTIONS

import itm_fast
from itm_fast import _native
from itm_fast.ops import _cpu_calls
from itm_fast.testing import assert_accurate, op_checks

pytestmark = needs_cpu
COUNTS = (5, 3, 6, 400, 10, 5, 2, *[12] * 60)  # one caption longer than a chunk, and several chunks
GATES = ["scalar", "vector"]
KEPT = "hierarchical_alignment_score_kept"


def scored(gate, I=5, dtype=torch.float32, **options):
    call, args = test_hierarchical_alignment_score.case(I, COUNTS, D=20, gate=gate, **options)
    args = [a.to(dtype) for a in args]
    return args, call(*args, backend="cpu")


def some(args, images, captions):
    """Scores of some images with some captions, in that order."""
    edge = edges(COUNTS).tolist()
    packed = [torch.cat([x[edge[t] : edge[t + 1]] for t in captions]) for x in args[3:6]]
    return itm_fast.hierarchical_alignment_score(
        *(x[images] for x in args[:3]), *packed, edges([COUNTS[t] for t in captions]), *args[6:], scale=5.0,
        backend="cpu",
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gate", GATES)
def test_the_same_bits_in_any_block_and_order(gate, dtype):
    args, whole = scored(gate, dtype=dtype)
    order = torch.randperm(len(COUNTS), generator=torch.Generator().manual_seed(1)).tolist()
    assert torch.equal(some(args, [3, 0], order), whole[[3, 0]][:, order])
    for t in (0, 3, 4, 66):
        assert torch.equal(some(args, [2], [t]), whole[2:3, t : t + 1])


@pytest.mark.parametrize("gate", GATES)
def test_the_same_bits_with_any_number_of_threads(gate):
    op_checks.same_bits(lambda: [scored(gate, I=2)[1]])


def small(dtype=torch.float64, **options):
    """Images of fewer and fewer regions; captions enough for two parts of the first round."""
    counts = (5, 3, 120, 6, 40, 2, 12)
    call, args = test_hierarchical_alignment_score.case(5, counts, D=20, regions=(6, 1, 4, 6, 2), **options)
    return call, [a.to(dtype) for a in args], edges(counts).tolist()


def gradients(call, args, upstream, **kept):
    leaves = [a.detach().requires_grad_() for a in args]
    return torch.autograd.grad(call(*leaves, backend="cpu"), leaves, upstream, materialize_grads=True, **kept)


def assert_equal(found, wanted):
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("few", [False, True])
@pytest.mark.parametrize("gate", GATES)
def test_gradients_have_the_same_bits_with_any_number_of_threads_and_again(gate, few):
    call, args, _ = small(torch.float32, gate=gate)
    upstream = torch.linspace(-1, 1, 35).view(5, 7)
    if few:
        upstream = upstream * (torch.arange(35).view(5, 7) % 9 == 2)
    found = op_checks.same_bits(lambda: gradients(call, args, upstream))
    assert all(x.any() for x in found)
    leaves = [a.requires_grad_() for a in args]
    score = call(*leaves, backend="cpu")
    torch.autograd.grad(score, leaves, upstream, retain_graph=True)  # overwrites what the forward pass has kept
    again = torch.autograd.grad(score, leaves, upstream)
    if not few:
        return assert_equal(again, found)
    for x, first in zip(again, found, strict=True):  # a few images at a time are scored again: another order of sums
        torch.testing.assert_close(x, first, rtol=0, atol=2.0**-18 * first.abs().max().item())


def test_a_backward_pass_that_failed_leaves_nothing_that_it_overwrote(monkeypatch):
    call, args, _ = small()
    upstream = torch.linspace(-1, 1, 35, dtype=torch.float64).view(5, 7)
    wanted, leaves = gradients(call, args, upstream), [a.detach().requires_grad_() for a in args]
    score = call(*leaves, backend="cpu")

    def failing(*args, results):
        results[0].data[:7] = 0  # as C++, past autograd
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(_cpu_calls.implementation(KEPT), "backward", failing)
        with pytest.raises(MemoryError):
            torch.autograd.grad(score, leaves, upstream, retain_graph=True)
    assert_equal(torch.autograd.grad(score, leaves, upstream), wanted)


def test_backward_counts_gram_matrices_as_scratch(monkeypatch):
    """8 of kept elements, 2 I R N, and 33 matrices [I, R, R] have to fit."""
    call, args, edge = small()
    kept, whole = [], _cpu_calls.implementation(KEPT).forward
    monkeypatch.setattr(_cpu_calls.implementation(KEPT), "forward", lambda *x: kept.append(1) or whole(*x))
    elements = 8 * 2 * 5 * 6 * edge[-1] + 33 * 5 * 6 * 6
    leaves = [a.requires_grad_() for a in args]
    for missing in (0, 5 * 8):
        with itm_fast.workspace((elements - missing) * 8 / (1 << 30)):
            call(*leaves, backend="cpu")
    assert kept == [1]


@pytest.mark.parametrize("gate", GATES)
def test_gradients_are_the_same_where_nothing_is_kept(gate):
    call, args, _ = small(gate=gate)
    upstream = torch.linspace(-1, 1, 35, dtype=torch.float64).view(5, 7)
    whole = gradients(call, args, upstream)
    with itm_fast.workspace(1e-9):
        for a, b in zip(gradients(call, args, upstream), whole, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("gate", GATES)
def test_a_pair_without_a_gradient_is_not_computed(gate):
    """NaN in an image and in a caption that no pair with a gradient has, where few pairs have one."""
    call, args, edge = small(gate=gate)
    upstream = torch.eye(5, 7, dtype=torch.float64)[:, [3, 0, 2, 6, 1, 5, 4]]
    upstream[2], upstream[:, 4] = 0, 0
    wanted, spoilt = gradients(call, args, upstream), [a.clone() for a in args]
    for x in spoilt[:3]:
        x[2] = float("nan")
    for x in spoilt[3:6]:
        x[edge[4] : edge[5]] = float("nan")
    assert all(x.any() for x in wanted)
    assert_equal(gradients(call, spoilt, upstream), wanted)
    assert not any(x[2].any() for x in wanted[:3])
    with itm_fast.workspace(1e-9):  # nothing is kept
        for a, b in zip(gradients(call, args, upstream), wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("kept", [0, 3, 5])
def test_vector_gates_keep_affinities_alone(kept, monkeypatch):
    """Of 5 images 8 of the elements I R N have to fit, else backward scores as many images again as fit."""
    call, args, edge = small(gate="vector")
    calls, whole = [], _cpu_calls.implementation(KEPT).forward

    def noted(*args):
        score, products = whole(*args)
        calls.append((len(args[0]), products.numel()))
        return score, products

    monkeypatch.setattr(_cpu_calls.implementation(KEPT), "forward", noted)
    with itm_fast.workspace((kept * 8 * 6 * edge[-1] + 1) * 8 / (1 << 30)):
        gradients(call, args, torch.ones(5, 7, dtype=torch.float64))
    each = max(1, kept)
    wanted = [min(each, 5 - first) for first in range(0, 5, each)]
    assert calls == [(n, n * 6 * edge[-1] + 16) for n in wanted]


def test_gradients_of_many_short_captions():
    """With vector gates, what words give regions is added for eight captions or 104 words at a time."""
    # Of each of 16 groups, 104 words are added because one more would be too many, the next eight captions because they
    # are eight, and the last one because it is the last.
    counts = (104, *[1] * 9) * 16
    call, args = test_hierarchical_alignment_score.case(2, counts, D=5, regions=(3, 2), gate="vector")
    op_checks.check_gradients(call, args, torch.float32, "cpu")
    upstream = torch.linspace(-1, 1, 320).view(2, 160)
    op_checks.same_bits(lambda: gradients(call, [a.float() for a in args], upstream), (1, 3, 6))


def test_no_gradients_but_those_that_are_needed():
    call, args, _ = small(gate="vector")
    upstream = torch.linspace(-1, 1, 35, dtype=torch.float64).view(5, 7)
    wanted = gradients(call, args, upstream)
    for k, x in enumerate(args):
        leaf = x.detach().requires_grad_()
        found = torch.autograd.grad(call(*args[:k], leaf, *args[k + 1 :], backend="cpu"), leaf, upstream)
        assert_equal(found, wanted[k : k + 1])


def test_pairs_whose_vectors_are_formed_have_their_gradients(monkeypatch):
    """Rows that nearly cancel, in one image: C++ leaves its pairs to torch."""
    call, args, _ = small()
    args[0][3, 3:] = -args[0][3, :3] + 1e-3 * args[0][3, 3:]
    args[1][3] = args[1][3, :1]
    marks, whole = [], _cpu_calls.implementation(KEPT).backward

    def noted(grad, needs, *rest, results):
        marks.append(results[0][-16 - 35 : -16].view(5, 7).bool())
        return whole(grad, needs, *rest, results=results)

    monkeypatch.setattr(_cpu_calls.implementation(KEPT), "backward", noted)
    op_checks.check_gradients(call, args, torch.float64, "cpu")
    assert marks[0][3].all()
    assert marks[0].sum() == 7


def results(call, args, upstream, dtype, backend="reference", precision="highest"):
    """Scores and all gradients at a precision of float32 matrix products."""
    try:
        torch.set_float32_matmul_precision(precision)
        leaves = op_checks.leaves([a.to(dtype) for a in args], dtype)
        score = call(*leaves, backend=backend)
        return [score, *torch.autograd.grad(score, leaves, upstream.to(dtype), materialize_grads=True)]
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("few", [False, True])
@pytest.mark.parametrize("gate,dim", [("scalar", 64), ("scalar", 31), ("vector", 31)])
def test_products_of_bfloat16(gate, dim, few):
    """Scores and gradients by products of bfloat16 values at precision "medium", and not otherwise."""
    regions = (6, 1, 4, 6, 2, 5, 6, 3, 6)
    call, args = test_hierarchical_alignment_score.case(9, (5, 14, 8), D=dim, regions=regions, gate=gate)
    single = [a.float() for a in args]
    upstream = torch.randn(9, 3, generator=torch.Generator().manual_seed(1))
    if few:
        upstream = upstream * (torch.arange(27).view(9, 3) % 9 == 2)
    exact = results(call, single, upstream, torch.float32, "cpu")
    assert_equal(results(call, single, upstream, torch.float32, "cpu", "high"), exact)
    found = results(call, single, upstream, torch.float32, "cpu", "medium")
    rounded = _native.outcome().level in _native.BFLOAT16_LEVELS
    assert all(torch.equal(a, b) != rounded for a, b in zip(found, exact, strict=True))
    assert_accurate(found, lambda dtype: results(call, single, upstream, dtype), torch.float32, products=torch.bfloat16)


@pytest.mark.parametrize(
    "gate,direction,seed", [("scalar", "i2t", 0), ("scalar", "t2i", 14), ("scalar", "both", 9), ("vector", "both", 9)]
)
def test_products_of_bfloat16_that_cancel(gate, direction, seed):
    """Captions nearly opposite to images: a context vector v_c is a few hundredths of the rows that it is made of, so
    an error of a bfloat16 rounding in one of the terms of |v_c|^2 would be a large part of it."""
    regions, counts = ((5, 1, 3), (6, 1, 4)) if direction == "t2i" else ((6, 1, 4), (5, 1, 3))
    call, args = test_hierarchical_alignment_score.case(3, counts, 6, 8, regions, gate, direction=direction)
    generator = torch.Generator().manual_seed(seed)
    unit = torch.nn.functional.normalize
    axis = unit(torch.randn(3, 8, generator=generator, dtype=torch.float64), dim=-1)
    for at, rows, sign in ((0, axis[:, None], 1), (3, axis.repeat_interleave(torch.tensor(counts), 0), -1)):
        spread = torch.randn(args[at].shape, generator=generator, dtype=torch.float64)
        args[at] = unit(sign * rows + 0.05 * spread, dim=-1)
    single = [a.float() for a in args]
    upstream = torch.randn(3, 3, generator=torch.Generator().manual_seed(1))
    found = results(call, single, upstream, torch.float32, "cpu", "medium")
    assert_accurate(found, lambda dtype: results(call, single, upstream, dtype), torch.float32, products=torch.bfloat16)


@pytest.mark.parametrize("level,dtype", [(None, torch.float32), (None, torch.float64), ("generic", torch.float64)])
@pytest.mark.parametrize("gate", GATES)
def test_a_pair_does_not_see_what_was_scored_before_it(gate, level, dtype, monkeypatch):
    """Images of fewer and fewer regions, NaN in two captions, a long one among them: their neighbours keep their
    scores. With two float64 values to a vector, 10 words end between vectors and the steps of a product's rows."""
    if level:
        at_level(level, monkeypatch)
    regions = (6, 1, 4, 6, 2)
    args, whole = scored(gate, regions=regions, dtype=dtype)
    call, _ = test_hierarchical_alignment_score.case(5, COUNTS, D=20, gate=gate, regions=regions)
    spoilt = [x.clone() for x in args]
    spoilt[3][5:8] = float("nan")  # caption 1
    spoilt[3][14:414] = float("nan")  # caption 3
    found = call(*spoilt, backend="cpu")
    assert found[:, [1, 3]].isnan().all()
    rest = [t for t in range(len(COUNTS)) if t not in (1, 3)]
    assert torch.equal(found[:, rest], whole[:, rest])


@over_lesser_processors
@pytest.mark.parametrize("gate", GATES)
def test_older_processors(gate, level, monkeypatch):
    at_level(level, monkeypatch)
    for direction in DIRECTIONS:
        call, args = test_hierarchical_alignment_score.case(1, COUNTS, D=20, gate=gate, direction=direction)
        for dtype in (torch.float64, torch.float32):
            op_checks.check_forward(call, args, dtype, "cpu")
    call, args, _ = small(torch.float32, gate=gate)
    op_checks.check_gradients(call, args, torch.float32, "cpu")


@pytest.mark.slow
@pytest.mark.parametrize("gate", GATES)
def test_scratch_is_bounded(gate):
    setup = [
        f"I, R, D, T, L, K = 8, 36, 1024, 1200, 12, {1 if gate == 'scalar' else 1024}",
        "row = lambda *n: torch.rand(*n) / 16",
        "image = row(I, R, D), row(I, R, D), row(I, R, 2, K)",
        "words = row(T * L, D), row(T * L, D), row(T * L, 2, K)",
        "rest = torch.arange(0, T * L + 1, L), row(D), row(D)",
        "torch.set_num_threads(2)",
    ]
    used = scratch_of(setup, "itm_fast.hierarchical_alignment_score(*image, *words, *rest, backend='cpu')")
    assert 1 << 20 < used < 64 << 20


@pytest.mark.parametrize("gate", GATES)
def test_errors_name_the_op_that_was_called(gate):
    leaves = [a.requires_grad_() for a in small(torch.float32, gate=gate)[1]]
    with pytest.raises(ValueError, match=r"^hierarchical_alignment_score: cu_seqlens must start at 0"):
        itm_fast.hierarchical_alignment_score(*leaves[:6], torch.tensor([1, 188]), *leaves[6:], backend="cpu")
