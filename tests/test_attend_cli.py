"""`itm-fast attend` draws every kind of model over pictures, boxes or a grid, as PNG and SVG."""

import shutil
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from PIL import Image

from itm_fast.cli import _picture, main
from itm_fast.cli.attend import _row
from itm_fast.data import Split, open_split, save_splits
from itm_fast.data.openclipart import CHECKPOINTS, FOLDER
from itm_fast.nn import Attention


def attend(output, *words, model="saf", data=FOLDER, image=12):
    return main(
        ["attend", "--checkpoint", str(CHECKPOINTS[model]), "--data", str(data), "--image", str(image), *words]
        + ["--output", str(output)]
    )


@pytest.mark.parametrize("model", ["saf", "sgr", "scan"])
def test_figures_of_an_images_own_captions(tmp_path, model, capsys):
    assert attend(tmp_path / "a.png", model=model) == 0
    assert capsys.readouterr().out == f"written: {tmp_path / 'a.png'}\n"
    with Image.open(tmp_path / "a.png") as found:
        pixels = np.asarray(found.convert("RGB"), np.int64)
    assert pixels.shape[1] == _picture.WIDTH
    orange = (abs(pixels - _picture.WORD_COLOUR.astype(int)).sum(2) < 30).sum()
    assert orange > 300  # at least the word that counts most


def test_svg_says_the_same_as_png(tmp_path):
    assert attend(tmp_path / "a.svg", "a red ball & a <dog>") == 0
    root = ET.parse(tmp_path / "a.svg").getroot()
    texts = ["".join(each.itertext()) for each in root.iter("{http://www.w3.org/2000/svg}text")]
    assert texts[:2] == [
        "What SAF attends to in image 12",
        "Orange: how much a word counts. Red: where in the picture it looks.",
    ]
    assert {"whole picture", "<start>", "ball", "&", "<", "dog", "the image"} <= set(texts)
    images = list(root.iter("{http://www.w3.org/2000/svg}image"))
    assert len(images) == 1 + 5  # the picture, and heat maps of five words
    assert attend(tmp_path / "a.png", "a red ball & a <dog>") == 0
    with Image.open(tmp_path / "a.png") as found:
        assert found.size == (int(root.get("width")), int(root.get("height")))


def test_boxes_lie_over_the_picture(tmp_path):
    for file in FOLDER.glob("test_*"):
        shutil.copy(file, tmp_path)
    boxes = np.zeros((1000, 36, 4), np.float32)
    boxes[:, :, 2:] = 0.5  # all regions fill the upper left quarter
    np.save(tmp_path / "test_boxes.npy", boxes)
    assert attend(tmp_path / "a.png", data=tmp_path) == 0
    weight = np.full(36, 1 / 36)
    found = _picture.spread(weight, boxes[0])
    assert found[:25, :25] == pytest.approx(np.ones((25, 25)))
    assert not found[25:].any()
    assert not found[:, 25:].any()
    assert _picture.spread(np.arange(5.0), None).tolist() == [[0, 1, 2], [3, 4, 0], [0, 0, 0]]
    np.save(tmp_path / "test_boxes.npy", boxes[:, :7])
    assert attend(tmp_path / "b.png", data=tmp_path) == 2
    assert not (tmp_path / "b.png").exists()


def test_boxes_of_an_hdf5_file_are_read(tmp_path, capsys):
    corner = np.arange(36, dtype=np.float32)[:, None] / 72
    boxes = np.broadcast_to(np.concatenate([corner, corner, corner + 0.4, corner + 0.4], 1), (13, 36, 4)).copy()
    for name, given in (("with", boxes), ("without", None), ("pixels", boxes * 640)):
        split = Split(open_split(FOLDER, "test").features[:13], ["a red ball"], [12], boxes=given)
        save_splits(tmp_path / f"{name}.h5", {"test": split})
    assert attend(tmp_path / "with.png", data=tmp_path / "with.h5") == 0
    assert attend(tmp_path / "without.png", data=tmp_path / "without.h5") == 0
    np.save(tmp_path / "test_boxes.npy", boxes)
    assert attend(tmp_path / "beside.png", data=tmp_path / "without.h5") == 0
    found = [(tmp_path / f"{name}.png").read_bytes() for name in ("with", "beside", "without")]
    assert found[0] == found[1]
    assert found[0] != found[2]
    assert attend(tmp_path / "pixels.png", data=tmp_path / "pixels.h5") == 2
    assert "pixels.h5: test: boxes do not lie in the picture" in capsys.readouterr().err


def test_every_kind_of_weights_has_a_row():
    import torch

    regions, words = torch.full((3, 4), 0.25), torch.full((4, 3), 1 / 3)
    rest = ("a", "red", "apple")
    picture = _picture.blank()
    for weights, first, shown in (
        ({"regions": regions, "nodes": torch.tensor([0.4, 0.3, 0.2, 0.1])}, "whole picture", "40%"),
        ({"regions": regions, "words": words, "word_pool": torch.tensor([0.5, 0.2, 0.3])}, "a", "50%"),
        ({"words": words, "cosines": torch.ones(4)}, "a", "33%"),
        ({"regions": regions, "cosines": torch.tensor([0.5, 0.1, -0.2])}, "a", "0.50"),
        ({"regions": regions}, "a", "25%"),
    ):
        row = _row(Attention(0.5, weights, rest), "a red apple", picture, None)
        assert row.words[0] == first
        assert row.weight(0) == shown
        assert row.regions.shape == (3, 4)
        assert _picture.draw("", "", [row]).to_image().width == _picture.WIDTH


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--image", "1000"], "there is no image 1000; the images are 0 to 999"),
        (["--output", "a.gif"], "--output must end in .png or .svg, got a.gif"),
        (["--output", "nowhere/a.png"], "the folder of --output nowhere/a.png does not exist; make it first"),
        (["--pictures", "nowhere"], "--pictures nowhere is no folder"),
        (["--checkpoint", "nowhere.tar"], "nowhere.tar"),
        ([" "], "the caption is empty"),
    ],
)
def test_mistakes_are_a_sentence(tmp_path, capsys, words, sentence, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = ["attend", "--checkpoint", str(CHECKPOINTS["saf"]), "--data", str(FOLDER), "--image", "3", *words]
    assert main(given) == 2
    captured = capsys.readouterr()
    assert sentence in captured.err
    assert "Traceback" not in captured.err
    assert not list(tmp_path.iterdir())


def test_features_that_are_not_finite_are_named(tmp_path, capsys):
    features = np.full_like(open_split(FOLDER, "test").features[:1], np.nan)
    save_splits(tmp_path / "data", {"test": Split(features, ["a red apple"], np.array([0]))})
    assert attend(tmp_path / "a.png", data=tmp_path / "data", image=0) == 2
    assert "the score of image 0 and 'a red apple' is nan; check that image's features" in capsys.readouterr().err
