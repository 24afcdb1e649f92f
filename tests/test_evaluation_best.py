"""The k best items of each query from blocks in any order, against one sort of the whole matrix."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from itm_fast.evaluation.best import Best, TieOrder, right_pairs

quick = settings(deadline=None, max_examples=40, database=None, derandomize=True)


def sorted_here(score: np.ndarray, right: list, rule: str) -> np.ndarray:
    index = np.broadcast_to(np.arange(score.shape[1]), score.shape)
    is_right = np.array([np.isin(index[0], own) for own in right]).reshape(score.shape)
    among_equals = {
        "lower": (index,),
        "published": (-index,),
        "pessimistic": (index, is_right),
        "optimistic": (index, ~is_right),
    }
    return np.lexsort((*among_equals[rule], -score))


def order_of(rule: str, right: list, items: int) -> TieOrder:
    if rule in ("lower", "published"):
        return TieOrder(higher_index=rule == "published")
    return TieOrder(right=right_pairs(right, items), right_first=rule == "optimistic")


@quick
@given(
    st.integers(1, 7), st.integers(1, 30), st.integers(1, 12), st.integers(1, 6), st.integers(1, 4), st.booleans(),
    st.sampled_from(["lower", "published", "pessimistic", "optimistic"]), st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_blocks_in_any_order_find_what_a_sort_finds(queries, items, k, levels, parts, transposed, rule, seed):
    """Few values of both signs, so that many scores are equal, -0.0 and 0.0 too; several processes that are merged."""
    rng = np.random.default_rng(seed)
    score = (rng.integers(-levels, levels, (queries, items)) / np.float32(3)).astype(np.float32)
    score[rng.random(score.shape) < 0.2] *= np.float32(-0.0)
    right = [rng.permutation(items)[: rng.integers(0, items + 1)] for _ in range(queries)]
    found = [Best(queries, items, k, order_of(rule, right, items)) for _ in range(parts)]
    columns = np.split(rng.permutation(items), np.unique(rng.integers(1, items + 1, 3)))
    edges = np.unique([0, *rng.integers(0, queries + 1, 2), queries])
    blocks = [(np.arange(a, b), c) for a, b in zip(edges, edges[1:], strict=False) for c in columns if len(c)]
    for number in rng.permutation(len(blocks)):
        rows, chosen = blocks[number]
        block = score[np.ix_(rows, chosen)]
        found[rng.integers(parts)].add(np.asfortranarray(block) if transposed else block, rows, chosen)
    for one in found[1:]:
        found[0].merge(one)
    best, scores = found[0].ranked()
    expected = sorted_here(score, right, rule)[:, :k]
    np.testing.assert_array_equal(best, expected)
    np.testing.assert_array_equal(scores, np.take_along_axis(score, expected, 1))
    assert not np.signbit(scores[scores == 0]).any()


def test_the_order_of_extreme_scores_is_kept():
    least, most = np.finfo(np.float32).smallest_subnormal, np.finfo(np.float32).max
    above_one = np.nextafter(np.float32(1), np.float32(2))
    score = np.array([[-most, -1, -least, -0.0, least, 1, above_one, most]], np.float32)
    best = Best(1, 8, 8)
    best.add(score, np.arange(1), np.arange(8))
    found, scores = best.ranked()
    assert found.tolist() == [[7, 6, 5, 4, 3, 2, 1, 0]]
    np.testing.assert_array_equal(scores[0], score[0, ::-1])


def test_items_that_were_not_added_are_told():
    best = Best(2, 5, 3)
    best.add(np.array([[0.5, 0.7]], np.float32), np.array([1]), np.array([4, 2]))
    found, scores = best.ranked()
    assert found.tolist() == [[-1, -1, -1], [2, 4, -1]]
    assert scores[0].tolist() == [-np.inf] * 3


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="k must be at least 1"):
        Best(1, 5, 0)
    with pytest.raises(ValueError, match=r"items 1 \.\.\. 2147483648, got k = 1 and 2147483649 items"):
        Best(1, 2**31 + 1, 1)
    with pytest.raises(TypeError, match="a block must be float32, got float64"):
        Best(1, 5, 1).add(np.zeros((1, 5)), np.arange(1), np.arange(5))
    with pytest.raises(ValueError, match=r"\[1, 2\] of 5 items cannot be merged with \[1, 3\] of 5"):
        Best(1, 5, 2).merge(Best(1, 5, 3))
