"""Tallies of sets of blocks: saved, loaded and merged in any way they are the tally of all blocks."""

from __future__ import annotations

import io
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from itm_fast.evaluation import memory
from itm_fast.evaluation.block_scores import score_blocks
from itm_fast.evaluation.counted import part_of
from itm_fast.evaluation.counters import BandExceeded
from itm_fast.evaluation.counting import count
from itm_fast.evaluation.matrix_free import blocks_of
from itm_fast.evaluation.ranking import fold_metrics
from itm_fast.evaluation.rankings import rankings_of
from itm_fast.evaluation.tally import Asked, Tally

from .test_counting import Levels, require_equal, small_integers

quick = settings(deadline=None, max_examples=25, database=None, derandomize=True)


def again(tally: Tally) -> Tally:
    """Through a file."""
    file = io.BytesIO()
    tally.save(file)
    file.seek(0)
    return Tally.load(file)


def cut(rng: np.random.Generator, images: int, captions: int) -> list[tuple[int, int, np.ndarray]]:
    columns = np.split(rng.permutation(captions), np.unique(rng.integers(1, captions + 1, 2)))
    edges = np.unique([0, *rng.integers(0, images + 1, 2), images])
    return [(a, b, c) for a, b in zip(edges, edges[1:], strict=False) for c in columns if len(c)]


def example(seed: int = 0, images: int = 6, captions: int = 11, systems: int = 1, band: float = 0.0, **asked):
    """Scores [systems, I, T], their owners, blocks, and an empty tally whose right pairs are up to `band` off."""
    rng = np.random.default_rng(seed)
    score = (rng.integers(0, 3, (systems, images, captions)) / 4).astype(np.float32)
    score += (band / 2 * rng.integers(-2, 3, score.shape)).astype(np.float32)
    owner = rng.permutation(np.concatenate([np.arange(images), rng.integers(0, images, max(captions - images, 0))]))
    owner = owner[:captions]
    blocks = cut(rng, images, captions)
    right = score[:, owner, np.arange(captions)]
    right = right + (band / 2 * rng.integers(-1, 2, right.shape)).astype(np.float32)

    def empty(band: float = band) -> Tally:
        return Tally(right, owner, images, len(blocks), Asked(**asked), {"data": "a"}, band * 0.6)

    return rng, score, owner, blocks, empty


def add(tally: Tally, score: np.ndarray, blocks: list, number: int) -> None:
    first, stop, captions = blocks[number]
    tally.add(number, first, [(captions, [one[first:stop, captions] for one in score])])


@quick
@given(
    st.integers(1, 3), st.integers(1, 4), st.integers(0, 20), st.integers(1, 3), st.integers(1, 4),
    st.sampled_from([0.0, 1e-6, 0.25]), st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_any_division_of_the_blocks_adds_up_to_the_matrix(folds, of_a_fold, more, systems, processes, band, seed):
    """Right pairs whose scores were computed in other blocks, interruptions, and processes that are merged in turn."""
    images = folds * of_a_fold
    rng, score, owner, blocks, empty = example(seed, images, images + more, systems, band, folds=folds, best=3)
    tallies = [empty() for _ in range(processes)]
    for number in rng.permutation(len(blocks)):
        mine = rng.integers(processes)
        add(tallies[mine], score, blocks, number)
        if rng.random() < 0.3:
            tallies[mine] = again(tallies[mine])
    whole = again(tallies[0])
    for one in tallies[1:]:
        whole.merge(again(one))
    for found, matrix in zip(rankings_of(whole), score, strict=True):
        require_equal(found.counts, count(matrix, owner, "test"))
        assert found.fold_metrics() == fold_metrics(matrix, owner, folds)
        np.testing.assert_array_equal(found.best["i2t"][0], np.argsort(-matrix, axis=1, kind="stable")[:, :3])
        np.testing.assert_array_equal(found.best["t2i"][0], np.argsort(-matrix.T, axis=1, kind="stable")[:, :3])


def test_a_part_must_hold_its_right_pairs_in_its_band():
    _, score, _, blocks, empty = example(3, band=0.25)
    narrow, own = empty(0), np.arange(score.shape[2])
    off = np.flatnonzero(narrow.right[0] != score[0][narrow.owner, own])[0]
    number = next(k for k, (a, b, captions) in enumerate(blocks) if off in captions and a <= narrow.owner[off] < b)
    with pytest.raises(BandExceeded, match=r"differs by 0\.125 between two blocks, by more than the 0 that was"):
        add(narrow, score, blocks, number)
    assert narrow.widened(0.01).band == 0.01
    assert 0 < narrow.widened(0).band < 1e-5


@quick
@given(st.integers(1, 3), st.integers(1, 4), st.integers(0, 20), st.sampled_from([0, 0.2]), st.integers(0, 2**32 - 1))
def test_parts_with_other_bands_are_merged(folds, of_a_fold, more, narrow, seed):
    """A right pair that has left the narrower band has the score that was computed first, in the middle of both."""
    images = folds * of_a_fold
    rng, score, owner, blocks, _ = example(seed, images, images + more, folds=folds)
    every = np.arange(len(owner))
    right = score[0, owner, every] + (rng.integers(-2, 3, len(owner)) / 8).astype(np.float32)
    wide, other = (Tally([right], owner, images, len(blocks), Asked(folds), None, band) for band in (0.3, narrow))
    left = np.abs(score[0, owner, every] - right) > narrow
    for number in rng.permutation(len(blocks)):
        first, stop, captions = blocks[number]
        has_left = left[captions[(owner[captions] >= first) & (owner[captions] < stop)]].any()
        add(wide if has_left or rng.random() < 0.5 else other, score, blocks, number)
    wide.merge(other)
    (found,) = rankings_of(wide)
    score[0, owner[left], every[left]] = right[left]
    require_equal(found.counts, count(score[0], owner, "test"))
    assert found.fold_metrics() == fold_metrics(score[0], owner, folds)


def test_parts_are_merged_of_a_scorer_whose_bits_depend_on_the_block(monkeypatch):
    monkeypatch.setitem(memory._BLOCK, "cpu", (4, 6))
    rng = np.random.default_rng(0)
    owner = rng.integers(0, 10, 30)
    scorer, encoded = Levels(), small_integers(rng, 10, 30, 4, owner)
    tallies, matrix = [], np.zeros((10, 30), np.float32)
    with blocks_of([scorer], [encoded]) as blocks:
        for k, noise in ((1, 0.0), (2, 1e-3)):
            scorer.factor = 1.0
            begun, numbers = blocks.begin(), part_of(blocks.plan.blocks, (k, 2))
            scorer.factor = 1 + noise
            tallies.append(blocks.all(begun, numbers, progress=False))
            for _, rows, columns, (score,) in score_blocks(blocks.members, numbers):
                for captions, (part,) in blocks._pieces(columns, [score]):
                    matrix[rows, captions] = part
    first, second = tallies
    assert first.band < second.band
    right = first.right[0]
    left = matrix[owner, np.arange(30)] != right
    assert 0 < left.sum() < 30
    first.merge(second)
    matrix[owner, np.arange(30)] = right
    require_equal(rankings_of(first)[0].counts, count(matrix, owner, "test"))


def test_tallies_that_do_not_add_up_are_refused():
    _, score, owner, blocks, empty = example()
    one, other = empty(), empty()
    for number in (0, 1, 2):
        add(one, score, blocks, number)
    with pytest.raises(ValueError, match="block 1 has been counted already"):
        add(one, score, blocks, 1)
    with pytest.raises(ValueError, match=r"not scored yet: blocks 3-\d+ of \d+"):
        rankings_of(one)
    add(other, score, blocks, 2)
    with pytest.raises(ValueError, match="both have block 2"):
        one.merge(other)
    other = empty()
    other.identity["data"] = "b"
    with pytest.raises(ValueError, match="evaluations with other data"):
        one.merge(other)
    other = Tally(score[:, owner, np.arange(11)] + np.float32(1), owner, 6, len(blocks), None, {"data": "a"})
    with pytest.raises(ValueError, match="another kind of processor"):
        one.merge(other)
    other = Tally(score[:, owner, np.arange(11)], owner, 6, 99, None, {"data": "a"})
    with pytest.raises(ValueError, match="other blocks or scorers"):
        one.merge(other)


def test_a_block_that_is_half_in_is_not_saved(tmp_path):
    _, score, _, blocks, empty = example()
    tally = empty()

    def pieces():
        yield blocks[0][2][:1], [score[0][blocks[0][0] : blocks[0][1], blocks[0][2][:1]]]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tally.add(0, 0, pieces())
    with pytest.raises(ValueError, match="a block was interrupted"):
        tally.save(tmp_path / "x.npz")
    assert not list(tmp_path.iterdir())


def test_damaged_files_are_refused_and_nothing_is_unpickled(tmp_path):
    path = tmp_path / "x.npz"
    example()[4]().save(path)
    assert Tally.load(path).identity == {"data": "a"}
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"x\.npz is not a snapshot of an evaluation, or is damaged"):
        Tally.load(path)
    path.write_bytes(b"\x80\x04K\x01.")  # a pickle
    with pytest.raises(ValueError, match="not a snapshot"):
        Tally.load(path)
    np.savez(path, about=np.array([{}], object))
    with pytest.raises(ValueError, match="not a snapshot"):
        Tally.load(path)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("about.npy", b"")
    with pytest.raises(ValueError, match="not a snapshot"):
        Tally.load(path)
