"""The HDF5 form: what it holds and what it refuses."""

import os
import subprocess
import sys

import h5py
import numpy as np
import pytest

from itm_fast.data import Split, open_split, save_splits, split_names

RNG = np.random.default_rng(0)
FEATURES = RNG.standard_normal((4, 3, 5)).astype(np.float32)  # I 4, R 3, F 5


@pytest.fixture
def path(tmp_path):
    split = Split(
        FEATURES,
        ["a cat", "", "caf\u00e9 \U0001f408", "two\nlines"],
        [2, 0, 2, 3],
        region_lengths=[3, 1, 2, 3],
        boxes=RNG.random((4, 3, 4)).astype(np.float32),
        image_ids=[7, 8, 9, 10],
        caption_ids=[70, 71, 72, 73],
    )
    save_splits(tmp_path / "set.h5", {"test": split, "dev": split})
    return tmp_path / "set.h5"


def edit(path, key, **dataset):
    with h5py.File(path, "a") as file:
        del file["test"][key]
        if dataset:
            file["test"].create_dataset(key, **dataset)


def test_read_back(path):
    split = open_split(path, "test")
    assert split.captions == ["a cat", "", "caf\u00e9 \U0001f408", "two\nlines"]
    assert split.caption_to_image.tolist() == [2, 0, 2, 3]
    assert split.region_lengths.tolist() == [3, 1, 2, 3]
    assert split.region_lengths.dtype == np.int32
    assert split.image_ids.tolist() == [7, 8, 9, 10]
    assert split.caption_ids.tolist() == [70, 71, 72, 73]
    assert split.boxes[1:2].shape == (1, 3, 4)
    for index in ([3, 0, 0], [], slice(1, 3), slice(None, None, 2), slice(None)):
        assert np.array_equal(split.features[index], FEATURES[index if index else slice(0, 0)]), index
    assert split_names(path) == ["dev", "test"]
    cut = open_split(path, "test", limit_captions=2)
    assert (len(cut.features), cut.captions) == (3, ["a cat", ""])


def test_layout_is_as_documented(path):
    with h5py.File(path) as file:
        assert file.attrs["itm_fast_format"] == 1
        group = file["test"]
        assert set(group) == {
            "features",
            "captions",
            "caption_to_image",
            "region_lengths",
            "boxes",
            "image_ids",
            "caption_ids",
        }
        assert group["features"].chunks == (1, 3, 5)
        assert group["features"].dtype == np.float32
        assert h5py.check_string_dtype(group["captions"].dtype).encoding == "utf-8"
        assert group["caption_to_image"].dtype == np.int64
        assert group["region_lengths"].dtype == np.int32


@pytest.mark.parametrize(("given", "stored"), [(np.float16, np.float16), (np.float64, np.float32)])
def test_half_precision_is_kept(tmp_path, given, stored):
    features = FEATURES.astype(given)
    save_splits(tmp_path / "set.hdf5", {"test": Split(features, ["a"], [0])})
    with h5py.File(tmp_path / "set.hdf5") as file:
        assert file["test/features"].dtype == stored
    read = open_split(tmp_path / "set.hdf5", "test").features[:]
    assert read.dtype == np.float32
    assert np.array_equal(read, features.astype(np.float32))


@pytest.mark.parametrize("key", ["features", "captions", "caption_to_image"])
def test_a_missing_data_set_is_named(path, key):
    edit(path, key)
    with pytest.raises(ValueError, match=f"the data set {key} is missing"):
        open_split(path, "test")


def test_optional_data_sets_may_be_missing(path):
    for key in ("region_lengths", "boxes", "image_ids", "caption_ids"):
        edit(path, key)
    split = open_split(path, "test")
    assert (split.region_lengths, split.boxes, split.image_ids, split.caption_ids) == (None, None, None, None)


@pytest.mark.parametrize(
    ("key", "data", "error", "words"),
    [
        ("features", np.zeros((4, 15), "f4"), ValueError, r"features must be \[I, R, F\].*got \[4, 15\]"),
        ("features", np.zeros((0, 3, 5), "f4"), ValueError, r"none of them 0, got \[0, 3, 5\]"),
        ("features", np.zeros((4, 3, 5), "i1"), TypeError, "features must be an array of floating-point"),
        ("features", np.float32(1), TypeError, "features must be an array of floating-point"),
        ("boxes", np.zeros((4, 3), "f4"), ValueError, r"boxes must be \[4, 3, 4\]"),
        ("boxes", h5py.Empty("f4"), TypeError, "boxes must be an array of floating-point"),
        ("caption_to_image", np.array([0, 1, 2, 4]), ValueError, r"must lie in 0\.\.3, got 4 for caption 3"),
        ("caption_to_image", np.array([0, 1, 2]), ValueError, r"one entry per caption, \[4\], got shape \[3\]"),
        ("caption_to_image", np.array([0.0, 1, 2, 3]), TypeError, "caption_to_image must be integers"),
        ("caption_to_image", h5py.Empty("i8"), TypeError, "caption_to_image must be integers"),
        ("region_lengths", np.array([1, 2, 3, 4]), ValueError, r"must lie in 1\.\.3, got 4 for image 3"),
        ("captions", np.arange(4), ValueError, r"captions must be \[T\] UTF-8 strings, got int64 \[4\]"),
        ("captions", np.array([[b"a"]], "S1"), ValueError, r"captions must be \[T\] UTF-8 strings"),
        ("captions", np.array([b"a", b"b", b"\xe9t\xe9", b"d"]), ValueError, r"test: captions\[2\] is not UTF-8"),
    ],
)
def test_wrong_data_sets_are_refused(path, key, data, error, words):
    edit(path, key, data=data)
    with pytest.raises(error, match=words):
        open_split(path, "test")


def test_a_group_in_place_of_a_data_set_is_refused(path):
    with h5py.File(path, "a") as file:
        del file["test/features"]
        file.create_group("test/features")
    with pytest.raises(ValueError, match="features must be a data set, got a Group"):
        open_split(path, "test")


def external(path, target):
    with h5py.File(target, "w") as other:
        other["x"] = np.zeros((4, 3, 5), np.float32)
        other.create_group("test")
    return h5py.ExternalLink(str(target), "/x")


def virtual(path, target):
    external(path, target)
    layout = h5py.VirtualLayout((4, 3, 5), "f4")
    layout[:] = h5py.VirtualSource(str(target), "x", (4, 3, 5))
    return layout


@pytest.mark.parametrize("key", ["features", "captions", "caption_to_image", "region_lengths", "boxes", "image_ids"])
@pytest.mark.parametrize("kind", ["external", "dangling", "soft", "loop", "storage", "virtual", "FIFO"])
def test_nothing_outside_the_file_is_read(path, tmp_path, key, kind):
    target = tmp_path / "other.h5"
    with h5py.File(path, "a") as file:
        group = file["test"]
        del group[key]
        if kind == "external":
            group[key] = external(path, target)
        elif kind == "dangling":
            group[key] = h5py.ExternalLink("nowhere.h5", "/x")
        elif kind == "soft":
            group[key] = h5py.SoftLink("/dev/features")
        elif kind == "loop":
            group[key] = h5py.SoftLink(f"/test/{key}")
        elif kind == "FIFO":  # which whoever opens it would wait for
            os.mkfifo(target)
            group[key] = h5py.ExternalLink(str(target), "/x")
        elif kind == "virtual":
            group.create_virtual_dataset(key, virtual(path, target))
        else:
            target.write_bytes(bytes(240))
            group.create_dataset(key, (4, 3, 5), "f4", external=[(str(target), 0, 240)])
    with pytest.raises(
        ValueError, match=f"set.h5: test: {key} is a link, or data stored in other files .* not followed"
    ):
        open_split(path, "test")
    assert len(open_split(path, "dev").captions) == 4


@pytest.mark.parametrize(
    "link", [h5py.SoftLink("/dev"), h5py.SoftLink("/loop"), h5py.ExternalLink("other.h5", "/test")]
)
def test_a_linked_split_is_refused(path, tmp_path, link):
    external(path, tmp_path / "other.h5")
    with h5py.File(path, "a") as file:
        file["loop"] = link
    with pytest.raises(ValueError, match=r"set.h5: loop is a link, or data stored in other files"):
        open_split(path, "loop")
    assert len(open_split(path, "dev").captions) == 4


@pytest.mark.parametrize("kind", ["soft", "dangling", "external", "virtual"])
def test_links_do_not_hide_the_splits_beside_them(path, tmp_path, kind):
    external(path, tmp_path / "other.h5")
    with h5py.File(path, "a") as file:
        if kind == "virtual":
            file.create_virtual_dataset("a", virtual(path, tmp_path / "other.h5"))
        else:
            links = {"soft": h5py.SoftLink("/dev"), "dangling": h5py.SoftLink("/x")}
            file["a"] = links.get(kind, h5py.ExternalLink("other.h5", "/test"))
    assert split_names(path) == ["dev", "test"]
    with pytest.raises(FileNotFoundError, match=r"set.h5: tst: no such split; splits in this file: dev, test$"):
        open_split(path, "tst")


def test_a_second_name_in_the_file_is_fine(path):
    with h5py.File(path, "a") as file:
        file["testall"] = file["test"]
    assert split_names(path) == ["dev", "test", "testall"]
    assert np.array_equal(open_split(path, "testall").features[:], FEATURES)


@pytest.mark.parametrize("chunks", [None, (1, 3, 5)])
def test_data_that_were_never_written_are_refused(path, chunks):
    """HDF5 gives zeros for them, terabytes if need be."""
    edit(path, "features", shape=(4, 3, 5), dtype="f4", chunks=chunks)
    with pytest.raises(ValueError, match=r"features is declared as \[4, 3, 5\], but not all of it was written"):
        open_split(path, "test")
    if chunks:
        with h5py.File(path, "a") as file:
            file["test/features"][:3] = 1
        with pytest.raises(ValueError, match="not all of it was written"):
            open_split(path, "test")
    with h5py.File(path, "a") as file:
        file["test/features"][:] = 1
    assert open_split(path, "test").features[:].min() == 1


@pytest.mark.parametrize(
    "options", [{"compression": "gzip"}, {"chunks": (3, 2, 5), "shuffle": True}, {"maxshape": (None, 3, 5)}]
)
def test_any_layout_is_read(path, options):
    edit(path, "features", data=FEATURES.astype(">f8"), **options)
    assert np.array_equal(open_split(path, "test").features[[3, 0]], FEATURES[[3, 0]])


def test_damage_is_a_sentence_with_the_name_of_the_file(path, tmp_path):
    raw, random = path.read_bytes(), np.random.default_rng(0)
    refused = []
    # Not in the heaps of the texts: some damage there keeps HDF5 itself busy for ever.
    heaps = [at for at in range(len(raw)) if raw.startswith(b"GCOL", at)]
    places = [at for at in range(len(raw)) if raw[at] and not any(heap <= at < heap + 4096 for heap in heaps)]
    for number, at in enumerate(random.choice(places, 60, replace=False).tolist()):
        bad = tmp_path / f"bad{number}.h5"  # HDF5 would take a file of one name for the one that is open
        changed = bytes([raw[at] ^ 255]) if number % 3 else b""
        rest = raw[at + 1 :] if number % 3 == 1 else bytes(32) + raw[at + 33 :] if number % 3 else b""
        bad.write_bytes(raw[:at] + changed + rest)
        try:
            split = open_split(bad, "test")
            split.features[:], split.boxes[[0, 2]]
        except (ValueError, TypeError, OSError) as error:
            refused.append((bad, str(error)))
    assert 25 < len(refused) < 60
    assert [words for bad, words in refused if str(bad) not in words or "\n" in words] == []


def test_damage_that_shows_when_rows_are_read(path):
    edit(path, "features", data=FEATURES, chunks=(1, 3, 5), compression="gzip")
    with h5py.File(path) as file:
        at = file["test/features"].id.get_chunk_info(2).byte_offset
    raw = bytearray(path.read_bytes())
    raw[at : at + 8] = bytes(8)
    path.write_bytes(raw)
    split = open_split(path, "test")
    assert np.array_equal(split.features[:2], FEATURES[:2])
    for index in ([2], slice(None)):
        with pytest.raises(OSError, match=r"set.h5: test: features cannot be read, the file is damaged: "):
            split.features[index]


def test_other_files_are_refused(path, tmp_path):
    text = tmp_path / "text.h5"
    text.write_text("not HDF5")
    with pytest.raises(OSError, match=r"text.h5 is not an HDF5 file, or a damaged one"):
        open_split(text, "test")
    cut = tmp_path / "cut.h5"
    cut.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(OSError, match=r"cut.h5 is not an HDF5 file, or a damaged one"):
        open_split(cut, "test")
    with h5py.File(tmp_path / "foreign.h5", "w") as file:
        file["test"] = np.zeros(3)
    with pytest.raises(ValueError, match="without the attribute itm_fast_format"):
        open_split(tmp_path / "foreign.h5", "test")
    with h5py.File(path, "a") as file:
        file.attrs["itm_fast_format"] = 2
    with pytest.raises(ValueError, match="has itm_fast_format 2; this version of itm-fast reads 1"):
        open_split(path, "test")


@pytest.mark.parametrize("ended", [False, True], ids=["open", "left open"])
def test_a_file_that_is_open_for_writing_is_not_called_damaged(tmp_path, ended):
    path = tmp_path / "set.h5"
    code = f"import h5py, os; file = h5py.File({str(path)!r}, 'w', libver='latest'); file.attrs['itm_fast_format'] = 1;"
    code += "file.flush(); os._exit(0)" if ended else "print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as writer:
        writer.stdout.readline()
        for read in (lambda: open_split(path, "test"), lambda: split_names(path)):
            with pytest.raises(OSError, match=r"is open for writing in another process, or .* without closing") as told:
                read()
            assert (told.value.filename, "damaged" in str(told.value)) == (str(path), False)
    if not ended:
        assert split_names(path) == []


def test_a_missing_split_names_those_there_are(path):
    with h5py.File(path, "a") as file:
        file["loose"] = np.zeros(3)
    for missing in ("train", "loose"):
        with pytest.raises(FileNotFoundError, match="no such split; splits in this file: dev, test"):
            open_split(path, missing)


def test_captions_per_image_is_for_folders(path):
    with pytest.raises(ValueError, match="captions_per_image is for folders"):
        open_split(path, "test", captions_per_image=5)


def test_a_caption_with_nul_is_refused(tmp_path):
    split = Split(FEATURES, ["fine", "a\0b"], [0, 1])
    with pytest.raises(ValueError, match="caption 1 has a NUL character"):
        save_splits(tmp_path / "set.h5", {"test": split})
    assert not list(tmp_path.iterdir())
