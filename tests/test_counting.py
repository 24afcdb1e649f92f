"""Counts of blocks in any order, and ranks without the matrix, against ranking the whole matrix."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import subprocess
import sys
from unittest import mock

import numpy as np
import pytest
import torch
from cpu_cases import needs_cpu
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

import itm_fast
from itm_fast.evaluation import (
    Encoded,
    block_scores,
    fold_metrics,
    matrix_free,
    memory,
    metrics,
    plan_for,
    rank_all,
    ranks,
    score_all,
)
from itm_fast.evaluation import counters as counters_module
from itm_fast.evaluation.best import best_items
from itm_fast.evaluation.counters import Counters
from itm_fast.evaluation.counting import Counts, count
from itm_fast.evaluation.distinct import first_of_equal_embeddings
from itm_fast.evaluation.tally import Tally
from itm_fast.nn import CrossAttentionScore, PairScorer

from .test_evaluation_scoring import Scorer, random_encoded, with_copies

quick = settings(deadline=None, max_examples=40, database=None, derandomize=True)


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
    owner = (np.arange(captions) >= captions - 2).astype(np.int64)
    score = np.zeros((images, captions), np.float32)
    score[owner, np.arange(captions)] = -1
    counters = Counters(score[owner, np.arange(captions)], owner, images)
    counters.add(score, 0, np.arange(captions))
    require_equal(counters.pool(), count(score, owner, "test"))


class Levels(PairScorer):
    """The first region times the first word: small integers, whose scores are exact in any block, and often equal."""

    def __init__(self, factor: float = 1.0, by_block: float = 0.0):
        super().__init__()
        self.factor, self.by_block = factor, by_block  # by_block > 0: other last bits in blocks of another shape

    def score(self, image_state, words, cu_seqlens, caption_state, region_lengths=None):
        found = self.factor * (image_state[0][:, 0] @ words[cu_seqlens[:-1].long()].T)
        return found * (1 + self.by_block * ((len(words) + 3 * len(image_state[0])) % 7))


def small_integers(rng: np.random.Generator, images: int, captions: int, levels: int, owner: np.ndarray) -> Encoded:
    lengths = torch.from_numpy(rng.integers(1, 4, captions))
    edges = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int()
    values = [torch.from_numpy(rng.integers(0, levels, (n, 2))).float() for n in (images, int(edges[-1]))]
    return Encoded(values[0][:, None], None, values[1], edges, owner)


def matrices(scorers, encoded) -> list[np.ndarray]:
    """The score matrices, and with several their mean, as `evaluate` has them."""
    scores = [score_all(scorer, one, progress=False) for scorer, one in zip(scorers, encoded, strict=True)]
    if len(scores) == 1:
        return scores
    total = scores[0].copy()
    for score in scores[1:]:
        total += score
    total /= len(scores)
    return [*scores, total]


@contextlib.contextmanager
def counted_on_device():
    """The CPU is the device; nothing but tensors is compared with the bands."""
    real = counters_module._around

    def around(block, *given):
        assert isinstance(block, torch.Tensor)
        return real(block, *given)

    with (
        mock.patch.object(matrix_free, "_on_device", return_value=True),
        mock.patch.object(matrix_free, "_same_bits", return_value=False),
        mock.patch.object(counters_module, "_around", around),
    ):
        yield


@quick
@given(
    st.integers(1, 4), st.integers(1, 4), st.integers(0, 30), st.integers(1, 4), st.integers(1, 3),
    st.tuples(st.integers(1, 7), st.integers(1, 7)), st.integers(1, 5), st.integers(1, 9),
    st.sampled_from([0, 3e-7, 1e-3]), st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_ranks_without_the_matrix_are_those_of_the_matrix(
    folds, images_of_a_fold, more_captions, levels, members, block, group, k, by_block, seed
):
    """Equal scores, equal captions, images without captions, folds across blocks, up to three scorers, and scores that
    depend on the block, by as much as they differ otherwise."""
    rng = np.random.default_rng(seed)
    images = folds * images_of_a_fold
    with_one = np.arange(folds) * images_of_a_fold + rng.integers(0, images_of_a_fold, folds)  # no fold without caption
    owner = rng.permutation(np.concatenate([with_one, rng.integers(0, images, more_captions)]))
    first = small_integers(rng, images, len(owner), levels, owner)
    equal = first_of_equal_embeddings(first.words, first.cu_seqlens)
    encoded = [
        dataclasses.replace(first, image=torch.from_numpy(rng.integers(0, levels, (images, 1, 2))).float(),
                            first_of_equals=equal)
        for _ in range(members)
    ]  # fmt: skip
    scorers = [Levels(float(rng.choice([1, 0.1, -3])), by_block) for _ in range(members)]
    with (
        mock.patch.dict(memory._BLOCK, cpu=block),
        mock.patch.object(block_scores, "CHUNK", 3),
        mock.patch.object(matrix_free, "_GROUP", group),
    ):
        found = rank_all(scorers, encoded, folds=folds, best=k, progress=False)
        scores = matrices(scorers, encoded)
        with counted_on_device():
            counted = rank_all(scorers, encoded, folds=folds, progress=False)
    assert len(found) == len(counted) == len(scores) == (members if members == 1 else members + 1)
    for one, again, score in zip(found, counted, scores, strict=True):
        require_equal(one.counts, count(score, owner, "test"))
        for a, b in zip((one.counts, *one.folds), (again.counts, *again.folds), strict=True):
            require_equal(a, b)
        for ties in ("pessimistic", "optimistic", "published"):
            for a, b in zip(one.ranks(ties), ranks(score, owner, ties), strict=True):
                np.testing.assert_array_equal(a, b)
        assert one.metrics(ties="expected") == metrics(score, owner, ties="expected")
        assert one.fold_metrics(ties="published") == fold_metrics(score, owner, folds, ties="published")
        for side, table in (("i2t", score), ("t2i", score.T)):
            items, values = one.best[side]
            expected = np.array([best_items(row, k) for row in table])
            np.testing.assert_array_equal(items, expected)
            np.testing.assert_array_equal(values, np.take_along_axis(table, expected, 1))


def attended(images: int = 37, captions: int = 90) -> Encoded:
    """Unit embeddings, of which some captions and some images are equal; some images have no caption."""
    plain = random_encoded(images, captions, dim=16)
    owner = np.random.default_rng(3).integers(0, images, captions)
    first = np.arange(captions)
    words = normalize(plain.words, dim=-1)
    for again in range(3, captions, 9):
        length = plain.lengths[again]
        before = np.flatnonzero(plain.lengths[:again] == length)
        if len(before):
            first[again] = first[before[0]]
            start, source = int(plain.cu_seqlens[again]), int(plain.cu_seqlens[first[again]])
            words[start : start + length] = words[source : source + length]
    assert len(set(owner)) < images
    assert len(set(first)) < captions
    image = normalize(plain.image, dim=-1)
    image[::5], plain.region_lengths[::5] = image[0], 3
    return dataclasses.replace(plain, image=image, words=words, caption_to_image=owner, first_of_equals=first)


@pytest.mark.parametrize("backend", ["reference", "torch", pytest.param("cpu", marks=needs_cpu)])
@pytest.mark.parametrize("block", [(500, 256), (9, 14)])
def test_each_backend_ranks_without_the_matrix_as_with_it(backend, block, monkeypatch):
    monkeypatch.setitem(memory._BLOCK, "cpu", block)
    encoded = attended()
    scorers = [CrossAttentionScore("t2i"), CrossAttentionScore("i2t", pool="mean")]
    begun_again = []
    real = Tally.widened
    monkeypatch.setattr(Tally, "widened", lambda self, band: begun_again.append(band) or real(self, band))
    with itm_fast.use_backend(backend):
        found = rank_all(scorers, [encoded, encoded], progress=False)
        scores = matrices(scorers, [encoded, encoded])
    assert begun_again == ([] if backend == "cpu" else [0.0])
    for one, score in zip(found, scores, strict=True):
        require_equal(one.counts, count(score, encoded.caption_to_image, "test"))
        assert one.counts.i2t.tied.any()  # by a caption of another image that is equal to the image's best one
        assert one.counts.t2i.tied.any() or backend == "torch"  # where equal images may have other last bits
    assert found[-1].fold_metrics() == []


def test_right_pairs_have_one_score_in_all_blocks(monkeypatch):
    """Scores of the same pair that differ by up to 1e-3, where different pairs differ by 0.1 or are equal."""
    monkeypatch.setitem(memory._BLOCK, "cpu", (3, 4))

    returned = []

    class NoisyLevels(Levels):
        def score(self, *given):
            found = super().score(*given)
            found += 1e-3 * torch.rand(found.shape)
            returned.append((found, found.clone()))
            return found

    edges = torch.arange(12, dtype=torch.int32)
    encoded = Encoded(torch.eye(11)[:, None], None, torch.eye(11), edges, np.arange(11))
    (found,) = rank_all(NoisyLevels(), encoded, progress=False)
    for ties in ("pessimistic", "optimistic"):
        assert not found.ranks(ties).i2t.any()
        assert not found.ranks(ties).t2i.any()
    for scores, copy in returned:
        assert torch.equal(scores, copy)  # they are the scorer's


def test_the_mean_is_rounded_as_in_the_report():
    """Of two neighbouring numbers, a third of each is the same in float32."""
    lower = np.float32(1.6)
    while np.nextafter(lower, np.float32(2)) / np.float32(3) > lower / np.float32(3):
        lower = np.nextafter(lower, np.float32(2))
    words = torch.tensor([[float(lower), float(np.nextafter(lower, np.float32(2)))]])
    encoded = Encoded(torch.eye(2)[:, None], None, words, torch.tensor([0, 1], dtype=torch.int32), np.array([0]))
    found = rank_all([Levels(), Levels(0.0), Levels(0.0)], [encoded] * 3, progress=False)
    counts = [(one.counts.t2i.above.item(), one.counts.t2i.tied.item()) for one in found]
    assert counts == [(1, 0), (0, 1), (0, 1), (0, 1)]


def test_the_first_plan_decides_the_blocks_of_all_scorers(monkeypatch):
    sizes = iter([(3, 4), (2, 7)])
    encoded = random_encoded(7, 23)
    expected = rank_all([Scorer(), Scorer()], [encoded, encoded], progress=False)
    monkeypatch.setattr(memory, "_blocks", lambda *_: next(sizes))
    found = rank_all([Scorer(), Scorer()], [encoded, encoded], progress=False)
    assert next(sizes) == (2, 7)
    require_equal(found[-1].counts, expected[-1].counts)


@pytest.mark.parametrize("resident", [True, False])
def test_every_block_is_scored_once_after_the_right_pairs(resident, monkeypatch):
    monkeypatch.setitem(memory._BLOCK, "cpu", (8, 5))
    monkeypatch.setattr(matrix_free, "_GROUP", 4)
    real = matrix_free.plan_encoded
    monkeypatch.setattr(matrix_free, "plan_encoded", lambda *args: dataclasses.replace(real(*args), resident=resident))
    encoded, scorer = random_encoded(16, 23), Scorer().train()
    (found,) = rank_all(scorer, encoded, progress=False)
    assert scorer.training
    blocks = 2 * 5
    groups = 2 + 2 + 1 + 1  # four images each have 8, 7, 4 and 4 captions, and a block has up to 5
    assert scorer.calls == {"image": 16 + 2, "caption": 23 + 2, "score": blocks + groups}
    require_equal(found.counts, count(score_all(Scorer(), encoded, progress=False), encoded.caption_to_image, "test"))


def test_the_bar_counts_the_pairs_of_all_scorers(capsys):
    rank_all([Scorer(), Scorer()], [with_copies()] * 2, progress=True)
    assert "154/154" in capsys.readouterr().err


@pytest.mark.parametrize("right, device", [(True, False), (False, False), (False, True)])
def test_nan_is_refused_by_name(right, device, monkeypatch):
    monkeypatch.setattr(matrix_free, "_GROUP", 1)  # the other images' scores are not computed with right pairs
    owner = np.zeros(7, np.int64) if not right else np.arange(7)
    encoded = dataclasses.replace(random_encoded(7, 7), caption_to_image=owner)
    encoded.image[5, 1, 2] = torch.nan
    message = r"the score of image 5 and caption \d is NaN .*Not finite: that image's emb"
    with counted_on_device() if device else contextlib.nullcontext(), pytest.raises(ValueError, match=message):
        rank_all(Scorer(), encoded, progress=False)


def test_the_scratch_of_all_scorers_keeps_to_the_budget_left(monkeypatch):
    monkeypatch.setattr(memory, "_process_bytes", lambda _: 10**9)  # nothing else is freed or taken meanwhile
    encoded, scorers = random_encoded(7, 23), [Scorer(), Scorer()]
    needed = plan_for(scorers[0], encoded, memory_gb=64).total / 1e9 - 2**30 / 1e9
    rank_all(scorers, [encoded, encoded], memory_gb=needed + 0.2, progress=False)
    assert max(scorers[0].scratch | scorers[1].scratch) < 2.6e8
    with pytest.raises(ValueError, match="the least that can is"):
        rank_all(scorers, [encoded, encoded], memory_gb=needed / 2, progress=False)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(caption_to_image=np.arange(4) + 3), ValueError, r"must lie in 0 \.\.\. 3, got 3 \.\.\. 6"),
        (dict(caption_to_image=np.arange(3)), ValueError, r"must be \[T\] with T = 4"),
        (dict(caption_to_image=np.arange(4.0)), TypeError, "must hold integers"),
    ],
)
def test_captions_of_no_image_are_refused(change, error, message):
    with pytest.raises(error, match=f"rank_all: caption_to_image {message}"):
        rank_all(Levels(), dataclasses.replace(random_encoded(4, 4), **change), progress=False)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(image=torch.zeros(5, 5, 8)), "differ in number of images"),
        (dict(cu_seqlens=torch.arange(5, dtype=torch.int32)), "differ in words per caption"),
        (dict(caption_to_image=np.array([0, 1, 2, 2])), "differ in caption_to_image"),
        (dict(first_of_equals=np.array([0, 1, 1, 3])), "differ in first_of_equals"),
    ],
)
def test_encodings_of_different_splits_are_refused(change, message):
    encoded = random_encoded(4, 4)
    other = dataclasses.replace(encoded, **change)
    with pytest.raises(ValueError, match=f"rank_all: encoded splits 1 and 3 {message}; encode the same split"):
        rank_all([Levels()] * 3, [encoded, encoded, other], progress=False)


def test_scorers_without_an_encoded_split_and_folds_that_do_not_fit_are_refused():
    encoded = random_encoded(4, 4)
    with pytest.raises(ValueError, match="one encoded split per scorer is needed, got 1 for 2 scorers"):
        rank_all([Levels(), Levels()], encoded, progress=False)
    with pytest.raises(ValueError, match="rank_all: 4 images do not divide into 3 equal folds"):
        rank_all(Levels(), encoded, folds=3, progress=False)
    alone = dataclasses.replace(encoded, caption_to_image=np.zeros(4, np.int64))
    with pytest.raises(ValueError, match=r"rank_all: no caption describes an image of fold 1 \(2:4\)"):
        rank_all(Levels(), alone, folds=2, progress=False)
    (found,) = rank_all(Levels(), encoded, progress=False)
    with pytest.raises(ValueError, match="no single rank"):
        found.ranks("expected")
    with pytest.raises(ValueError, match="metrics: ties must be one of"):
        found.metrics(ties="mean")


_PEAK = """
import json, numpy as np, torch
from itm_fast.evaluation import Encoded, plan_for, rank_all
from itm_fast.nn import PairScorer

class FirstWord(PairScorer):
    peak = 0

    def score(self, image_state, words, cu_seqlens, caption_state, region_lengths=None):
        for line in open("/proc/self/status"):
            if line.startswith("RssAnon"):
                self.peak = max(self.peak, int(line.split()[1]) * 1024)
        self.least = min(getattr(self, "least", self.peak), self.peak)
        return image_state[0][:, 0] @ words.T

torch.set_num_threads(1)
I, T = 5000, 12500
encoded = Encoded(torch.randn(I, 1, 8), None, torch.randn(T, 8), torch.arange(T + 1).int(), np.arange(T) % I)
scorer = FirstWord()
with_matrix = plan_for(scorer, encoded, memory_gb=64)
least = with_matrix.total - with_matrix.workspace - I * T * 4
rank_all(scorer, encoded, folds=5, memory_gb=least / 1e9 + 0.1, progress=False)
print(json.dumps(scorer.peak - scorer.least))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_matrix_is_never_in_memory():
    """Ranks from a matrix of 250 MB, in 30 MB."""
    done = subprocess.run([sys.executable, "-c", _PEAK], capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
    assert json.loads(done.stdout) < 30e6
