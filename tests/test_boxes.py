"""The boxes of regions, from a split to the scores of a model that reads them: CMCAN."""

from __future__ import annotations

import math
import re
import warnings
from argparse import Namespace

import numpy as np
import pytest
import torch
from training_cases import DEV, WORDS, run_tiny, tiny_options

from itm_fast import Gallery
from itm_fast.data import Split, TrainingBatches, open_split
from itm_fast.data.boxes import check_boxes
from itm_fast.evaluation import score
from itm_fast.evaluation.boxes import warn_of_boxes
from itm_fast.evaluation.encoding import encode, encode_captions
from itm_fast.gallery.scoring import Captions, search_among
from itm_fast.models import Loaded, attention, build, load
from itm_fast.models._boxes import neighbours
from itm_fast.models.cmcan import ConfidenceMatching
from itm_fast.ops import hardest_negative_loss
from itm_fast.training.losses import batch_loss


def some_boxes(images, seed=0):
    corner, size = np.random.default_rng(seed).random((2, images, 36, 2), dtype=np.float32) / 2
    return np.concatenate([corner, corner + size], 2)


BOXES = some_boxes(len(DEV.features))
SPLIT = Split(DEV.features[:], DEV.captions, DEV.caption_to_image, boxes=BOXES)


@pytest.fixture
def model():
    torch.manual_seed(0)
    made = build(Namespace(**vars(tiny_options("cmcan")), vocab_size=len(WORDS), device="cpu"))
    for parameter in made.scorer.parameters():
        torch.nn.init.normal_(parameter, 0, 0.5)
    made.val_start()
    return made


def direct(model, boxes=BOXES):
    """Scores of all images and captions with the neighbours that follow from these boxes."""
    with torch.no_grad():
        image = model.img_enc(torch.from_numpy(SPLIT.features[:]))
        batch = TrainingBatches(SPLIT, WORDS, len(SPLIT.captions))._batch(np.arange(len(SPLIT.captions)))
        caption = model.txt_enc(batch.ids, batch.lengths)
        near = None if boxes is None else neighbours(torch.from_numpy(boxes))
        found = model.scorer(image, caption, batch.lengths, adjacency=near)
        return found[:, batch.caption_index.argsort()].numpy()


@pytest.mark.parametrize("counts", [None, [36, 9]])
def test_neighbours_are_the_nearest_in_four_directions(counts):
    found = neighbours(torch.from_numpy(BOXES[:2]), None if counts is None else torch.tensor(counts))
    for i, n in enumerate(counts or [36, 36]):
        x, y = ((BOXES[i, :, k] + BOXES[i, :, k + 2]) / 2 for k in (0, 1))
        want = np.eye(36)
        for r in range(n):
            nearest = {}
            for other in set(range(n)) - {r}:
                degrees = math.degrees(math.atan2(y[r] - y[other], x[other] - x[r]))
                side = "left" if abs(degrees) > 135 else "right" if abs(degrees) < 45 else degrees > 0
                nearest[side] = min(nearest.get(side, (9, 0)), (math.hypot(x[other] - x[r], y[other] - y[r]), other))
            want[r, [other for _, other in nearest.values()]] = 1
        np.testing.assert_array_equal(found[i].numpy(), want)


def test_scores_of_a_split_are_those_with_its_boxes(model):
    found = score(model, SPLIT.features[:], SPLIT.captions, WORDS, boxes=BOXES)
    np.testing.assert_allclose(found, direct(model), atol=1e-6)
    with pytest.warns(UserWarning, match=r"no boxes, so CMCAN scores without neighbours .*; write SPLIT_boxes\.npy"):
        without = score(model, SPLIT.features[:], SPLIT.captions, WORDS)
    np.testing.assert_allclose(without, direct(model, None), atol=1e-6)
    assert np.abs(found - without).max() > 1e-4
    shown = attention(model, SPLIT.features[:][2], SPLIT.captions[4], WORDS, BOXES[2])
    assert shown.score == pytest.approx(float(found[2, 4]), abs=1e-6)
    with pytest.raises(ValueError, match=r"score: boxes do not lie in the picture, .*: image 0, region 0 has "):
        score(model, SPLIT.features[:], SPLIT.captions, WORDS, boxes=BOXES * 480)
    with pytest.raises(ValueError, match=r"boxes must be \[2, 36, 4\], a box for each region, got \[2, 35, 4\]"):
        ConfidenceMatching(8, 4)(torch.zeros(2, 36, 8), torch.zeros(1, 2, 8), [2], boxes=torch.zeros(2, 35, 4))


@pytest.mark.parametrize(
    ("box", "said"),
    [
        ([0, 0, math.nan, 1], "are not finite: image 13, region 2 has [0, 0, nan, 1]"),
        ([0, 0, 640, 480], "do not lie in the picture, from 0 to 1; divide x"),
        ([0.6, 0.6, 0.3, 0.3], "end before they begin; they must be left, top, right and bottom"),
    ],
)
def test_other_boxes_are_refused_but_for_those_of_padding(box, said):
    boxes, lengths = BOXES[:5].copy(), np.full(5, 36)
    boxes[3, 2] = box
    with pytest.raises(ValueError, match=re.escape(f"dev: boxes {said}")):
        check_boxes("dev", boxes, lengths, first=10)
    lengths[3] = 2
    check_boxes("dev", boxes, lengths)
    with pytest.raises(ValueError, match="dev: all boxes of image 1 are zeros"):
        check_boxes("dev", boxes * np.array([1, 0, 1, 1, 1], np.float32)[:, None, None], lengths)


def with_boxes(boxes, name):
    return Split(DEV.features[:], DEV.captions, DEV.caption_to_image, boxes=boxes, name=name)


def test_a_split_is_checked_before_it_is_encoded(model, tmp_path, monkeypatch):
    odd = with_boxes(BOXES * np.where(np.arange(len(BOXES)) == 7, 480, 1).astype(np.float32)[:, None, None], "odd")
    monkeypatch.setattr("itm_fast.evaluation.encoding._images", None)
    wanted = "odd: boxes do not lie in the picture, .*: image 7, region 0"
    with pytest.raises(ValueError, match=wanted):
        encode(model, odd, WORDS, progress=False)
    with pytest.raises(ValueError, match=wanted):
        Gallery.build(Loaded(model, WORDS, "CMCAN"), odd, tmp_path / "g", progress=False)
    assert not (tmp_path / "g").exists()
    for dev, train in ((odd, SPLIT), (SPLIT, odd)):
        monkeypatch.setattr("training_cases.DEV", dev)
        with pytest.raises(ValueError, match=wanted):
            run_tiny(tmp_path / "run", "cmcan", train_split=train, max_steps=1)


def test_repeated_images_may_have_repeated_boxes(tmp_path):
    np.save(tmp_path / "dev_ims.npy", np.repeat(DEV.features[:2], 5, 0))
    (tmp_path / "dev_caps.txt").write_text("a cat\n" * 10)
    for boxes in (BOXES[:2], np.repeat(BOXES[:2], 5, 0)):
        np.save(tmp_path / "dev_boxes.npy", boxes)
        np.testing.assert_array_equal(open_split(tmp_path, "dev").boxes[:], BOXES[:2])


def test_boxes_may_be_numpy_arrays(model):
    image, words = torch.randn(2, 36, 8), torch.randn(1, 2, 8)
    scorer = ConfidenceMatching(8, 4).eval()
    stored = BOXES[:2].copy()
    stored.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = scorer(image, words, [2], boxes=stored)
    assert torch.equal(found, scorer(image, words, [2], boxes=torch.from_numpy(BOXES[:2])))


def test_losses_are_those_with_the_boxes_of_a_batch(model):
    opt = Namespace(margin=0.2, max_violation=False, exclude_same_image=False)
    batch = next(TrainingBatches(SPLIT, WORDS, 7).epoch(0))
    np.testing.assert_array_equal(batch.boxes.numpy(), BOXES[batch.image_index.numpy()])
    scores = direct(model)[batch.image_index][:, batch.caption_index]
    expected = hardest_negative_loss(torch.from_numpy(scores), margin=0.2, hardest=False)
    for chunk in (None, 3):
        torch.testing.assert_close(batch_loss(model, batch, opt, chunk=chunk), expected, rtol=2e-6, atol=0)


def test_a_gallery_keeps_the_boxes(model, tmp_path):
    loaded = Loaded(model, WORDS, "CMCAN")
    gallery = Gallery.build(loaded, SPLIT, tmp_path / "g", progress=False)
    wanted = -np.sort(-direct(model)[:, :4], axis=0)[:3].T
    np.testing.assert_allclose(gallery.search(SPLIT.captions[:4], k=3).scores, wanted, atol=1e-6)
    captions = Captions(*encode_captions(model, SPLIT.captions[:4], WORDS))
    every = [np.arange(len(SPLIT.features))] * 4
    np.testing.assert_allclose(search_among(gallery._images, captions, every, 3)[1], wanted, atol=1e-6)
    np.save(tmp_path / "g" / "boxes.npy", BOXES[:, :, ::-1].copy())
    with pytest.raises(ValueError, match=r"boxes\.npy is damaged \(its checksum differs\)"):
        Gallery.open(tmp_path / "g", loaded)


def test_a_gallery_of_other_boxes_is_another(model, tmp_path):
    loaded, plain = Loaded(model, WORDS, "CMCAN"), with_boxes(None, "plain")
    Gallery.build(loaded, SPLIT, tmp_path / "g", progress=False)
    with pytest.raises(ValueError, match="is a gallery with other boxes than those given; give another folder"):
        Gallery.build(loaded, with_boxes(some_boxes(len(BOXES), 1), "split"), tmp_path / "g", progress=False)
    with pytest.warns(UserWarning, match="plain: there are no boxes, so CMCAN"):
        Gallery.build(loaded, plain, tmp_path / "h", progress=False)
    with pytest.warns(UserWarning, match="h: there are no boxes, so CMCAN"):
        Gallery.open(tmp_path / "h", loaded)
    with pytest.raises(ValueError, match="is a gallery without boxes, and boxes are given; give another folder"):
        Gallery.build(loaded, SPLIT, tmp_path / "h", progress=False)


def test_training_without_them_warns_once_of_each_split(tmp_path, monkeypatch, recwarn):
    monkeypatch.setattr("training_cases.DEV", Split(DEV.features[:], DEV.captions, DEV.caption_to_image, name="dev"))
    warnings.simplefilter("default")
    run_tiny(tmp_path / "run", "cmcan", train_split=Split(DEV.features[:], DEV.captions, DEV.caption_to_image))
    assert [str(each.message).split(":")[0] for each in recwarn if "no boxes" in str(each.message)] == ["split", "dev"]


def test_training_reads_them(tmp_path, monkeypatch):
    read, image_state = [], ConfidenceMatching.image_state

    def seen(scorer, image, region_lengths=None, boxes=None, adjacency=None):
        read.append(boxes)
        return image_state(scorer, image, region_lengths, boxes, adjacency)

    monkeypatch.setattr(ConfidenceMatching, "image_state", seen)
    monkeypatch.setattr("training_cases.DEV", SPLIT)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        run_tiny(tmp_path / "run", "cmcan", train_split=SPLIT, max_steps=1)
    assert all(boxes is not None for boxes in read)
    assert len(read) > 1


def test_a_run_is_resumed_with_its_boxes_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("training_cases.DEV", SPLIT)
    run_tiny(tmp_path, "cmcan", train_split=SPLIT, max_steps=1)
    for train, dev, said in (
        (with_boxes(BOXES[::-1].copy(), "new"), SPLIT, "other boxes in its training split"),
        (with_boxes(None, "none"), SPLIT, "other boxes in its training split"),
        (SPLIT, with_boxes(some_boxes(len(BOXES), 1), "new"), "other boxes in its dev split"),
    ):
        monkeypatch.setattr("training_cases.DEV", dev)
        with pytest.raises(ValueError, match=f"belongs to a run with {said}. Resume with the same"):
            run_tiny(tmp_path, "cmcan", train_split=train, resuming=True, max_steps=2)
    monkeypatch.setattr("training_cases.DEV", SPLIT)
    assert run_tiny(tmp_path, "cmcan", train_split=SPLIT, resuming=True, max_steps=2).iterations == 2


def test_a_checkpoint_knows_whether_it_was_trained_with_boxes(tmp_path, monkeypatch):
    for split, known in ((SPLIT, True), (with_boxes(None, "plain"), False)):
        monkeypatch.setattr("training_cases.DEV", split)
        run_tiny(tmp_path / str(known), "cmcan", train_split=split, max_steps=1)
        loaded = load(tmp_path / str(known) / "checkpoint.pth.tar", "cpu")
        assert loaded.model.trained_with_boxes is known
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            encode(loaded.model, SPLIT, WORDS, progress=False)
            # Of what is drawn and searched, too: `itm-fast attend` and `Gallery.open` ask this.
            warn_of_boxes(loaded.model, "a picture", BOXES[0])
        said = [str(each.message) for each in found if "this CMCAN was trained without" in str(each.message)]
        assert [text.partition(":")[0] for text in said] == ([] if known else [SPLIT.name, "a picture"])
    assert run_tiny(tmp_path / "False", "cmcan", train_split=split, resuming=True, max_steps=2).iterations == 2
