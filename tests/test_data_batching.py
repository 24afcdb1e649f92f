"""Training and encoding batches."""

import re
import warnings

import numpy as np
import pytest
import torch

from itm_fast.data import (
    Rows,
    Split,
    TrainingBatches,
    Vocabulary,
    caption_batches,
    encode_caption,
    image_batches,
)

pytestmark = pytest.mark.filterwarnings("ignore:NLTK's punkt")

RNG = np.random.default_rng(0)
FEATURES = RNG.standard_normal((6, 3, 5)).astype(np.float16)
COUNTS = [3, 1, 2, 3, 3, 2]
REAL = FEATURES.astype(np.float32)
for row, n in enumerate(COUNTS):
    FEATURES[row, n:], REAL[row, n:] = np.nan, 0  # what lies beyond an image's regions must never reach a model
WORDS = ["a", "the", "red", "big", "cat", "dog", "sits", "runs"]
CAPTIONS = [" ".join(RNG.choice(WORDS, n)) for n in RNG.integers(0, 9, 17)]
VOCABULARY = Vocabulary.build(CAPTIONS, min_count=2)
SPLIT = Split(FEATURES, CAPTIONS, RNG.integers(0, 6, 17), region_lengths=COUNTS)


def captions_of(batches):
    return [batch.caption_index.tolist() for batch in batches]


def test_every_caption_once_with_its_own_image():
    seen = []
    for batch in TrainingBatches(SPLIT, VOCABULARY, 4, seed=3).epoch(0):
        assert batch.features.dtype == torch.float32
        assert batch.ids.dtype == batch.image_index.dtype == batch.caption_index.dtype == torch.int64
        assert batch.lengths == sorted(batch.lengths, reverse=True)
        assert batch.ids.shape == (len(batch.lengths), batch.lengths[0])
        for b, t in enumerate(batch.caption_index.tolist()):
            ids = encode_caption(CAPTIONS[t], VOCABULARY)
            assert batch.ids[b].tolist() == ids + [0] * (batch.lengths[0] - len(ids))
            assert batch.lengths[b] == len(ids)
            image = SPLIT.caption_to_image[t]
            assert batch.image_index[b] == image
            assert np.array_equal(batch.features[b].numpy(), REAL[image])
            assert batch.region_lengths[b] == SPLIT.region_lengths[image]
        seen += batch.caption_index.tolist()
    assert sorted(seen) == list(range(17))


def test_number_of_batches():
    for size, count in ((4, 5), (17, 1), (100, 1), (1, 17)):
        batches = TrainingBatches(SPLIT, VOCABULARY, size)
        assert len(batches) == len(list(batches.epoch(0))) == count


def test_order_depends_on_seed_and_epoch_alone():
    batches = TrainingBatches(SPLIT, VOCABULARY, 4, seed=3)
    first, second = captions_of(batches.epoch(0)), captions_of(batches.epoch(1))
    assert first != second
    assert captions_of(TrainingBatches(SPLIT, VOCABULARY, 4, seed=3).epoch(1)) == second
    assert captions_of(TrainingBatches(SPLIT, VOCABULARY, 4, seed=4).epoch(1)) != second
    # Seeds and epochs are not added up: seed 3 epoch 1 differs from seed 4 epoch 0.
    assert captions_of(TrainingBatches(SPLIT, VOCABULARY, 4, seed=4).epoch(0)) != second


def test_a_resumed_epoch_continues_where_it_stopped():
    batches = TrainingBatches(SPLIT, VOCABULARY, 4, seed=3)
    whole = captions_of(batches.epoch(2))
    assert captions_of(TrainingBatches(SPLIT, VOCABULARY, 4, seed=3).epoch(2, first_step=3)) == whole[3:]
    assert captions_of(batches.epoch(2, first_step=5)) == []


def test_without_region_lengths():
    split = Split(np.ones((6, 3, 5)), CAPTIONS, SPLIT.caption_to_image)
    assert next(TrainingBatches(split, VOCABULARY, 4).epoch(0)).region_lengths is None
    assert next(image_batches(split, 4))[1] is None


def test_image_batches():
    batches = list(image_batches(SPLIT, 4))
    assert [len(features) for features, _ in batches] == [4, 2]
    assert np.array_equal(torch.cat([f for f, _ in batches]).numpy(), REAL)
    assert torch.cat([n for _, n in batches]).tolist() == COUNTS


def padded(name="split"):
    features = RNG.standard_normal((6, 3, 5)).astype(np.float32)
    for row, n in enumerate([3, 1, 2, 3, 3, 0]):  # the last image has nothing but zeros
        features[row, n:] = 0
    features[0, 1] = 0  # a region of zeros inside is no padding
    return Split(features, CAPTIONS, SPLIT.caption_to_image, name=name)


@pytest.mark.parametrize("batches", [image_batches, lambda s, n: TrainingBatches(s, VOCABULARY, n).epoch(0)])
def test_regions_of_zeros_are_warned_of_once(batches):
    for size in (17, 1):
        split = padded("here")
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            list(batches(split, size)), list(batches(split, size))
        assert len(told) == 1
        assert re.match("here: [0-9]+ of [0-9]+ images read end in regions of zeros", str(told[0].message))
        assert "--mask-zero-regions" in str(told[0].message)
    with pytest.warns(UserWarning, match="here: 3 of 6 images read end in regions of zeros"):
        list(image_batches(padded("here"), 17))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        list(batches(padded().mask_zero_regions(), 4))
        list(batches(SPLIT, 4))


def test_regions_of_zeros_at_the_end_are_masked():
    split = padded()
    split.boxes, split.image_ids, split.caption_ids = Rows(np.ones((6, 3, 4))), np.arange(6), np.arange(17)
    masked = split.mask_zero_regions()
    for kept in ("boxes", "image_ids", "caption_ids", "caption_to_image"):
        assert getattr(masked, kept) is getattr(split, kept)
    assert masked.region_lengths.dtype == np.int32
    assert split.region_lengths is None
    assert masked.region_lengths.tolist() == [3, 1, 2, 3, 3, 1]
    assert torch.cat([n for _, n in image_batches(masked, 4)]).tolist() == [3, 1, 2, 3, 3, 1]
    assert np.array_equal(masked.features[:], split.features[:])
    assert masked.captions == split.captions
    assert SPLIT.mask_zero_regions() is SPLIT
    many = Split(np.eye(300, dtype=np.float32)[:, :, None].cumsum(1)[:, ::-1], ["a"], [0])  # image i: its first 300 - i
    assert many.mask_zero_regions().region_lengths.tolist() == [300 - i for i in range(300)]


def test_caption_batches():
    seen, all_lengths = [], []
    for index, ids, lengths in caption_batches(CAPTIONS, VOCABULARY, 4):
        assert ids.dtype == index.dtype == torch.int64
        for b, t in enumerate(index.tolist()):
            assert ids[b, : lengths[b]].tolist() == encode_caption(CAPTIONS[t], VOCABULARY)
            assert not ids[b, lengths[b] :].any()
        seen += index.tolist()
        all_lengths += lengths
    assert sorted(seen) == list(range(17))
    assert all_lengths == sorted(all_lengths, reverse=True)


def test_bad_sizes_are_refused():
    for make in (
        lambda: TrainingBatches(SPLIT, VOCABULARY, 0),
        lambda: next(image_batches(SPLIT, 0)),
        lambda: next(caption_batches(CAPTIONS, VOCABULARY, -1)),
    ):
        with pytest.raises(ValueError, match="batch_size must be at least 1"):
            make()
    with pytest.raises(ValueError, match="seed must be at least 0, got -1"):
        TrainingBatches(SPLIT, VOCABULARY, seed=-1)
