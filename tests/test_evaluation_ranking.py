"""Ranks and metrics against the published sorting procedure, ties, ragged positives, folds, refusals."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from itm_fast.evaluation import TIES, average, counting, fold_metrics, metrics, ranks
from itm_fast.evaluation.best import best_items


def published(score: np.ndarray, per_image: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """The evaluators' definition, one sort per query: 0-based positions in the descending order."""
    i2t = []
    for image, row in enumerate(score):
        order = np.argsort(row, kind="stable")[::-1]
        i2t.append(min(int(np.where(order == image * per_image + j)[0][0]) for j in range(per_image)))
    orders = [np.argsort(column, kind="stable")[::-1] for column in score.T]
    t2i = [int(np.where(order == c // per_image)[0][0]) for c, order in enumerate(orders)]
    return np.array(i2t), np.array(t2i)


def distinct(images: int, captions: int, seed: int = 0) -> np.ndarray:
    """Scores without a tie."""
    order = np.random.default_rng(seed).permutation(images * captions)
    return (order.reshape(images, captions) / order.size).astype(np.float32)


@pytest.mark.parametrize("images", [1, 7, 64, 130])
@pytest.mark.parametrize("ties", ["pessimistic", "optimistic", "published"])
def test_equal_to_published_sorting(images: int, ties: str):
    score = distinct(images, 5 * images)
    i2t, t2i = published(score)
    found = ranks(score, np.arange(5 * images) // 5, ties)
    np.testing.assert_array_equal(found.i2t, i2t)
    np.testing.assert_array_equal(found.t2i, t2i)
    np.testing.assert_array_equal(found.images, np.arange(images))


def test_metrics_are_the_published_ones():
    score = distinct(40, 200)
    score[np.arange(200) // 5, np.arange(200)] += np.linspace(0, 1, 200, dtype=np.float32)
    found = metrics(score, np.arange(200) // 5)
    for rank, side in zip(published(score), (found.i2t, found.t2i), strict=True):
        assert side.recalls == pytest.approx([100.0 * np.mean(rank < k) for k in (1, 5, 10)], rel=1e-12)
        assert side.medr == np.floor(np.median(rank)) + 1
        assert side.meanr == pytest.approx(rank.mean() + 1, rel=1e-12)
        assert side.queries == len(rank)
    assert 50 < found.rsum < 550
    assert found.rsum == sum(found.i2t.recalls) + sum(found.t2i.recalls)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_any_floating_dtype_and_layout(dtype):
    score = np.asfortranarray(np.random.default_rng(1).permutation(2000).reshape(20, 100).astype(dtype))
    i2t, t2i = published(score)
    found = ranks(score, np.arange(100) // 5)
    np.testing.assert_array_equal(found.i2t, i2t)
    np.testing.assert_array_equal(found.t2i, t2i)


def test_tensors_are_taken():
    score = distinct(6, 30)
    expected = ranks(score, np.arange(30) // 5)
    for tensor in (torch.from_numpy(score), torch.from_numpy(score).requires_grad_()):
        np.testing.assert_array_equal(ranks(tensor, np.arange(30) // 5).i2t, expected.i2t)
    assert ranks(torch.eye(3, dtype=torch.bfloat16), [0, 1, 2]).t2i.tolist() == [0, 0, 0]


# Images have two or three captions or none, and not in order.
OWNER = np.array([3, 0, 1, 0, 3, 0, 1])


def tied_ranks(score: np.ndarray, owner: np.ndarray, query: int, side: str, order: np.ndarray) -> np.ndarray:
    """Rank of a query's best right item when equal scores stand in the order of `order` [..., items]."""
    row = score[query] if side == "i2t" else score[:, query]
    right = owner == query if side == "i2t" else np.arange(len(row)) == owner[query]
    place = np.argsort(np.lexsort((order, np.broadcast_to(-row, order.shape))))
    return place[..., right].min(-1)


@pytest.mark.parametrize("ties", ["pessimistic", "optimistic", "published"])
@pytest.mark.parametrize("seed", range(4))
def test_each_rule_is_an_order_of_equal_scores(ties: str, seed: int):
    score, owner = np.random.default_rng(seed).integers(0, 3, (5, 7)).astype(np.float32), OWNER
    found = ranks(score, owner, ties)
    assert found.images.tolist() == [0, 1, 3]
    for side, ranked, queries in (("i2t", found.i2t, [0, 1, 3]), ("t2i", found.t2i, range(7))):
        for query, rank in zip(queries, ranked, strict=True):
            items = score.shape[side == "i2t"]
            right = owner == query if side == "i2t" else np.arange(items) == owner[query]
            order = {"pessimistic": right, "optimistic": ~right, "published": -np.arange(items)}[ties]
            assert rank == tied_ranks(score, owner, query, side, order)


@pytest.mark.parametrize("seed", range(4))
def test_expected_is_the_mean_over_all_orders_of_equal_scores(seed: int):
    """Against every permutation of the items: the mean of each recall and rank, and the median of all the ranks."""
    score = np.random.default_rng(seed).integers(0, 3, (5, 7)).astype(np.float32)
    found = metrics(score, OWNER, ties="expected")
    for side, queries, items in (("i2t", [0, 1, 3], 7), ("t2i", range(7), 5)):
        orders = np.array(list(itertools.permutations(range(items))))
        rank = np.array([tied_ranks(score, OWNER, query, side, orders) for query in queries])
        one = getattr(found, side)
        assert one.recalls == pytest.approx([100 * (rank < k).mean() for k in (1, 5, 10)], abs=1e-9)
        assert one.meanr == pytest.approx(rank.mean() + 1, abs=1e-9)
        assert one.medr == np.floor(np.median(rank)) + 1


def test_expected_recall_is_not_the_recall_of_the_expected_rank():
    """Image 0: two right captions and three wrong ones tie, mean rank 3 / 3. Image 1: three and two, 2 / 4."""
    found = metrics(np.zeros((2, 5)), [0, 0, 1, 1, 1], ties="expected").i2t
    assert found.r1 == pytest.approx((100 * 2 / 5 + 100 * 3 / 5) / 2)
    assert found.meanr == pytest.approx((3 / 3 + 2 / 4) / 2 + 1)


def test_without_ties_every_rule_gives_the_same():
    found = metrics(distinct(30, 150), np.arange(150) // 5)
    assert tuple(found.by_ties) == TIES
    for other in found.others:
        assert (other.i2t.medr, other.t2i.medr) == (found.i2t.medr, found.t2i.medr)
        assert [*other.i2t.recalls, other.i2t.meanr, *other.t2i.recalls, other.t2i.meanr] == pytest.approx(
            [*found.i2t.recalls, found.i2t.meanr, *found.t2i.recalls, found.t2i.meanr], abs=1e-9
        )


@pytest.mark.parametrize("ties", TIES)
def test_metrics_carry_those_of_the_other_rules(ties: str):
    owner = np.array([0, 0, 1, 2, 3, 3])
    score = np.random.default_rng(2).integers(0, 2, (4, 6)).astype(np.float32)
    found = metrics(score, owner, ties=ties)
    assert found.ties == ties
    assert {other.ties for other in found.others} == set(TIES) - {ties}
    parts = fold_metrics(score, owner, 2, ties=ties)
    mean = average(parts)
    for rule in TIES:
        alone = metrics(score, owner, ties=rule)
        assert (found.by_ties[rule].i2t, found.by_ties[rule].t2i) == (alone.i2t, alone.t2i)
        assert mean.by_ties[rule].ties == rule
        folds = fold_metrics(score, owner, 2, ties=rule)
        assert mean.by_ties[rule].rsum == pytest.approx(np.mean([part.rsum for part in folds]))
        assert mean.by_ties[rule].t2i.meanr == pytest.approx(np.mean([part.t2i.meanr for part in folds]))
    assert len({round(one.rsum, 6) for one in found.by_ties.values()}) == 4


@pytest.mark.parametrize("passes", [1, 4, 100])
@pytest.mark.parametrize("levels", [2, 3, 9])
def test_what_is_counted_on_a_device_is_counted_alike(passes, levels, monkeypatch):
    score = np.random.default_rng(0).integers(0, levels, (7, 11)).astype(np.float32)  # many ties
    owner = np.array([0, 2, 1, 5, 2, 0, 1, 6, 2, 5, 1])  # 3 and 4 have no caption
    monkeypatch.setattr(counting, "_COUNTED", 7 * 11 // passes)
    expected, found = counting._on_host(score, owner), counting._on_device(torch.from_numpy(score), owner)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    score[4, 3] = np.nan
    with pytest.raises(ValueError, match="image 4 and caption 3 is NaN"):
        counting._on_device(torch.from_numpy(score), owner)


def test_more_rows_than_one_byte_counts():
    """Ties at and around the right image, in a matrix of several passes."""
    score, owner = np.zeros((700, 701), np.float32), np.append(np.arange(700), 350)
    found = ranks(score, owner, "published")
    assert found.t2i.tolist() == [699 - image for image in owner]
    assert found.i2t.tolist() == [700 - image if image != 350 else 0 for image in range(700)]


def test_ragged_positives_and_images_without_captions():
    """Image 1 has no caption: it asks nothing but can stand above a right image."""
    score = np.array(
        [[0.9, 0.2, 0.3, 0.1], [0.1, 0.8, 0.9, 0.4], [0.3, 0.5, 0.6, 0.2]], np.float32
    )  # fmt: skip
    found = ranks(score, [0, 2, 2, 2])
    assert found.images.tolist() == [0, 2]
    assert found.i2t.tolist() == [0, 0]
    assert found.t2i.tolist() == [0, 1, 1, 1]
    both = metrics(score, [0, 2, 2, 2])
    assert (both.i2t.queries, both.t2i.queries, both.images, both.captions) == (2, 4, 3, 4)


def test_right_captions_do_not_push_each_other_down():
    score = np.array([[0.5, 0.5, 0.5, 0.1], [0.0, 0.0, 0.0, 0.2]], np.float32)
    assert ranks(score, [0, 0, 0, 1]).i2t.tolist() == [0, 0]
    assert ranks(score, [0, 0, 1, 1], "pessimistic").i2t.tolist() == [1, 0]
    assert ranks(score, [0, 0, 1, 1], "optimistic").i2t.tolist() == [0, 0]


def test_a_constant_scorer_earns_nothing():
    owner = np.arange(100) // 5
    constant = metrics(np.full((20, 100), 0.5, np.float32), owner)
    assert constant.rsum == 0
    assert (constant.i2t.medr, constant.t2i.medr) == (96, 20)
    assert metrics(np.full((20, 100), 0.5, np.float32), owner, ties="optimistic").rsum == 600
    large = ranks(np.zeros((700, 700), np.float32), np.arange(700))
    assert set(large.i2t) == set(large.t2i) == {699}


def test_folds_are_consecutive_images_with_their_own_captions():
    score = distinct(20, 100)
    owner = np.arange(100) // 5
    parts = fold_metrics(score, owner, 5)
    for fold, part in enumerate(parts):
        i2t, t2i = published(score[4 * fold : 4 * fold + 4, 20 * fold : 20 * fold + 20])
        assert part.i2t.recalls == pytest.approx([100.0 * np.mean(i2t < k) for k in (1, 5, 10)], rel=1e-12)
        assert part.t2i.meanr == pytest.approx(t2i.mean() + 1)
        assert (part.images, part.captions) == (4, 20)
    mean = average(parts)
    assert mean.rsum == pytest.approx(np.mean([part.rsum for part in parts]))
    assert mean.i2t.medr == pytest.approx(np.mean([part.i2t.medr for part in parts]))
    assert mean.t2i.meanr == pytest.approx(np.mean([part.t2i.meanr for part in parts]))
    assert (mean.images, mean.captions, mean.t2i.queries) == (4, 20, 20)


def test_folds_rank_ties_as_asked():
    score, owner = np.zeros((40, 200), np.float32), np.arange(200) // 5
    assert [part.rsum for part in fold_metrics(score, owner, 2)] == [0, 0]
    assert [part.rsum for part in fold_metrics(score, owner, 2, ties="optimistic")] == [600, 600]


def test_folds_do_not_need_captions_in_image_order():
    score, owner = distinct(20, 100), np.arange(100) // 5
    shuffle = np.random.default_rng(3).permutation(100)
    assert fold_metrics(score[:, shuffle], owner[shuffle], 4) == fold_metrics(score, owner, 4)


def test_chance_is_what_random_scores_reach():
    rng = np.random.default_rng(0)
    owner = np.sort(rng.integers(0, 30, 60))
    drawn = [ranks(rng.random((30, 60)), owner) for _ in range(400)]
    found = metrics(rng.random((30, 60)), owner)
    for side in ("i2t", "t2i"):
        rank = np.array([getattr(one, side) for one in drawn])
        reached = [100 * np.mean(rank < k) for k in (1, 5, 10)]
        np.testing.assert_allclose(reached, getattr(found, side).chance, atol=1.5)
    small = metrics(distinct(4, 8), np.arange(8) // 2)
    assert small.t2i.chance == (25.0, 100.0, 100.0)
    assert small.i2t.chance[0] == 25.0


@pytest.mark.parametrize("bad, word", [(np.nan, "NaN"), (np.inf, "infinite"), (-np.inf, "infinite")])
def test_nan_scores_are_refused_by_name(bad, word):
    score = distinct(130, 10)
    score[101, 3] = bad
    with pytest.raises(ValueError, match=f"image 101 and caption 3 is {word}"):
        ranks(score, np.arange(10))


@pytest.mark.filterwarnings("error")
def test_nan_for_a_right_pair_is_refused_without_a_warning_of_numpy():
    with pytest.raises(ValueError, match="image 0 and caption 0 is NaN"):
        metrics(np.full((3, 3), np.nan), np.arange(3))


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: ranks(np.zeros((3, 4)), [0, 1, 2]), ValueError, r"caption_to_image must be \[T\] with T = 4"),
        (lambda: ranks(np.zeros((3, 4)), [0, 1, 2, 3]), ValueError, r"must lie in 0 \.\.\. 2, got 0 \.\.\. 3"),
        (lambda: ranks(np.zeros((3, 4)), [0, 1, 2, -1]), ValueError, "must lie in"),
        (lambda: ranks(np.zeros((3, 4)), [0.0, 1, 2, 1]), TypeError, "must hold integers"),
        (lambda: ranks(np.zeros((3, 4), np.int64), [0, 1, 2, 1]), TypeError, "must be floating point"),
        (lambda: ranks(np.zeros(3), [0]), ValueError, r"must be \[I, T\]"),
        (lambda: ranks(np.zeros((3, 0)), []), ValueError, "at least one pair"),
        (lambda: ranks(np.zeros((1, 1)), [0], "mean"), ValueError, "ranks: ties must be one of"),
        (lambda: ranks(np.zeros((1, 1)), [0], "expected"), ValueError, "no single rank"),
        (lambda: metrics(np.zeros((1, 1)), [0], ties="mean"), ValueError, "metrics: ties must be one of"),
        (lambda: fold_metrics(np.zeros((1, 1)), [0], 1, ties="mean"), ValueError, "fold_metrics: ties must be one of"),
        (lambda: fold_metrics(np.zeros((7, 7)), np.arange(7), 5), ValueError, "7 images do not divide into 5"),
        (lambda: fold_metrics(np.zeros((4, 2)), [0, 1], 2), ValueError, r"fold 1 \(2:4\)"),
    ],
)
def test_refusals(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_best_items_orders_and_breaks_ties():
    row = np.random.default_rng(2).permutation(500).astype(np.float32)
    np.testing.assert_array_equal(best_items(row, 20), np.argsort(row)[::-1][:20])
    np.testing.assert_array_equal(best_items(row, 900), np.argsort(row)[::-1])
    tied = np.zeros(50, np.float32)
    assert best_items(tied, 3).tolist() == [0, 1, 2]
