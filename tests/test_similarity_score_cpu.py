"""What the native pair scorers promise beyond the other backends: the same bits, bounded scratch, every processor."""

from types import SimpleNamespace

import pytest
import torch
from cpu_cases import at_level, needs_cpu, over_lesser_processors, scratch_of
from pair_score_cases import edges
from test_similarity_score import GRAPH, over_scorers

from itm_fast import _native
from itm_fast.ops import _cpu_calls, _score_backward
from itm_fast.testing import assert_accurate, op_checks

pytestmark = needs_cpu
COUNTS = (5, 3, 6, 300, 10, 5, 2, *[12] * 40)  # one caption longer than a chunk, and several chunks


def scored(scorer, I=5, dtype=torch.float32):
    call, args = scorer.case(I, COUNTS, D=20, S=9)
    args = [a.to(dtype) for a in args]
    return args, call(*args, backend="cpu")


def some(scorer, args, images, captions):
    """Scores of some images with some captions, in that order."""
    edge = edges(COUNTS).tolist()
    image, image_global, words, caption_global, *parameters = args
    packed = torch.cat([words[edge[t] : edge[t + 1]] for t in captions])
    call, _ = scorer.case(len(images), [COUNTS[t] for t in captions], D=20, S=9)
    return call(image[images], image_global[images], packed, caption_global[captions], *parameters, backend="cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@over_scorers
def test_the_same_bits_in_any_block_and_order(scorer, dtype):
    args, whole = scored(scorer, dtype=dtype)
    order = torch.randperm(len(COUNTS), generator=torch.Generator().manual_seed(1)).tolist()
    assert torch.equal(some(scorer, args, [3, 0], order), whole[[3, 0]][:, order])
    for t in (0, 3, 4, 46):
        assert torch.equal(some(scorer, args, [2], [t]), whole[2:3, t : t + 1])


@over_scorers
def test_the_same_bits_with_any_number_of_threads(scorer):
    call, args = scorer.case(2, COUNTS, D=20, S=9)
    op_checks.check_threads(call, args, torch.float32)


@over_scorers
def test_gradients_from_a_few_images_at_a_time(scorer, monkeypatch):
    call, args = scorer.case(5, (4, 2, 7))
    whole = op_checks.gradients(call, args, torch.float64, "cpu", torch.float64)
    monkeypatch.setattr(_score_backward, "CPU_NODES", 2 * 16 * 8 * 8)  # nodes of two images, or also gradients of one
    for part, exact in zip(op_checks.gradients(call, args, torch.float64, "cpu", torch.float64), whole, strict=True):
        torch.testing.assert_close(part, exact, rtol=1e-11, atol=1e-13)


def gradients_of(scorer, grad, I=20, dtype=torch.float64):
    """The gradients of pairs [I, 6] with the upstream gradient `grad`."""
    call, args = scorer.case(I, (4, 2, 7, 3, 5, 1), R=5, D=20, S=9)
    leaves = op_checks.leaves(args, dtype)
    return torch.autograd.grad(call(*leaves, backend="cpu"), leaves, grad.to(dtype))


def few_of(grad):
    """`grad` where about one pair in three has a gradient, and some images have none."""
    keep = torch.rand(grad.shape, generator=torch.Generator().manual_seed(2)) < 0.4
    keep[5:8] = False
    return grad * keep


@over_scorers
def test_gradients_of_few_pairs_at_a_time(scorer, monkeypatch):
    grad = few_of(torch.randn(20, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    op_checks.same_bits(lambda: gradients_of(scorer, grad, dtype=torch.float32))
    few = gradients_of(scorer, grad)
    monkeypatch.setattr(_score_backward, "CPU_NODES", 12 * (2 * 9 + 20) * 8)  # twelve nodes, and one pair at the least
    parts = gradients_of(scorer, grad)
    monkeypatch.setitem(_score_backward.FEW_NODES, "cpu", 1 << 40)
    for exact, *others in zip(gradients_of(scorer, grad), few, parts, strict=True):
        for found in others:
            torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-12)


def test_nodes_are_kept_if_the_last_loss_was_of_all_pairs(monkeypatch):
    call, args = GRAPH.case(5, (4, 2, 7))
    leaves = op_checks.leaves(args, torch.float64)
    row, made = 16 * (8 + 1) * 8, []  # bytes of an image's nodes
    nodes = torch.ops.itm_fast.similarity_nodes.default
    counting = SimpleNamespace(default=lambda *given: made.append(len(given[0])) or nodes(*given))
    monkeypatch.setattr(torch.ops.itm_fast, "similarity_nodes", counting)
    monkeypatch.setattr(_score_backward, "CPU_NODES", 3 * 16 * 8 * 8)  # nodes of three images

    def gradients(score, grad, **options):
        made.clear()
        return [*torch.autograd.grad(score, leaves, grad, **options), list(made)]

    every, one = torch.ones(5, 3, dtype=torch.float64), torch.eye(5, 3, dtype=torch.float64)
    first = gradients(call(*leaves, backend="cpu"), every)[:-1]
    for images, again in ((0, [3, 2]), (3, [2]), (4, [2]), (9, [])):
        monkeypatch.setattr(_score_backward, "MOST_KEPT", images * row)
        gradients(call(*leaves, backend="cpu"), one)  # few pairs: the next forward pass keeps nothing
        others = [x.detach().clone().requires_grad_() for x in leaves]
        call(*others, backend="cpu").sum().backward()  # of other weights, which tells nothing of these
        for computed in ([3, 2], again):
            score = call(*leaves, backend="cpu")
            for expected in (computed, [3, 2]):  # what is kept is freed after its first use
                *found, seen = gradients(score, every, retain_graph=True)
                assert seen == expected
                assert all(torch.equal(a, b) for a, b in zip(found, first, strict=True))


def test_gradients_take_the_place_of_the_nodes(monkeypatch):
    """Of nodes that are not contiguous, that of a copy, and are the same."""
    call, args = GRAPH.case(3, (4, 2))
    run, whole, places = _cpu_calls.implementation("similarity_graph_head"), _cpu_calls.Calls.backward, []

    def noted(self, grad, needs, *given, **more):
        apart = given[0].mT.contiguous().mT if self is run else given[0]
        others = whole(self, grad, needs, apart, *given[1:], **more)
        found = whole(self, grad, needs, *given, **more)
        assert all(torch.equal(a, b) for a, b in zip(others, found, strict=True))
        if self is run:
            assert not apart.is_contiguous()
            places.append((given[0].data_ptr(), found[0].data_ptr()))
        return found

    monkeypatch.setattr(_cpu_calls.Calls, "backward", noted)
    op_checks.gradients(call, args, torch.float32, "cpu", torch.float32)
    assert places
    assert all(nodes == gradient for nodes, gradient in places)


def test_gradients_of_half_inputs_are_those_of_the_nodes_that_backward_computes(monkeypatch):
    """Forward multiplies bfloat16 inputs as such, backward in float32: nodes that forward keeps would be others."""
    call, args = GRAPH.case(5, (4, 2, 7))
    leaves, found = op_checks.leaves(args, torch.bfloat16), []
    for most in (0, 1 << 30):
        monkeypatch.setattr(_score_backward, "MOST_KEPT", most)
        found += [torch.autograd.grad(call(*leaves, backend="cpu").sum(), leaves) for _ in range(2)]
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(other, found[0], strict=True))


@over_scorers
@pytest.mark.parametrize("few", [False, True])
def test_gradients_by_products_of_bfloat16(scorer, few):
    call, args = scorer.case(6, (9, 4, 12), R=9, D=64, S=32)
    single, grad = [a.float() for a in args], torch.randn(6, 3, generator=torch.Generator().manual_seed(1))
    grad = few_of(grad) if few else grad

    def gradients(dtype, backend):
        leaves = op_checks.leaves([a.to(dtype) for a in single], dtype)
        return list(torch.autograd.grad(call(*leaves, backend=backend), leaves, grad.to(dtype)))

    exact = gradients(torch.float32, "cpu")
    try:
        torch.set_float32_matmul_precision("medium")
        found = gradients(torch.float32, "cpu")
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(found[4], exact[4]) == (_native.outcome().level not in _native.BFLOAT16_LEVELS)
    assert_accurate(found, lambda dtype: gradients(dtype, "reference"), torch.float32, products=torch.bfloat16)


@over_scorers
def test_products_of_bfloat16_only_where_they_are_allowed(scorer):
    exact = scored(scorer)[1]
    double = scored(scorer, dtype=torch.float64)[1]
    try:
        torch.set_float32_matmul_precision("high")
        assert torch.equal(scored(scorer)[1], exact)
        torch.set_float32_matmul_precision("medium")
        rounded = scored(scorer)[1]
        assert torch.equal(scored(scorer, dtype=torch.float64)[1], double)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(rounded, exact) == (_native.outcome().level not in _native.BFLOAT16_LEVELS)
    # The head's weights are enlarged: a score moves by more than a rounding of bfloat16.
    assert (rounded - exact).abs().max() < 0.1


@over_lesser_processors
@over_scorers
def test_older_processors(scorer, level, monkeypatch):
    call, args = scorer.case(1, COUNTS, D=20, S=9)
    at_level(level, monkeypatch)
    for dtype in (torch.float64, torch.float32):
        op_checks.check_forward(call, args, dtype, "cpu")


@pytest.mark.slow
def test_scratch_is_bounded():
    setup = [
        "I, R, D, S, T, L, K = 8, 36, 1024, 256, 2000, 12, 3",
        "image, words = torch.rand(I, R, D) / 16, torch.rand(T * L, D) / 16",
        "inputs = image, image.mean(1), words, words.view(T, L, D).mean(1), torch.arange(0, T * L + 1, L)",
        "linear = torch.rand(S, D) / 16, torch.rand(S)",
        "steps = [x for _ in range(3) for x in (torch.rand(K, S, S) / 64, torch.rand(K, S))]",
        "weights = *linear, *linear, *steps, torch.rand(S), torch.rand(1)",
        "torch.set_num_threads(2)",
    ]
    used = scratch_of(setup, "itm_fast.similarity_graph_score(*inputs, *weights, backend='cpu')")
    assert 1 << 20 < used < 64 << 20
