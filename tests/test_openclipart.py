"""The pictures, texts and checkpoints inside the package: whole, small, free of leaks, and better than chance."""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from itm_fast.data import Vocabulary, open_split
from itm_fast.data.openclipart import CHECKPOINTS, FOLDER, THUMBNAIL, VOCABULARY, thumbnails
from itm_fast.models import checkpoint

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "benchmarks" / "demo"
checkout = pytest.mark.skipif(not SCRIPTS.is_dir(), reason="needs a checkout")
DATA_FILES = sorted(p.name for p in FOLDER.iterdir() if p.is_file() and p.suffix not in (".py", ".md", ".pyc"))


@pytest.fixture(scope="module")
def split():
    return open_split(FOLDER, "test")


@pytest.fixture(scope="module")
def pictures():
    rows = [line.split("\t") for line in (FOLDER / "test_pictures.txt").read_text().splitlines()]
    return [(name, digest, float(cosine)) for name, digest, cosine in rows]


@pytest.fixture
def scripts(monkeypatch):
    """The modules of benchmarks/demo, which import each other by their bare names."""
    names = ("openclipart", "split", "manifest", "features")
    monkeypatch.syspath_prepend(str(SCRIPTS))
    yield lambda name: __import__(name)
    for name in names:
        sys.modules.pop(name, None)


def test_every_file_is_as_the_manifest_says():
    manifest = json.loads((FOLDER / "MANIFEST.json").read_text())
    assert sorted(manifest) == [name for name in DATA_FILES if name != "MANIFEST.json"]
    for name, noted in manifest.items():
        content = (FOLDER / name).read_bytes()
        assert len(content) == noted["bytes"], name
        assert hashlib.sha256(content).hexdigest() == noted["sha256"], name


def test_every_file_is_attributed_and_together_they_are_small():
    text = (FOLDER / "ATTRIBUTION.md").read_text()
    patterns = {"test_ims.npy": "test_ims*.npy", "test_ims_scale.npy": "test_ims*.npy"}
    for name in DATA_FILES:
        assert f"`{patterns.get(name, name)}`" in text or name == VOCABULARY.name, name
    for word in ("public domain", "Debian", "Apache License 2.0", "EfficientNet-Lite0"):
        assert word in text
    assert sum((FOLDER / name).stat().st_size for name in DATA_FILES) < 16e6


def test_the_split_is_whole(split, pictures):
    images, regions, size = split.features.shape
    assert images >= 500
    assert (regions, size) == (36, 128)
    assert images == len(pictures)
    raw = np.load(FOLDER / "test_ims.npy", mmap_mode="r")
    assert raw.dtype == np.int8
    assert raw.min() >= -127
    assert (np.load(FOLDER / "test_ims_scale.npy") > 0).all()
    assert np.abs(split.features[:]).reshape(images, -1).max(1).min() > 0
    per_image = np.bincount(split.caption_to_image, minlength=images)
    assert per_image.min() >= 1
    assert per_image.max() <= 3
    assert (np.diff(split.caption_to_image) >= 0).all()
    for image in range(images):
        own = [split.captions[t] for t in np.flatnonzero(split.caption_to_image == image)]
        assert len(set(own)) == len(own)


def test_captions_say_something(split):
    words = [caption.replace(",", " ").split() for caption in split.captions]
    assert min(map(len, words)) >= 2
    assert 3.5 < np.mean(list(map(len, words))) < 12
    text = "\n".join(split.captions)
    for junk in ("@", "http", "eps converted", "hash(", "public domain", "clipart by"):
        assert junk not in text


def test_no_picture_is_shared_with_training_or_nearly(pictures):
    seen = np.load(FOLDER / "seen_pictures.npy")
    test = np.array([int(digest[:16], 16) for _, digest, _ in pictures], np.uint64)
    assert len(np.unique(test)) == len(test)
    assert len(seen) > 1000
    assert not np.isin(test, seen).any()
    assert max(cosine for _, _, cosine in pictures) <= 0.8


@checkout
def test_no_caption_is_shared_with_training_not_even_in_another_order(split, scripts):
    key = scripts("split").caption_key
    test = [int(hashlib.sha256(key(caption).encode()).hexdigest()[:16], 16) for caption in split.captions]
    seen = np.load(FOLDER / "seen_captions.npy")
    assert len(seen) > 1000
    assert not np.isin(np.array(test, np.uint64), seen).any()
    assert key("a red apple, food 2") == key("food, red apple")


def test_thumbnails_are_the_pictures_of_the_split(split):
    images = len(split.features)
    found = thumbnails([0, 1, images - 1])
    assert [picture.size for picture in found] == [(THUMBNAIL, THUMBNAIL)] * 3
    assert all(np.asarray(picture).std() > 3 for picture in found)
    with pytest.raises(IndexError, match="thumbnail"):
        thumbnails([images + 100])


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoints_are_originals_in_form_and_carry_no_paths(name):
    found = checkpoint.load(CHECKPOINTS[name])
    assert found.model[1]["embed.weight"].shape[0] == len(Vocabulary.load(VOCABULARY))
    assert found.opt.img_dim == 128
    assert getattr(found.opt, "module_name", "SCAN").lower() == name
    assert not [value for value in vars(found.opt).values() if isinstance(value, str) and "/" in value]


@checkout
def test_recall_on_the_held_out_split_is_what_was_reported_and_far_above_chance(split):
    from argparse import Namespace

    from itm_fast.evaluation import encode, metrics, score_all
    from itm_fast.models import build

    reported = json.loads((ROOT / "benchmarks/results/demo_recall.json").read_text())
    held_out = {system["name"]: system["pools"][0] for system in reported["held_out"]}
    found = checkpoint.load(CHECKPOINTS["scan"])
    model = build(Namespace(**{**vars(found.opt), "device": "cpu"}))
    model.load_state_dict(found.model)
    encoded = encode(model, split, Vocabulary.load(VOCABULARY), progress=False)
    table = metrics(score_all(model.scorer, encoded, progress=False), split.caption_to_image)
    for side in ("i2t", "t2i"):
        measured, noted = getattr(table, side), held_out["SCAN"][side]
        assert measured.recalls == pytest.approx([noted["r1"], noted["r5"], noted["r10"]], abs=0.3)
        for system in ("SGR", "SAF", "SCAN"):
            assert held_out[system][side]["r10"] > 10 * noted["chance"]["r10"]


@checkout
def test_cleaning_drops_what_describes_nothing(scripts):
    texts = scripts("openclipart")
    assert texts._title("Clipart by Nicu Buculei - red_rose04") == "red rose"
    assert texts._title("Crawfish (B and W)") == "crawfish black and white"
    assert texts._title("L&Atilde;&copy;zard") == "lézard"
    assert texts._description("EPS converted from http://aiga.org") == ""
    assert texts._description("A tall tree. Contact: me@example.org") == "a tall tree"
    assert texts._captions("red rose", "a rose", ["plant", "rose"], True) == ("red rose, plant",)
    assert texts._captions("", "", ["food", "fruit"], False) == ()
    many = ["one", "two", "three", "four", "five", "six", "seven", "eight"]
    assert texts._captions("count", "", many, True) == ("count, one, two, three, four, five", "six, seven, eight")


@checkout
def test_bound_pictures_stay_together_and_nothing_is_lost(scripts):
    texts, cut = scripts("openclipart"), scripts("split")
    generator = np.random.default_rng(0)
    features = generator.normal(size=(40, 4, 32))
    features[7] = features[30] + 0.01  # the same drawing under two names
    captions = {3: "cat, black", 12: "black cat 2"}
    pictures = [
        texts.Picture(f"a/{'q' * (n + 1)}", Path(), str(n), (captions.get(n, chr(97 + n % 26) * (2 + n // 26)),))
        for n in range(38)
    ] + [texts.Picture(f"b/bee_{n}", Path(), str(n), (f"{'y' * n}",)) for n in (38, 39)]
    groups = cut.groups(pictures, features)
    assert sorted(index for group in groups for index in group) == list(range(40))
    for bound in ([7, 30], [3, 12], [38, 39]):
        assert any(set(bound) <= set(group) for group in groups), bound
    parts = cut.split(groups, test=10, dev=5, seed=1)
    assert sorted(index for part in parts.values() for index in part) == list(range(40))
    assert len(parts["test"]) >= 10
    for bound in ([7, 30], [3, 12], [38, 39]):
        assert sum(bool(set(bound) & set(part)) for part in parts.values()) == 1
    assert cut.split(groups, test=10, dev=5, seed=1) == parts
    with pytest.raises(ValueError, match="wanted for test"):
        cut.split(groups, test=41, dev=5, seed=1)


@checkout
def test_features_survive_quantisation_and_pictures_stand_on_white(scripts, tmp_path):
    from PIL import Image

    features = scripts("features")
    generator = np.random.default_rng(0)
    raw = generator.normal(size=(30, 4, 1280)).astype(np.float32) @ np.diag(np.linspace(2, 0.1, 1280)).astype("f")
    mean, axes = features.fit_pca(raw, 8)
    coordinates = features.reduce(raw, mean, axes)
    assert np.abs(coordinates.mean((0, 1))).max() < 1e-3
    assert (np.diff(coordinates.reshape(-1, 8).std(0)) < 1e-6).all()
    scale = features.fit_scale(coordinates)
    error = features.quantise(coordinates, scale) * scale - coordinates
    assert np.quantile(np.abs(error / scale), 0.99) <= 0.5 + 1e-3
    picture = Image.new("RGBA", (50, 30), (0, 0, 0, 0))
    picture.paste((255, 0, 0, 255), (10, 5, 30, 15))
    picture.save(tmp_path / "red.png")
    flat = np.asarray(features.flatten(tmp_path / "red.png", 40))
    assert flat.shape == (40, 40, 3)
    assert (flat[20, 20] == (255, 0, 0)).all()  # cropped to the opaque box: the red fills the width
    assert (flat[20, 1] == (255, 0, 0)).all()
    assert (flat[2, 20] == 255).all()
