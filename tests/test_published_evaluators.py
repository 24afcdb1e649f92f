"""`i2t` and `t2i` of the drop-in modules against the published evaluators."""

import numpy as np
import pytest

from itm_fast.evaluation import ranking
from itm_fast.evaluation.counting import count
from itm_fast.models import scan, sgraf


def published(sims, side):
    """`i2t` and `t2i` of the published evaluators, with a stable sort."""
    table = sims if side == "i2t" else sims.T
    ranks, top = np.zeros(len(table)), np.zeros(len(table))
    for index, row in enumerate(table):
        order = np.argsort(row, kind="stable")[::-1]
        right = range(5 * index, 5 * index + 5) if side == "i2t" else [index // 5]
        ranks[index] = min(np.where(order == item)[0][0] for item in right)
        top[index] = order[0]
    recalls = [100.0 * len(np.where(ranks < k)[0]) / len(ranks) for k in (1, 5, 10)]
    return (*recalls, np.floor(np.median(ranks)) + 1, ranks.mean() + 1), (ranks, top)


@pytest.mark.parametrize("side", ["i2t", "t2i"])
@pytest.mark.parametrize("module", [scan, sgraf], ids=["scan", "sgraf"])
def test_published_evaluators_with_ties(module, side):
    sims = np.random.default_rng(0).integers(0, 4, (13, 65)).astype(np.float64)
    sims[np.arange(65) // 5, np.arange(65)] += np.random.default_rng(1).integers(0, 2, 65)
    summary, (ranks, top) = published(sims, side)
    images = np.zeros((13, 2, 3))
    found = getattr(module, side)(images, None, None, sims, return_ranks=True)
    assert found[0] == pytest.approx(summary, rel=1e-12)
    for mine, theirs in zip(found[1], (ranks, top), strict=True):
        assert mine.dtype == np.float64
        np.testing.assert_array_equal(mine, theirs)
    assert getattr(module, side)(images, None, None, sims) == found[0]


def test_published_evaluators_refuse_what_would_give_a_wrong_number():
    for shape in ((10, 2), (2, 8), (3, 10)):
        with pytest.raises(ValueError, match=r"sims must be \[N, 5 N\] = \[2, 10\] for 2 images, got "):
            scan.i2t(np.zeros((2, 1, 1)), None, None, np.zeros(shape))
    sims = np.zeros((2, 10))
    sims[1, 3] = np.nan
    with pytest.raises(ValueError, match="image 1 and caption 3 is NaN"):
        scan.t2i(np.zeros((2, 1, 1)), None, None, sims)


@pytest.mark.parametrize("side", ["i2t", "t2i"])
def test_scores_are_counted_once(monkeypatch, side):
    counted = []
    monkeypatch.setattr(ranking, "count", lambda *given: counted.append(given) or count(*given))
    getattr(sgraf, side)(np.zeros((4, 2, 3)), None, None, np.eye(20)[:4], return_ranks=True)
    assert len(counted) == 1
