"""The folder of a gallery: built whole or resumed, and refused in a sentence if it is damaged or of another model."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from itm_fast import Gallery
from itm_fast._lock import Lock, LockedError
from itm_fast.data import Split
from itm_fast.gallery import files
from itm_fast.models import Loaded

from .test_gallery import IMAGES, loaded, ragged


@pytest.fixture(scope="module")
def scan() -> Loaded:
    return loaded("SCAN")


@pytest.fixture(scope="module")
def made(tmp_path_factory, scan) -> Path:
    """A finished gallery with names."""
    path = tmp_path_factory.mktemp("gallery") / "g"
    Gallery.build(scan, ragged(), path, names=[f"a/{n} é.jpg" for n in range(IMAGES)], progress=False)
    return path


@pytest.fixture
def copy(made, tmp_path) -> Path:
    shutil.copytree(made, tmp_path / "g")
    return tmp_path / "g"


class Watched(Split):
    """A split that notes which images are read, and stops with an exception at one of them."""

    def __init__(self, split: Split, stop_at: int = 10**9, error: BaseException | None = None) -> None:
        super().__init__(split.features, split.captions, split.caption_to_image, split.region_lengths)
        self.asked: list[slice] = []
        self.stop_at, self.error = stop_at, error

    def read(self, images):
        if images.stop > self.stop_at:
            raise self.error
        self.asked.append(images)
        return super().read(images)


def test_a_finished_gallery_holds_these_files(made, scan):
    gallery = Gallery.open(made, scan)
    (vectors,) = made.glob("pooled-*.npy")
    assert {path.name for path in made.iterdir()} == {
        "gallery.json", "image.npy", "region_lengths.npy", "names.txt", vectors.name, f"{vectors.stem}.json",
    }  # fmt: skip
    assert gallery.name(3) == "a/3 é.jpg"
    assert len(gallery) == IMAGES
    assert repr(gallery) == f"<Gallery {made}: 12 images encoded by SCAN t2i, float32>"
    found = gallery.search(["old red cat"], k=2)
    assert found.names == [[f"a/{image} é.jpg" for image in found.images[0]]]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_an_interrupted_build_goes_on(scan, made, tmp_path, error):
    split = Watched(ragged(), 9, error)
    with pytest.raises(type(error), match=r"8 of 12 images are kept in .*/g: .*do the same again to go on"):
        Gallery.build(scan, split, tmp_path / "g", batch_size=4, progress=False)
    with pytest.raises(FileNotFoundError, match="was begun and is not finished"):
        Gallery.open(tmp_path / "g", scan)
    other = ragged()
    with pytest.raises(ValueError, match="was begun with another images; delete"):
        Gallery.build(scan, Split(other.features[:] + 1, other.captions, other.caption_to_image, other.region_lengths),
                      tmp_path / "g", progress=False)  # fmt: skip
    with open(tmp_path / "g" / "image.npy", "ab") as file:
        file.write(b"half a row" * 10_000)
    split = Watched(ragged())
    names = [f"a/{n} é.jpg" for n in range(IMAGES)]
    Gallery.build(scan, split, tmp_path / "g", names=names, batch_size=4, progress=False)
    assert [one for one in split.asked if one.start] == [slice(8, 12)]
    for path in made.iterdir():
        if path.name != "recall.json":
            assert path.read_bytes() == (tmp_path / "g" / path.name).read_bytes()


def test_a_lost_journal_entry_starts_again(scan, made, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        Gallery.build(scan, Watched(ragged(), 9, KeyboardInterrupt()), tmp_path / "g", batch_size=4, progress=False)
    (tmp_path / "g" / "image.npy").write_bytes(b"")
    Gallery.build(scan, ragged(), tmp_path / "g", batch_size=4, progress=False)
    assert (tmp_path / "g" / "image.npy").read_bytes() == (made / "image.npy").read_bytes()


def test_building_again_checks_and_adds(copy, scan, made):
    before = (copy / "image.npy").stat().st_mtime_ns
    first = loaded("SCAN", 5)
    with pytest.raises(ValueError, match="has no pooled vectors of this SCAN t2i checkpoint; build it again"):
        Gallery.open(copy, scan).search(["a cat"], k=2, candidates=3, first=first)
    gallery = Gallery.build(scan, ragged(), copy, pictures="some/where", first=first, progress=False)
    assert (copy / "image.npy").stat().st_mtime_ns == before
    assert gallery.names == Gallery.open(made, scan).names
    assert gallery.about.pictures.endswith("some/where")
    assert gallery.search(["a cat"], k=2, candidates=12, first=first).recall.value == 1.0
    split = ragged()
    split.image_ids = np.arange(IMAGES)  # names that were given stay
    assert Gallery.build(scan, split, copy, progress=False).names == gallery.names
    assert Gallery.build(scan, split, copy.with_name("ids"), progress=False).names[11] == "11"
    data = bytearray((copy / "image.npy").read_bytes())
    data[-3] ^= 64
    (copy / "image.npy").write_bytes(data)
    with pytest.raises(ValueError, match=r"image\.npy is damaged \(its checksum differs\); delete"):
        Gallery.build(scan, ragged(), copy, progress=False)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("step, wanted", [("write_names", "a/3 é.jpg"), ("write_about", "b/3")])
def test_names_are_whole_when_the_process_that_adds_some_is_killed(copy, scan, monkeypatch, step, wanted):
    """They are the old ones until gallery.json is replaced, then the new ones; also if the next call is killed."""

    def killed(step: str, names: str) -> str | None:
        def function(*given):
            getattr(files, f"real_{step}")(*given)
            raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(files, f"real_{step}", getattr(files, step), raising=False)
            patch.setattr(files, step, function)
            with pytest.raises(Killed):
                Gallery.build(scan, ragged(), copy, names=[f"{names}/{n}" for n in range(IMAGES)], progress=False)
        return Gallery.open(copy, scan).name(3)

    assert killed(step, "b") == wanted
    assert killed("write_names", "c") == wanted
    assert Gallery.build(scan, ragged(), copy, progress=False).name(3) == wanted
    assert not list(copy.glob("*.next"))


def test_first_vectors_of_other_images_are_not_kept(copy, scan):
    """Images that differ after the first few, which alone are compared at once."""
    split, first = ragged(), loaded("SCAN", 5)
    features = split.features[:]
    features[11] += 1
    other = Split(features, split.captions, split.caption_to_image, split.region_lengths)
    with pytest.raises(ValueError, match="is a gallery of other images than those given: their features differ"):
        Gallery.build(scan, other, copy, first=first, progress=False)
    assert len(list(copy.glob("pooled-*"))) == 2
    Gallery.build(scan, split, copy, first=first, progress=False)
    assert len(list(copy.glob("pooled-*"))) == 4


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda g: truncate(g / "image.npy"), r"image\.npy is not a whole \.npy file"),
        (lambda g: (g / "image.npy").unlink(), r"image\.npy is missing; delete .*/g and build the gallery again"),
        (lambda g: np.save(g / "image.npy", np.zeros((12, 36, 7), "f")), r"float32 \[12, 36, 7\], and should be"),
        (lambda g: (g / "image.npy").write_bytes(pickle.dumps([1])), r"image\.npy is not a \.npy file"),
        (lambda g: np.save(g / "image.npy", np.array([{}] * 12), allow_pickle=True), "not a whole .npy file"),
        (lambda g: np.save(g / "region_lengths.npy", np.full(12, 99, np.int32)), r"region_lengths\.npy is damaged"),
        (lambda g: (g / "names.txt").unlink(), r"names\.txt is missing"),
        (lambda g: (g / "names.txt").write_text("a\n" * 12), r"names\.txt is damaged"),
        (lambda g: truncate(g / "gallery.json"), r"gallery\.json is damaged; delete"),
        (lambda g: (g / "gallery.json").write_text("[1]"), r"gallery\.json is damaged; .*: it holds no JSON object"),
        (lambda g: (g / "gallery.json").write_text("[" * 9999), r"gallery\.json is damaged"),
        (lambda g: edit(g / "gallery.json", images=-1), r"gallery\.json is damaged \(images is -1\)"),
        (lambda g: edit(g / "gallery.json", images=13), r"float32 \[12, 36, 8\], and should be float32 \[13, 36, 8\]"),
        (lambda g: edit(g / "gallery.json", sample=[1]), r"damaged \(sample is \[1\]\)"),
        (lambda g: edit(g / "gallery.json", format="x 2"), "is of the form 'x 2', and this version of itm-fast reads"),
        (lambda g: (g / "gallery.json").unlink(), r"g is not a gallery: `itm-fast gallery` or itm_fast\.Gallery"),
        (shutil.rmtree, r"g does not exist: `itm-fast gallery`"),
    ],
)  # fmt: skip
def test_a_damaged_gallery_is_refused(copy, scan, damage, message):
    damage(copy)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        Gallery.open(copy, scan)


def test_another_model_or_other_images_are_refused(copy, scan):
    for other in (loaded("SCAN", 3), loaded("SGR", 4)):
        message = rf"was built with another checkpoint \(SCAN t2i\) than this one \({other.name}\): image encoder, text"
        with pytest.raises(ValueError, match=message):
            Gallery.open(copy, other)
        with pytest.raises(ValueError, match=message):
            Gallery.build(other, ragged(), copy, progress=False)
    with pytest.raises(ValueError, match=r"of other images \(12 x 36 regions\) than those given \(9 x 36\)"):
        Gallery.build(scan, ragged(9), copy, progress=False)
    with pytest.raises(ValueError, match="is a gallery in float32, and float16 is asked for"):
        Gallery.build(scan, ragged(), copy, dtype="float16", progress=False)


def test_a_folder_of_other_files_and_a_second_builder_are_refused(scan, copy, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "x.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"is no gallery and holds other files, such as x\.txt; give a new folder"):
        Gallery.build(scan, ragged(), tmp_path / "notes", progress=False)
    assert [path.name for path in (tmp_path / "notes").iterdir()] == ["x.txt"]
    with pytest.raises(FileNotFoundError, match="nowhere does not exist; make that folder first"):
        Gallery.build(scan, ragged(), tmp_path / "nowhere" / "g", progress=False)
    with Lock(copy / files.LOCK, "the gallery"), pytest.raises(LockedError, match="is writing there"):
        Gallery.build(scan, ragged(), copy, progress=False)


@pytest.mark.parametrize(
    "more, message",
    [
        ({"dtype": "int8"}, "dtype must be float32 or float16, got 'int8'"),
        ({"names": ["a"]}, "names must have one entry per image, 12, got 1"),
        ({"names": ["a"] * 11 + ["b\nc"]}, r"names\[11\] must be a text of one line, got 'b\\nc'"),
        ({"first": "SGR"}, "first must be a SCAN or DualEncoder checkpoint, got SGR"),
        ({"model": "scan.pth.tar"}, r"takes a model as itm_fast.models.load\(path\) returns it, got str"),
        ({"images": np.full((2, 36, 6), 1e300)}, "image 0 has a value that is not finite; check its features"),
        ({"images": np.ones((2, 36, 5), np.float32)}, "the data has 5 features per region, .* takes 6; use [a-z ]+$"),
    ],
)  # fmt: skip
def test_mistakes_of_a_build_are_told(scan, tmp_path, more, message):
    if more.get("first") == "SGR":
        more = {"first": loaded("SGR")}
    given = {"model": scan, "images": ragged(), "path": tmp_path / "g", "progress": False, **more}
    with np.errstate(all="ignore"), pytest.raises((ValueError, TypeError), match=message):
        Gallery.build(**given)


@pytest.mark.parametrize(
    "asked, message",
    [
        ({"captions": []}, "captions is empty; give at least one text"),
        ({"captions": "a cat"}, r"captions must be a list of texts, got the single text 'a cat'"),
        ({"captions": ["a cat", " "]}, r"captions\[1\] is blank"),
        ({"k": 0}, "k must be at least 1, got 0"),
        ({"k": 2.0}, "^k must be an int, got 2.0"),
        ({"k": True}, "^k must be an int, got True"),
        ({"candidates": 2.5, "k": 1}, "^candidates must be an int, got 2.5"),
        ({"candidates": True, "k": 1}, "^candidates must be an int, got True"),
        ({"candidates": "x"}, "^candidates must be an int, got 'x'"),
        ({"candidates": 1, "k": 2}, r"candidates must be 2 \(as many as are returned\) to 12 \(all images\), got 1"),
        ({"candidates": 13}, "got 13"),
        ({"first": "SCAN"}, "are for a two-stage search; say how many candidates="),
        ({"first": "SGR", "candidates": 12}, "first must be a SCAN or DualEncoder checkpoint, got SGR"),
        ({"memory_gb": 0.001}, "a memory budget of 0.001 GB cannot hold"),
    ],
)
def test_mistakes_of_a_search_are_told(made, scan, asked, message):
    asked = {"captions": ["a cat"], **asked}
    if "first" in asked:
        asked["first"] = loaded(asked["first"])
    with pytest.raises((ValueError, TypeError), match=message):
        Gallery.open(made, scan).search(**asked)


def test_what_other_models_need(tmp_path, scan):
    """SGR has no first stage of its own; a model without vocabulary cannot read captions."""
    sgr = loaded("SGR")
    gallery = Gallery.build(sgr, ragged(), tmp_path / "g", progress=False)
    assert not list(gallery.path.glob("pooled-*"))
    with pytest.raises(ValueError, match=r"a two-stage search of SGR needs first= \(--first\): a SCAN or DualEncoder"):
        gallery.search(["a cat"], candidates=12)
    with pytest.raises(ValueError, match="loaded without its vocabulary"):
        Gallery.open(tmp_path / "g", Loaded(sgr.model, None, "SGR")).search(["a cat"])
    assert gallery.search(["a zebra", "cat"], 1).unknown == [["a", "zebra"], []]
