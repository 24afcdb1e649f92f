"""Tallies of sets of blocks: saved, loaded and merged in any way they are the tally of all blocks."""

from __future__ import annotations

import io
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from itm_fast.evaluation.counters import BandExceeded
from itm_fast.evaluation.counting import count
from itm_fast.evaluation.ranking import fold_metrics
from itm_fast.evaluation.rankings import rankings_of
from itm_fast.evaluation.tally import Asked, Tally

from .test_counting import require_equal

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


def test_the_band_must_hold_every_right_pair():
    """A tally without a band refuses other bits; so do merged ones of which one had no band."""
    _, score, _, blocks, empty = example(3, band=0.25)
    wide, narrow = empty(), empty(0)
    for number in range(len(blocks)):
        try:
            add(narrow, score, blocks, number)
        except BandExceeded:
            narrow = empty(0)
            add(wide, score, blocks, number)
    wide.merge(narrow)
    assert wide.done.sum() < len(blocks)
    with pytest.raises(BandExceeded, match=r"differs by 0\.125 between two blocks, by more than the 0 that was"):
        wide.counters[0].pool()
    assert narrow.widened(0.01).counters[0].band == 0.01
    assert 0 < narrow.widened(0).counters[0].band < 1e-5


def test_tallies_that_do_not_add_up_are_refused():
    _, score, owner, blocks, empty = example()
    one, other = empty(), empty()
    for number in (0, 1, 2):
        add(one, score, blocks, number)
    with pytest.raises(ValueError, match="block 1 has been counted already"):
        add(one, score, blocks, 1)
    with pytest.raises(ValueError, match=r"blocks 3-\d+ of \d+ have not been scored"):
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
