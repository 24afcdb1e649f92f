"""sets.h, chunks and windows.h on their own: how sets of rows are counted, cut and packed."""

import itertools

import numpy as np
import pytest
from white_box import blocks, box, draws

__all__ = ["blocks", "box"]  # fixtures

EDGE = [0, 3, 5, 5, 14, 16]  # the bounds of five sets; one is empty


def test_sets_are_cut_into_chunks(box):
    assert box.chunks(EDGE, 5) == [(0, 3, 0, 5), (3, 4, 5, 9), (4, 5, 14, 2)]  # one set may be too large
    assert box.chunks(EDGE, 100) == [(0, 5, 0, 16)]
    assert box.chunks(EDGE, 1) == [(k, k + 1, EDGE[k], EDGE[k + 1] - EDGE[k]) for k in range(5)]
    assert box.chunks([0], 5) == []


def test_images_are_sets_of_their_valid_regions(box):
    assert box.regions(3, 4, None) == ([0, 4, 8], [0, 4, 8, 12], 4)
    assert box.regions(3, 4, [2, 4, 1]) == ([0, 4, 8], [0, 2, 6, 7], 4)
    assert box.regions(0, 4, None) == ([], [0], 0)


def test_captions_are_sets_of_words(box):
    assert box.captions(EDGE) == (EDGE[:-1], EDGE, 9)


def test_every_row_can_be_a_set(box):
    assert box.single_rows(3) == ([0, 1, 2], [0, 1, 2, 3], 1)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("bytes_", [1, 30_000, 1 << 20])
def test_windows_hold_every_set_once_as_columns(blocks, bytes_, threads):
    """Chunks follow each other; a window holds as many as its bytes allow, a narrow chunk counted as a whole one."""
    lengths = np.random.default_rng(0).integers(1, 30, 40)
    edge = [0, *np.cumsum(lengths).tolist()]
    D, columns = 7, 50
    rows = draws(blocks, edge[-1], D)
    found = blocks.windows(rows, edge, bytes_, columns, threads)
    next_set = 0
    for first, last, values in itertools.chain.from_iterable(found):
        assert first == next_set
        next_set = last
        assert np.array_equal(np.reshape(values, (D, -1)), rows[edge[first] : edge[last]].T)
    assert next_set == len(lengths)
    whole = 224 * 4 * D  # bytes of a whole chunk
    most = max(1, bytes_ // whole)
    assert {len(window) for window in found[:-1]} <= {most}
    assert len(found[-1]) <= most
