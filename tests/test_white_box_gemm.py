"""gemm.h on its own: C = A^T B, added to what is there or not, for every remainder of a tile."""

import numpy as np
import pytest
import torch
from white_box import blocks, box, corner, draws, filled, tensors, whole_numbers

from itm_fast.testing import assert_accurate

__all__ = ["blocks", "box"]  # fixtures

DEPTHS = [0, 1, 2, 7, 16]
PAIR_DEPTHS = [*DEPTHS, 33, 75]  # also more than one and two of AMX's tiles, of 16 pairs each


def heights(box):
    """Rows of every remainder of a tile, with no, one and two whole tiles before them."""
    return range(1, 2 * box.TILE_ROWS + 2)


def widths(part):
    """One column to one more than two tiles of columns: around every whole number of vectors."""
    whole = range(0, 2 * part.TILE_COLUMNS + 1, part.LANES)
    return sorted({n for w in whole for n in (w - 1, w, w + 1) if n > 0})


def multiply(part, a, b, c, packed, accumulate=True):
    """C as gemm leaves it, with all that lies around it: A and B have NaN beyond them."""
    result = filled(part, c)
    part.gemm(filled(part, a), filled(part, b), result, accumulate, packed)
    return result


@pytest.mark.parametrize("packed", [False, True])
def test_every_remainder_of_a_tile_is_multiplied(box, blocks, packed):
    for M in heights(box):
        for N in widths(blocks):
            K = DEPTHS[(M + N) % len(DEPTHS)]
            a, b, c = whole_numbers(K, M), whole_numbers(K, N), whole_numbers(M, N)
            assert np.array_equal(multiply(blocks, a, b, c, packed), c + a.T @ b), (M, N, K)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("K", DEPTHS)
def test_a_product_overwrites_or_adds(box, blocks, K, packed):
    M, N = box.TILE_ROWS + 1, blocks.TILE_COLUMNS + 1
    a, b, c = whole_numbers(K, M), whole_numbers(K, N), whole_numbers(M, N)
    assert np.array_equal(multiply(blocks, a, b, c, packed), c + a.T @ b)
    assert np.array_equal(multiply(blocks, a, b, np.full((M, N), np.nan), packed, accumulate=False), a.T @ b)


def test_a_product_writes_its_rows_and_whole_vectors_and_no_more(box, blocks):
    for M in heights(box):
        for N in widths(blocks):
            c = corner(blocks, M, N, fill=7)
            blocks.gemm(filled(blocks, np.zeros((3, M))), filled(blocks, np.zeros((3, N))), c, False, False)
            written = -(-N // blocks.LANES) * blocks.LANES
            assert not c.any()
            assert (c.base[M:] == 7).all()
            assert (c.base[:, written:] == 7).all()


@pytest.mark.parametrize("K", [1, 29, 500])
@pytest.mark.parametrize("packed", [False, True])
def test_a_product_is_as_accurate_as_its_dtype_allows(blocks, packed, K):
    a, b, c = draws(blocks, K, 13), draws(blocks, K, 37, seed=1), draws(blocks, 13, 37, seed=2)
    A, B, C = tensors(a, b, c)
    result = multiply(blocks, a, b, c, packed)
    assert_accurate(tensors(result), lambda d: [C.to(d) + A.to(d).T @ B.to(d)], C.dtype)


@pytest.mark.parametrize("packed", [False, True])
def test_an_element_has_the_same_bits_wherever_it_stands(blocks, packed):
    a, b, c = draws(blocks, 29, 1), draws(blocks, 29, 1, seed=1), draws(blocks, 1, 1, seed=2)
    alone = multiply(blocks, a, b, c, packed=False)
    for M, N in ((1, 1), (13, 97), (8, 5), (4, 33), (25, 16)):
        many = multiply(blocks, a.repeat(M, 1), b.repeat(N, 1), c.repeat(M, 0).repeat(N, 1), packed)
        assert (many == alone).all()


@pytest.mark.parametrize("n", [1, 3, 4, 17, 36])
@pytest.mark.parametrize("D", [1, 19, 64])
def test_columns_are_multiplied_with_each_other(blocks, n, D):
    columns, gram = whole_numbers(D, n), corner(blocks, n, n)
    largest = blocks.multiply_with_each_other(filled(blocks, columns), gram)
    assert np.array_equal(gram, columns.T @ columns)
    assert largest == np.square(columns).sum(0).max()


ROWS = [(1, 1), (2, 3), (4, 16), (5, 17), (36, 64), (13, 257)]


@pytest.mark.parametrize("n,K", ROWS)
def test_rows_are_multiplied_with_each_other(blocks, n, K):
    rows, weight = draws(blocks, n, K), draws(blocks, K)
    plain, weighted = corner(blocks, n, n, fill=7), corner(blocks, n, n, fill=7)
    blocks.gram_matrix(filled(blocks, rows), None, plain)
    blocks.gram_matrix(filled(blocks, rows), weight, weighted)
    X, W = tensors(rows, weight)

    def reference(d):
        return [X.to(d) @ X.to(d).T, X.to(d) @ (X.to(d) * W.to(d)).T]

    assert_accurate(tensors(plain, weighted), reference, X.dtype)
    for gram in (plain, weighted):
        assert np.array_equal(gram, gram.T)
        assert (gram.base[:, n:] == 7).all()
        assert (gram.base[n:] == 7).all()


@pytest.mark.parametrize("n,D", ROWS)
def test_rows_are_summed_with_weights_some_features_at_a_time(blocks, n, D):
    rows, weight, out = draws(blocks, n, D), draws(blocks, n), corner(blocks, 1, D)
    half = D // 2 // blocks.LANES * blocks.LANES  # the first and the last features, from a whole vector on
    parts = [blocks.weighted_sum(filled(blocks, rows), weight, *part, out) for part in ((0, half), (half, D))]
    X, W = tensors(rows, weight)

    def reference(d):
        P = W.to(d) @ X.to(d)
        return [P[None], P[:half].square().sum(), P[half:].square().sum()]

    assert_accurate([*tensors(out), *(torch.tensor(part, dtype=X.dtype) for part in parts)], reference, X.dtype)


@pytest.fixture
def of_pairs(box):
    if not hasattr(box, "product_of_pairs"):
        pytest.skip("no products of bfloat16 values at this level")
    return box


@pytest.mark.parametrize("packed", [False, True])
def test_products_of_pairs_are_right_for_every_remainder_of_a_tile(of_pairs, packed):
    part = of_pairs.float32
    part.dtype = "float32"
    for M in heights(of_pairs):
        for N in widths(part):
            K = PAIR_DEPTHS[(M + N) % len(PAIR_DEPTHS)]
            a, b, c = whole_numbers(K, M), whole_numbers(K, N), whole_numbers(M, N)
            result, right = filled(part, c), corner(part, K, N, fill=0)
            right[:] = b
            of_pairs.product_of_pairs(filled(part, a), right, result, packed)
            assert np.array_equal(result, c + a.T @ b), (M, N, K)


@pytest.mark.parametrize("K", [1, 29, 500])
def test_products_of_pairs_add_in_float32(of_pairs, K):
    part = of_pairs.float32
    part.dtype = "float32"
    a, b, c = draws(part, K, 13), draws(part, K, 37, seed=1), draws(part, 13, 37, seed=2)
    A, B, C = tensors(a, b, c)
    result, right = filled(part, c), corner(part, K, 37, fill=0)
    right[:] = b
    of_pairs.product_of_pairs(filled(part, a), right, result, True)
    A, B = A.bfloat16(), B.bfloat16()
    assert_accurate(tensors(result), lambda d: [C.to(d) + A.to(d).T @ B.to(d)], torch.float32)
