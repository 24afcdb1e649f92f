"""Counts of blocks in any order, and ranks without the matrix, against ranking the whole matrix."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from itm_fast.evaluation import counters as counters_module
from itm_fast.evaluation.counters import Counters
from itm_fast.evaluation.counting import Counts, count

quick = settings(deadline=None, max_examples=60, database=None, derandomize=True)


def require_equal(found: Counts, expected: Counts) -> None:
    for side in ("i2t", "t2i"):
        for name, a, b in zip(found.i2t._fields, getattr(found, side), getattr(expected, side), strict=True):
            np.testing.assert_array_equal(a, b, f"{side} {name}")
    np.testing.assert_array_equal(found.query_images, expected.query_images)
    assert (found.images, found.captions) == (expected.images, expected.captions)


@quick
@given(st.integers(1, 9), st.integers(1, 25), st.integers(1, 6), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_blocks_in_any_order_count_as_the_matrix_does(images, captions, levels, slab, seed):
    """Few values, so that many scores are equal; random owners, so that images lack captions; random cuts."""
    rng = np.random.default_rng(seed)
    dtype = rng.choice([np.float16, np.float32, np.float64])
    score = rng.integers(0, levels, (images, captions)).astype(dtype)
    owner = rng.integers(0, images, captions)
    counters = Counters(score[owner, np.arange(captions)], owner, images)
    order = rng.permutation(captions)
    columns = np.split(order, np.unique(rng.integers(1, captions + 1, 3)))
    edges = np.unique([0, *rng.integers(0, images + 1, 3), images])
    blocks = [(a, b, c) for a, b in zip(edges, edges[1:], strict=False) for c in columns if len(c)]
    with mock.patch.object(counters_module, "_IN_CACHE", slab):
        for number in rng.permutation(len(blocks)):
            first, stop, chosen = blocks[number]
            counters.add(score[first:stop, chosen], first, chosen)
    require_equal(counters.pool(), count(score, owner, "test"))


@pytest.mark.parametrize("images, captions", [(2, 70_000), (700, 3)])
def test_more_items_than_small_integers_count(images, captions):
    owner = np.arange(captions) % images
    score = np.zeros((images, captions), np.float32)
    score[owner, np.arange(captions)] = -1
    counters = Counters(score[owner, np.arange(captions)], owner, images)
    counters.add(score, 0, np.arange(captions))
    require_equal(counters.pool(), count(score, owner, "test"))
