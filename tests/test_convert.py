"""`itm-fast convert` in both directions, interrupted, refused and forced."""

import os
import shutil

import numpy as np
import pytest

from itm_fast.cli import main
from itm_fast.data import Split, convert, open_split, save_splits, split_names, storage
from itm_fast.data.split import Rows

RNG = np.random.default_rng(0)
FEATURES = RNG.standard_normal((4, 3, 5)).astype(np.float32)  # I 4, R 3, F 5


def plain(features=FEATURES):
    return Split(features, [f"caption {t}" for t in range(20)], np.arange(20) // 5)


def rich():
    return Split(
        FEATURES.astype(np.float16),
        ["a cat", "", "caf\u00e9", "last", "more"],
        [2, 0, 2, 3, 2],  # image 1 has no caption
        region_lengths=[3, 1, 2, 3],
        boxes=RNG.random((4, 3, 4)).astype(np.float32),
        image_ids=[7, 8, 9, 10],
        caption_ids=[70, 71, 72, 73, 74],
    )


def one_each():
    return Split(FEATURES, list("abcd"), np.arange(4))


def assert_same(one, other):
    assert one.captions == other.captions
    assert np.array_equal(one.features[:], other.features[:])
    assert one.features.stored_dtype == other.features.stored_dtype
    assert np.array_equal(one.caption_to_image, other.caption_to_image)
    for key in ("region_lengths", "image_ids", "caption_ids"):
        assert np.array_equal(getattr(one, key), getattr(other, key)), key
    assert (one.boxes is None) == (other.boxes is None)
    assert one.boxes is None or np.array_equal(one.boxes[:], other.boxes[:])


@pytest.mark.parametrize("make", [plain, rich, one_each])
def test_round_trip(tmp_path, make):
    split = make()
    save_splits(tmp_path / "folder", {"train": split, "test": plain()})
    convert(tmp_path / "folder", tmp_path / "set.h5")
    convert(tmp_path / "set.h5", tmp_path / "again")
    for path in ("folder", "set.h5", "again"):
        assert split_names(tmp_path / path) == ["test", "train"]
        assert_same(open_split(tmp_path / path, "train"), split)
    files = sorted(file.name for file in (tmp_path / "folder").iterdir())
    assert files == sorted(file.name for file in (tmp_path / "again").iterdir())
    for file in files:
        assert (tmp_path / "folder" / file).read_bytes() == (tmp_path / "again" / file).read_bytes(), file


def test_a_plain_split_is_written_as_the_published_code_reads_it(tmp_path):
    save_splits(tmp_path / "folder", {"test": plain()})
    assert sorted(file.name for file in (tmp_path / "folder").iterdir()) == ["test_caps.txt", "test_ims.npy"]
    assert np.array_equal(np.load(tmp_path / "folder" / "test_ims.npy"), FEATURES)
    lines = (tmp_path / "folder" / "test_caps.txt").read_bytes().splitlines()
    assert [line.strip().decode() for line in lines] == plain().captions


def test_int8_becomes_float32(tmp_path):
    quantised = RNG.integers(-127, 128, (4, 3, 5)).astype(np.int8)
    scale = RNG.random(5).astype(np.float32)
    save_splits(tmp_path / "folder", {"test": plain()})
    np.save(tmp_path / "folder" / "test_ims.npy", quantised)
    np.save(tmp_path / "folder" / "test_ims_scale.npy", scale)
    convert(tmp_path / "folder", tmp_path / "set.h5")
    assert np.array_equal(open_split(tmp_path / "set.h5", "test").features[:], quantised.astype("f4") * scale)


def test_blocks_cover_every_image(tmp_path, monkeypatch):
    monkeypatch.setattr("itm_fast.data.storage._BLOCK_BYTES", 3 * 4 * 3 * 5)  # three images
    counts = []
    for name in ("set.h5", "folder"):
        save_splits(tmp_path / name, {"test": plain()}, images_written=counts.append)
        assert np.array_equal(open_split(tmp_path / name, "test").features[:], FEATURES)
    assert counts == [3, 1, 3, 1]


def test_command(tmp_path, capsys):
    save_splits(tmp_path / "folder", {"train": plain(), "test": rich()})
    assert main(["convert", str(tmp_path / "folder"), str(tmp_path / "set.h5"), "--split", "test"]) == 0
    assert f"{tmp_path / 'set.h5'}: test, 4 images, 5 captions\n" == capsys.readouterr().out
    assert split_names(tmp_path / "set.h5") == ["test"]
    assert main(["convert", str(tmp_path / "set.h5"), str(tmp_path / "back")]) == 0
    assert_same(open_split(tmp_path / "back", "test"), open_split(tmp_path / "folder", "test"))


def test_command_errors_are_sentences(tmp_path, capsys):
    assert main(["convert", str(tmp_path / "nowhere"), str(tmp_path / "set.h5")]) == 2
    error = capsys.readouterr().err
    assert (
        error == f"itm-fast convert: {tmp_path / 'nowhere'} does not exist; give SCAN's data folder or an HDF5 file\n"
    )


def test_captions_per_image_reaches_the_reader(tmp_path, capsys):
    save_splits(tmp_path / "folder", {"test": plain()})
    np.save(tmp_path / "folder" / "test_ims.npy", RNG.random((20, 3, 5), dtype=np.float32))
    words = ["convert", str(tmp_path / "folder"), str(tmp_path / "set.h5")]
    assert main(words) == 2
    assert "captions_per_image=1" in capsys.readouterr().err
    assert main([*words, "--captions-per-image", "1"]) == 0
    assert len(open_split(tmp_path / "set.h5", "test").features) == 20


@pytest.mark.parametrize("source", ["folder", "set.h5"])
def test_regions_of_zeros_become_region_counts(tmp_path, source):
    features = FEATURES.copy()
    features[1, 2:] = 0
    save_splits(tmp_path / source, {"test": plain(features)})
    destination = tmp_path / ("out.h5" if source == "folder" else "out")
    assert main(["convert", str(tmp_path / source), str(destination)]) == 0
    assert open_split(destination, "test").region_lengths is None
    assert main(["convert", str(tmp_path / source), str(destination), "--force", "--mask-zero-regions"]) == 0
    assert open_split(destination, "test").region_lengths.tolist() == [3, 2, 3, 3]
    assert open_split(tmp_path / source, "test", mask_zero_regions=True).region_lengths.tolist() == [3, 2, 3, 3]
    assert np.array_equal(open_split(destination, "test").features[:], features)


def test_help_says_what_is_what(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["convert", "--help"])
    assert exit.value.code == 0
    out = capsys.readouterr().out
    for word in ("SRC", "DST", "--split", "--force", "caption_to_image.npy", "interrupted"):
        assert word in out


def test_files_are_not_overwritten_without_force(tmp_path, capsys):
    save_splits(tmp_path / "set.h5", {"old": plain()})
    save_splits(tmp_path / "folder", {"test": rich()})
    words = ["convert", str(tmp_path / "folder"), str(tmp_path / "set.h5")]
    assert main(words) == 2
    assert "set.h5 exists; force=True (--force) replaces the whole file" in capsys.readouterr().err
    assert split_names(tmp_path / "set.h5") == ["old"]
    assert main([*words, "--force"]) == 0
    assert split_names(tmp_path / "set.h5") == ["test"]


def test_folders_are_filled_and_replaced_by_split(tmp_path):
    save_splits(tmp_path / "folder", {"train": plain(), "test": rich()})
    (tmp_path / "folder" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="has files of test already; force"):
        save_splits(tmp_path / "folder", {"test": plain()})
    save_splits(tmp_path / "folder", {"dev": plain()})
    save_splits(tmp_path / "folder", {"test": plain()}, force=True)
    # Nothing of the replaced split stays behind to be read with the new one.
    assert_same(open_split(tmp_path / "folder", "test"), plain())
    assert_same(open_split(tmp_path / "folder", "train"), plain())
    assert sorted(file.name for file in (tmp_path / "folder").iterdir()) == sorted(
        ["notes.txt", *(f"{s}_{f}" for s in ("dev", "test", "train") for f in ("caps.txt", "ims.npy"))]
    )


class Interrupted(Rows):
    def __getitem__(self, index):
        raise KeyboardInterrupt


@pytest.mark.parametrize("name", ["set.h5", "new", "folder"])
def test_an_interrupted_conversion_leaves_nothing(tmp_path, name):
    save_splits(tmp_path / "folder", {"test": plain()})
    before = sorted(tmp_path.rglob("*"))
    bad = Split(Interrupted(FEATURES), ["a"], [0])
    with pytest.raises(KeyboardInterrupt):
        save_splits(tmp_path / name, {"good": plain(), "test": bad}, force=True)
    assert sorted(tmp_path.rglob("*")) == before
    assert_same(open_split(tmp_path / "folder", "test"), plain())


def content(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("after", [False, True], ids=["before a move", "after a move"])
def test_replacing_that_stops_anywhere_leaves_the_old_splits(tmp_path, monkeypatch, after):
    """Splits of more files by ones of fewer; features leave first and arrive last."""
    folder, old, new = tmp_path / "folder", {"test": rich(), "dev": plain()}, {"test": plain(), "dev": rich()}
    save_splits(folder, old)
    before, at, replace = content(folder), {"move": 0}, os.replace
    last = 2 * len(before)

    def stopping(source, target):
        at["move"] += 1
        if at["move"] == at["stop"] and not after:
            raise KeyboardInterrupt
        replace(source, target)
        if at["move"] < at["stop"]:
            assert split_names(folder) == (["dev"] if at["move"] in (1, last - 1) else [])
        if at["move"] == at["stop"]:
            raise KeyboardInterrupt

    monkeypatch.setattr("itm_fast.data.storage.os.replace", stopping)
    for stop in range(1, last + 1):
        at.update(move=0, stop=stop)
        with pytest.raises(KeyboardInterrupt):
            save_splits(folder, new, force=True)
        assert content(folder) == before
    at.update(stop=0)
    save_splits(folder, new, force=True)
    for name, split in new.items():
        assert_same(open_split(folder, name), split)
    assert len(list(folder.iterdir())) == len(before)


def test_a_second_interrupt_loses_nothing(tmp_path, monkeypatch):
    save_splits(tmp_path / "folder", {"test": plain()})
    before, replace = content(tmp_path / "folder"), os.replace

    def stopping(source, target):
        if ".replaced" not in str(target):
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr("itm_fast.data.storage.os.replace", stopping)
    with pytest.raises(KeyboardInterrupt):
        save_splits(tmp_path / "folder", {"test": rich()}, force=True)
    (kept,) = (tmp_path / "folder").iterdir()
    assert content(kept) == before


@pytest.mark.parametrize("name", ["set.h5", "new", "folder"])
@pytest.mark.parametrize("force", [False, True])
def test_two_conversions_to_one_place_are_one_after_the_other(tmp_path, name, force, capsys):
    """The second one begins while the first one writes."""
    save_splits(tmp_path / "folder", {"dev": plain()})
    save_splits(tmp_path / "source.h5", {"test": rich()})
    source = "folder" if name == "set.h5" else "source.h5"
    words = ["convert", str(tmp_path / source), str(tmp_path / name), *(["--force"] if force else [])]
    codes = []
    save_splits(tmp_path / name, {"test": plain()}, images_written=lambda images: codes.append(main(words)))
    said = capsys.readouterr().err
    assert set(codes) == {2}
    assert f"itm-fast convert: {tmp_path / name}: process {os.getpid()} on " in said
    assert_same(open_split(tmp_path / name, "test"), plain())
    assert main([*words, "--force"]) == 0
    assert not list(tmp_path.rglob("*.lock"))


def test_a_folder_that_another_conversion_has_just_made_is_filled(tmp_path, monkeypatch):
    lock = storage.Lock

    def late(path, what):
        if not (tmp_path / "new").exists():
            (tmp_path / "new").mkdir()
            (tmp_path / "new" / "notes.txt").write_text("mine")
        return lock(path, what)

    monkeypatch.setattr(storage, "Lock", late)
    save_splits(tmp_path / "new", {"test": plain()})
    assert_same(open_split(tmp_path / "new", "test"), plain())
    assert (tmp_path / "new" / "notes.txt").read_text() == "mine"


def test_a_folder_in_the_place_of_a_file_is_left_alone(tmp_path):
    save_splits(tmp_path / "folder", {"test": plain()})
    (tmp_path / "folder" / "test_boxes.npy").mkdir()
    with pytest.raises(IsADirectoryError, match=r"test_boxes.npy"):
        save_splits(tmp_path / "folder", {"test": rich()}, force=True)
    assert (tmp_path / "folder" / "test_boxes.npy").is_dir()


@pytest.mark.parametrize(
    ("source", "destination", "words"),
    [
        ("folder", "other", "is a folder, so .*other must end in .h5 or .hdf5"),
        ("set.h5", "other.h5", r"is a file \(HDF5 becomes a folder\), so .*other.h5 must not end in .h5 or .hdf5"),
        ("empty", "other.h5", "holds no splits"),
    ],
)
def test_directions_that_make_no_sense_are_refused(tmp_path, source, destination, words):
    save_splits(tmp_path / "folder", {"test": plain()})
    save_splits(tmp_path / "set.h5", {"test": plain()})
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=words):
        convert(tmp_path / source, tmp_path / destination)


def test_destinations_of_the_wrong_kind_are_refused(tmp_path):
    (tmp_path / "folder.h5").mkdir()
    (tmp_path / "file").write_text("")
    for name, words in (("folder.h5", "is a folder: a name ending in"), ("file", "is a file: a name ending in")):
        with pytest.raises(FileExistsError, match=words):
            save_splits(tmp_path / name, {"test": plain()}, force=True)
    with pytest.raises(FileNotFoundError, match="nowhere does not exist; make that folder first"):
        save_splits(tmp_path / "nowhere" / "set.h5", {"test": plain()})
    with pytest.raises(ValueError, match="there are no splits to write"):
        save_splits(tmp_path / "set.h5", {})


def test_a_caption_of_two_lines_does_not_fit_a_folder(tmp_path):
    save_splits(tmp_path / "set.h5", {"test": Split(FEATURES, ["fine", "two\nlines"], [0, 1])})
    with pytest.raises(ValueError, match="caption 1 has a line break, and in a folder a caption is one line"):
        convert(tmp_path / "set.h5", tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize("name", ["set.h5", "folder"])
def test_a_full_disk_is_found_before_writing(tmp_path, monkeypatch, name):
    usage = shutil.disk_usage(tmp_path)
    big = np.zeros((100, 36, 256), np.float16)  # 1.8 MB stored
    split = Split(big, ["a"], [0])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_800_000))
    with pytest.raises(OSError, match=r"needs 0\.00192 GB and its disk has 0\.0018 GB free"):
        save_splits(tmp_path / name, {"test": split})
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2_000_000))
    save_splits(tmp_path / name, {"test": split})
