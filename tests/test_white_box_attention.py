"""attention.h, similarity.h and held_contexts.h on their own: the attention of one set of contexts, step by step."""

import numpy as np
import pytest
import torch
from white_box import blocks, box, corner, draws, filled, in_numpy, tensors, whole_numbers

from itm_fast.ops._attention import NORMS, affinity_norm, l2norm
from itm_fast.testing import assert_accurate

__all__ = ["blocks", "box"]  # fixtures

SCALE = 4.0
# Bounds of sets of queries, from another column than 0 on: shorter and longer than a vector, and as long.
EDGES = [[5, 6], [0, 1, 4, 21], [3, 19, 27, 60, 64, 65]]
ROWS = [1, 4, 17, 36]

at_every_edge = pytest.mark.parametrize("edge", EDGES, ids=lambda edge: f"{len(edge) - 1}sets")
with_every_norm = pytest.mark.parametrize("norm", NORMS)


def logits(affinity, norm, edge):
    """scale * affinity norm, set by set, of affinities [n, columns]."""
    cuts = [(start - edge[0], stop - edge[0]) for start, stop in zip(edge, edge[1:])]
    return torch.cat([SCALE * affinity_norm(affinity[:, start:stop], norm, 1) for start, stop in cuts], 1)


def weights(logit):
    """Exponentials over the contexts, and their sums."""
    e = (logit - logit.amax(0)).exp()
    return e, e.sum(0)


def check_logits(blocks, affinity, norm, edge):
    result = corner(blocks, *affinity.shape)
    blocks.logits(NORMS.index(norm), SCALE, edge, filled(blocks, affinity), result)
    (A,) = tensors(affinity)
    assert_accurate(tensors(result), lambda d: [logits(A.to(d), norm, edge)], A.dtype)


def check_gradient(blocks, affinity, d_logit, more, norm, edge):
    result = filled(blocks, affinity)
    blocks.logits_backward(NORMS.index(norm), SCALE, edge, result, filled(blocks, d_logit), filled(blocks, more))
    A, D, M = tensors(affinity, d_logit, more)

    def reference(d):
        a = A.to(d).requires_grad_()
        return [torch.autograd.grad(logits(a, norm, edge), a, D.to(d))[0] + M.to(d)]

    assert_accurate(tensors(result), reference, A.dtype, gradients=True)
    assert np.isnan(result.base[:, result.shape[1] :]).all()  # what lies beyond is left alone


@with_every_norm
@at_every_edge
@pytest.mark.parametrize("n", ROWS)
def test_logits_are_scaled_affinities_normalised_over_each_set(blocks, n, edge, norm):
    check_logits(blocks, draws(blocks, n, edge[-1] - edge[0]), norm, edge)


@with_every_norm
@at_every_edge
@pytest.mark.parametrize("n", [1, 17])
def test_the_gradient_of_logits(blocks, n, edge, norm):
    check_gradient(blocks, *(draws(blocks, n, edge[-1] - edge[0], seed=k) for k in range(3)), norm, edge)


@with_every_norm
def test_logits_and_their_gradient_where_all_affinities_are_zero(blocks, norm):
    affinity, d_logit = np.zeros((2, 3), blocks.dtype), draws(blocks, 2, 3)
    check_logits(blocks, affinity, norm, [0, 3])
    check_gradient(blocks, affinity, d_logit, affinity, norm, [0, 3])


@pytest.mark.parametrize("columns", [1, 15, 33])
@pytest.mark.parametrize("n", ROWS)
def test_the_softmax_over_contexts_is_exponentials_and_their_sums(blocks, n, columns):
    logit = 3 * draws(blocks, n, columns)
    weight = filled(blocks, logit)
    total = blocks.exponentials(weight)
    (L,) = tensors(logit)
    assert_accurate(tensors(weight, total), lambda d: list(weights(L.to(d))), L.dtype)
    assert (weight.max(0) == 1).all()  # so nothing overflows


def test_the_softmax_over_contexts_of_very_different_logits(blocks):
    logit = np.asarray([[0, -1e4, 1e4, -np.inf], [0, 1e4, 1e4, 0]], blocks.dtype)
    weight = filled(blocks, logit)
    assert blocks.exponentials(weight).tolist() == [2, 1, 2, 1]
    assert weight.tolist() == [[1, 0, 1, 0], [1, 1, 1, 1]]


def attended(x, q, norm, edge, weight, bias):
    """What SimilarityTile makes: alpha / (|P| + eps), the sums of exponentials, |P|, and similarity vectors [S, Q]."""
    e, total = weights(logits(x @ q.T, norm, edge))
    P = (e / total).T @ x
    length = torch.linalg.vector_norm(P, dim=1)
    y = l2norm((l2norm(P) - q).square() @ weight.T + bias)
    return [e / total / (length + 1e-8), total[None], length[None], y.T]


def unit_rows(blocks, rows, columns, seed):
    """Rows of length 1."""
    x = draws(blocks, rows, columns, seed=seed).astype(np.float64)
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(blocks.dtype)


def check_attended(blocks, x, q, norm, edge, S):
    w, b = draws(blocks, S, x.shape[1], seed=8), draws(blocks, S, seed=9)
    result = blocks.attend(x, q, NORMS.index(norm), SCALE, edge, w, b)
    X, Q, W, B = tensors(x, q, w, b)
    assert_accurate(tensors(*result), lambda d: attended(X.to(d), Q.to(d), norm, edge, W.to(d), B.to(d)), X.dtype)


@with_every_norm
@at_every_edge
def test_the_attention_of_one_set(blocks, edge, norm):
    check_attended(blocks, unit_rows(blocks, 36, 64, 0), unit_rows(blocks, edge[-1] - edge[0], 64, 1), norm, edge, 16)


@pytest.mark.parametrize("n,D,S", [(1, 1, 1), (5, 7, 3), (13, 257, 17), (37, 600, 5)])
def test_the_attention_of_one_set_of_odd_sizes(blocks, n, D, S):
    """More features than the block of 256 that is passed through at a time, and fewer than a vector."""
    edge = EDGES[-1]
    queries = unit_rows(blocks, edge[-1] - edge[0], D, 1)
    check_attended(blocks, unit_rows(blocks, n, D, 0), queries, "clipped_l2norm", edge, S)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_attention_of_one_set_of_16_bits_is_that_of_the_same_values(blocks, dtype):
    generator = torch.Generator().manual_seed(0)
    half = [torch.randn(*shape, generator=generator).to(dtype) for shape in ((5, 19), (17, 19), (3, 19), (3,))]
    edge = EDGES[1][:-1] + [17]
    wide = [x.to(getattr(torch, blocks.dtype)).numpy() for x in half]
    found, wanted = (blocks.attend(*(x[:2]), 2, SCALE, edge, *x[2:]) for x in ([in_numpy(x) for x in half], wide))
    for f, w in zip(found, wanted):
        assert np.array_equal(f, w)


def test_a_sum_of_contexts_that_cancels_keeps_its_accuracy(blocks):
    """Two contexts are opposite but for 0.001 of their length, and a query weighs them alike: the Gram form of |P|^2
    has lost most of its digits, so it is made of P itself."""
    v, d, q = np.eye(3, 8)
    x = np.stack([v + 1e-3 * d, -v + 1e-3 * d]).astype(blocks.dtype)
    queries = np.stack([q, q + 0.1 * d, v]).astype(blocks.dtype)
    check_attended(blocks, x, queries, "none", [0, 3], 4)


def check_held(held, k, rows):
    row, column, gram, largest = held.set(k)
    assert np.array_equal(row, rows)
    assert np.array_equal(column, rows.T)
    assert np.array_equal(gram, rows @ rows.T)
    assert largest == np.square(rows).sum(1).max()


def hold(held, tensor, sets):
    """Fill with sets (first row, count): all are added, then read, then multiplied, as the backward pass does."""
    for _, count in sets:
        held.add(count)
    for k, (first, _) in enumerate(sets):
        held.read_set(k, tensor, first)
    for k in range(len(sets)):
        held.multiply_set(k)


@pytest.mark.parametrize("D", [1, 19, 64])
def test_held_contexts_lie_side_by_side_each_with_its_gram_matrix(blocks, D):
    tensor = whole_numbers(40, D).astype(blocks.dtype)
    held = blocks.HeldContexts(20, 9, D)
    rounds = [[(0, 3), (7, 1), (20, 9), (3, 7)], [(30, 2), (1, 9)], [(39, 1)], [(0, 9), (9, 9), (18, 2)]]
    for sets in rounds:  # the first set, then fewer, then one, then as many rows as there is room for
        hold(held, tensor, sets)
        assert held.n == sum(count for _, count in sets)
        for k, (first, count) in enumerate(sets):
            check_held(held, k, tensor[first : first + count])
        assert np.array_equal(held.columns(), np.concatenate([tensor[f : f + c] for f, c in sets]).T)
        held.clear()  # the next sets take the place of all these
        assert held.n == 0


def test_held_contexts_have_the_bits_of_contexts_held_alone(blocks):
    tensor = draws(blocks, 30, 33)
    together, alone = blocks.HeldContexts(30, 13, 33), blocks.HeldContexts(13, 13, 33)
    sets = [(0, 13), (13, 4), (17, 13)]
    hold(together, tensor, sets)
    for k, one in enumerate(sets):
        hold(alone, tensor, [one])
        for a, b in zip(together.set(k), alone.set(0)):
            assert np.array_equal(a, b)
        alone.clear()
