"""Splits in memory and in SCAN's folder form."""

import numpy as np
import pytest

from itm_fast.data import Rows, Split, convert, open_split, save_splits, split_names

RNG = np.random.default_rng(0)
FEATURES = RNG.standard_normal((4, 3, 5)).astype(np.float32)  # I 4, R 3, F 5


def write_folder(folder, features=FEATURES, captions=20, split="test", **arrays):
    np.save(folder / f"{split}_ims.npy", features)
    lines = captions if isinstance(captions, list) else [f"caption {t}" for t in range(captions)]
    (folder / f"{split}_caps.txt").write_bytes(b"".join(line.encode() + b"\n" for line in lines))
    for name, array in arrays.items():
        np.save(folder / f"{split}_{name}.npy", array)
    return folder


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64, ">f4"])
def test_five_captions_per_image(tmp_path, dtype):
    stored = FEATURES.astype(dtype)
    split = open_split(write_folder(tmp_path, stored), "test")
    assert split.features.shape == (4, 3, 5)
    assert split.features[:].dtype == np.float32
    assert np.array_equal(split.features[1:3], stored[1:3].astype(np.float32))
    assert split.caption_to_image.tolist() == [t // 5 for t in range(20)]
    assert split.caption_to_image.dtype == np.int64
    assert split.captions[7] == "caption 7"
    assert split.features.stored_dtype == (np.float16 if dtype == np.float16 else np.float32)


def test_captions_per_image_other_than_five(tmp_path):
    split = open_split(write_folder(tmp_path, captions=12), "test")
    assert split.caption_to_image.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]


def test_a_row_per_caption_is_read_once_per_image(tmp_path):
    split = open_split(write_folder(tmp_path, FEATURES.repeat(5, axis=0)), "test")
    assert len(split.features) == 4
    assert np.array_equal(split.features[:], FEATURES)
    assert np.array_equal(split.features[1:3], FEATURES[1:3])
    assert np.array_equal(split.features[[3, 0, 3]], FEATURES[[3, 0, 3]])
    assert split.caption_to_image.tolist() == [t // 5 for t in range(20)]


def test_as_many_different_rows_as_captions_are_ambiguous(tmp_path):
    features = RNG.standard_normal((10, 3, 5)).astype(np.float32)
    write_folder(tmp_path, features, captions=10)
    with pytest.raises(ValueError, match=r"10 rows of features and 10 captions.*captions_per_image=1"):
        open_split(tmp_path, "test")
    assert open_split(tmp_path, "test", captions_per_image=1).caption_to_image.tolist() == list(range(10))
    every_fifth = open_split(tmp_path, "test", captions_per_image=5)
    assert np.array_equal(every_fifth.features[:], features[::5])
    with pytest.raises(ValueError, match=r"10 rows.*10 captions do not fit captions_per_image=3"):
        open_split(tmp_path, "test", captions_per_image=3)


@pytest.mark.parametrize("captions", [7, 3, 21])
def test_counts_that_do_not_divide_are_refused_by_name(tmp_path, captions):
    write_folder(tmp_path, captions=captions)
    with pytest.raises(ValueError, match=rf"4 rows of features and {captions} captions.*test_caption_to_image.npy"):
        open_split(tmp_path, "test")


def test_a_map_file_allows_any_number_of_captions(tmp_path):
    write_folder(tmp_path, captions=4, caption_to_image=np.array([2, 0, 2, 3], np.int32))
    split = open_split(tmp_path, "test")
    assert len(split.features) == 4
    assert split.caption_to_image.tolist() == [2, 0, 2, 3]
    assert split.caption_to_image.dtype == np.int64
    with pytest.raises(ValueError, match="leave captions_per_image out"):
        open_split(tmp_path, "test", captions_per_image=1)


@pytest.mark.parametrize(
    ("bad", "error", "words"),
    [
        ([0, 1, 2, 4], ValueError, r"caption_to_image must lie in 0\.\.3, got 4 for caption 3"),
        ([0, -1, 2, 3], ValueError, r"caption_to_image must lie in 0\.\.3, got -1 for caption 1"),
        ([0, 1, 2], ValueError, r"caption_to_image must have one entry per caption, \[4\], got shape \[3\]"),
        ([0.0, 1.0, 2.0, 3.0], TypeError, "caption_to_image must be integers, got float64"),
    ],
)
def test_a_wrong_map_is_refused(tmp_path, bad, error, words):
    write_folder(tmp_path, captions=4, caption_to_image=np.array(bad))
    with pytest.raises(error, match=words):
        open_split(tmp_path, "test")


def test_int8_features_are_scaled(tmp_path):
    quantised = RNG.integers(-127, 128, (4, 3, 5)).astype(np.int8)
    scale = np.array([0.5, 1, 2, 4, 0.125], np.float32)
    write_folder(tmp_path, quantised, ims_scale=scale)
    split = open_split(tmp_path, "test")
    want = quantised.astype(np.float32) * scale
    assert split.features[:].dtype == np.float32
    assert np.array_equal(split.features[:], want)
    assert np.array_equal(split.features[[2, 1]], want[[2, 1]])
    assert np.array_equal(split.first(10).features[:], want[:2])
    np.save(tmp_path / "test_ims_scale.npy", scale[:4])
    with pytest.raises(ValueError, match=r"test_ims_scale.npy must be float32 \[5\], got float32 \[4\]"):
        open_split(tmp_path, "test")
    (tmp_path / "test_ims_scale.npy").unlink()
    with pytest.raises(FileNotFoundError, match=r"test_ims_scale.npy does not exist; int8 features need"):
        open_split(tmp_path, "test")


def test_a_scale_beside_float_features_is_refused(tmp_path):
    write_folder(tmp_path, ims_scale=np.ones(5, np.float32))
    with pytest.raises(ValueError, match="is for int8 features, and these are float32"):
        open_split(tmp_path, "test")


def test_region_lengths_and_boxes(tmp_path):
    boxes = RNG.random((4, 3, 4)).astype(np.float32)
    write_folder(tmp_path, region_lengths=np.array([3, 1, 2, 3]), boxes=boxes)
    split = open_split(tmp_path, "test")
    assert split.region_lengths.dtype == np.int32
    assert split.region_lengths.tolist() == [3, 1, 2, 3]
    assert np.array_equal(split.boxes[[2]], boxes[[2]])
    np.save(tmp_path / "test_region_lengths.npy", np.array([3, 0, 2, 4]))
    with pytest.raises(ValueError, match=r"region_lengths must lie in 1\.\.3, got 0 for image 1"):
        open_split(tmp_path, "test")
    np.save(tmp_path / "test_region_lengths.npy", np.array([3, 1, 2, 3]))
    np.save(tmp_path / "test_boxes.npy", boxes[:, :2])
    with pytest.raises(ValueError, match=r"boxes must be \[4, 3, 4\] \(I, R, 4\), got \[4, 2, 4\]"):
        open_split(tmp_path, "test")


def test_captions_are_read_as_published(tmp_path):
    text = "  two  words\r\n\n caf\u00e9 \u00a0\t\nlast".encode()
    write_folder(tmp_path)
    (tmp_path / "test_caps.txt").write_bytes(text)
    split = open_split(tmp_path, "test", captions_per_image=1)
    assert split.captions == ["two  words", "", "caf\u00e9 \u00a0", "last"]


def test_blank_lines_are_named(tmp_path):
    captions = [f"caption {t}" for t in range(20)]
    write_folder(tmp_path, captions=[*captions[:6], " \t", *captions[6:]])  # one more than fits
    for more in ({}, {"captions_per_image": 5}):
        with pytest.raises(
            ValueError, match=r"4 rows of features and 21 captions \(blank lines in .*test_caps.txt: 7\)"
        ):
            open_split(tmp_path, "test", **more)
    np.save(tmp_path / "test_caption_to_image.npy", np.arange(20) // 5)
    with pytest.raises(ValueError, match=r"image.npy is for 20 captions, not 21; blank lines in .*test_caps.txt: 7$"):
        open_split(tmp_path, "test")
    (tmp_path / "test_caption_to_image.npy").unlink()
    write_folder(tmp_path, captions=[""] * 7 + captions[7:])
    with pytest.warns(UserWarning, match=r"blank lines in .*caps.txt: 1, 2, 3, 4, 5, \.\.\.; as in the published code"):
        assert open_split(tmp_path, "test").captions == [""] * 7 + captions[7:]


def test_a_folder_with_one_array_per_image_says_what_to_do(tmp_path):
    np.save(tmp_path / "1000092795.npy", FEATURES[0])
    np.save(tmp_path / "10002456.npy", FEATURES[1])
    words = r"It holds 2 other .npy files, such as 1000092795.npy: .* one array SPLIT_ims.npy.*--mask-zero-regions"
    with pytest.raises(FileNotFoundError, match=f"test_ims.npy does not exist.*{words}"):
        open_split(tmp_path, "test")
    with pytest.raises(ValueError, match=f"holds no splits.*{words}"):
        convert(tmp_path, tmp_path / "out.h5")


def test_a_line_that_is_not_utf8_is_named(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "test_caps.txt").write_bytes(b"fine\ncaf\xe9 noir\n")
    with pytest.raises(ValueError, match=r"test_caps.txt, line 2: not UTF-8"):
        open_split(tmp_path, "test")


def test_ids_per_image_and_per_caption(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "test_ids.txt").write_text("11\n12\n13\n14\n")
    (tmp_path / "test_capids.txt").write_text("".join(f"{100 + t}\n" for t in range(20)))
    split = open_split(tmp_path, "test")
    assert split.image_ids.tolist() == [11, 12, 13, 14]
    assert split.caption_ids.tolist() == list(range(100, 120))
    (tmp_path / "test_ids.txt").write_text("".join(f"{11 + t // 5}\n" for t in range(20)))
    assert open_split(tmp_path, "test").image_ids.tolist() == [11, 12, 13, 14]


@pytest.mark.parametrize(
    ("lines", "why"),
    [
        ("11\n12\n", "it has 2 ids where 4 or 20 were expected"),
        ("a.jpg\n" * 4, "not one whole number a line"),
        ("".join(f"{t}\n" for t in range(20)), "captions of one image have different ids"),
    ],
)
def test_id_files_that_do_not_fit_are_ignored_with_a_warning(tmp_path, lines, why):
    write_folder(tmp_path)
    (tmp_path / "test_ids.txt").write_text(lines)
    with pytest.warns(UserWarning, match=f"test_ids.txt is ignored: .*{why}"):
        split = open_split(tmp_path, "test")
    assert split.image_ids is None


def test_dev_is_cut_only_when_asked(tmp_path):
    features = np.zeros((1014, 1, 2), np.float32)
    write_folder(tmp_path, features, 5070, "dev", region_lengths=np.ones(1014, np.int64))
    (tmp_path / "dev_ids.txt").write_text("".join(f"{i}\n" for i in range(1014)))
    assert len(open_split(tmp_path, "dev").captions) == 5070
    cut = open_split(tmp_path, "dev", limit_captions=5000)
    assert (len(cut.captions), len(cut.features), cut.features[:].shape) == (5000, 1000, (1000, 1, 2))
    assert len(cut.region_lengths) == len(cut.image_ids) == 1000
    with pytest.raises(IndexError):
        cut.features[[1000]]
    assert len(open_split(tmp_path, "dev", limit_captions=6000).captions) == 5070
    with pytest.raises(ValueError, match="at least 1, got 0"):
        open_split(tmp_path, "dev", limit_captions=0)


def test_nothing_is_read_before_it_is_asked_for(tmp_path):
    rows = 1 << 22
    with open(tmp_path / "test_ims.npy", "wb") as file:  # 151 GB, sparse
        header = {"descr": "<f4", "fortran_order": False, "shape": (rows, 36, 256)}
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(file.tell() + rows * 36 * 256 * 4)
    (tmp_path / "test_caps.txt").write_text("a\n")
    np.save(tmp_path / "test_caption_to_image.npy", np.array([rows - 1]))
    split = open_split(tmp_path, "test")
    assert split.features[[rows - 1, 5]].sum() == 0


def test_missing_files_name_the_splits_there_are(tmp_path):
    with pytest.raises(FileNotFoundError, match="splits in this folder: none"):
        open_split(tmp_path, "test")
    (tmp_path / "f30k").mkdir()
    write_folder(tmp_path / "f30k", split="test")
    with pytest.raises(FileNotFoundError, match=r"folder: none; there are some in [^,]*f30k; give that folder$"):
        open_split(tmp_path, "test")
    for name in "abcde":
        (tmp_path / "many" / name).mkdir(parents=True)
        write_folder(tmp_path / "many" / name, split="test")
    with pytest.raises(FileNotFoundError, match=r"many/d, [^,]*many/e; give that folder$"):
        open_split(tmp_path / "many", "test")
    (tmp_path / "f30k").rename(tmp_path / "many" / "f30k")
    with pytest.raises(FileNotFoundError, match=r"many/e, \.\.\.; give that folder$"):
        open_split(tmp_path / "many", "test")
    (tmp_path / "many" / "f30k").rename(tmp_path / "f30k")
    with pytest.raises(ValueError, match=r"test_ims\.npy is one file of a split; give its folder, or an HDF5 file"):
        open_split(tmp_path / "f30k" / "test_ims.npy", "test")
    write_folder(tmp_path, split="testall")
    write_folder(tmp_path, split="dev")
    with pytest.raises(FileNotFoundError, match=r"test_ims.npy does not exist; splits in this folder: dev, testall"):
        open_split(tmp_path, "test")
    (tmp_path / "dev_caps.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"dev_caps.txt does not exist"):
        open_split(tmp_path, "dev")
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        open_split(tmp_path / "nowhere", "dev")
    assert split_names(tmp_path) == ["dev", "testall"]


def test_a_truncated_npy_is_refused(tmp_path):
    path = write_folder(tmp_path) / "test_ims.npy"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"test_ims.npy is not a whole .npy file"):
        open_split(tmp_path, "test")


class Bomb:
    def __reduce__(self):
        return print, ("unpickled",)


def test_pickles_are_refused(tmp_path, capsys):
    write_folder(tmp_path)
    np.save(tmp_path / "test_ims.npy", np.array([Bomb()], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"test_ims.npy is not a whole .npy file"):
        open_split(tmp_path, "test")
    (tmp_path / "test_ims.npy").write_bytes(b"\x80\x04K\x01.")
    with pytest.raises(ValueError, match=r"test_ims.npy is not a .npy file"):
        open_split(tmp_path, "test")
    assert "unpickled" not in capsys.readouterr().out


@pytest.mark.parametrize("shape", [(20, 5), (4, 3, 5, 1), (4, 0, 5), ()])
def test_features_of_wrong_shape_are_refused(tmp_path, shape):
    write_folder(tmp_path, np.zeros(shape, np.float32))
    with pytest.raises(ValueError, match=r"\[I, R, F\]|not a whole .npy"):
        open_split(tmp_path, "test")


@pytest.mark.parametrize("dtype", [np.int32, np.uint8, np.complex64, "<U3"])
def test_features_of_wrong_kind_are_refused(tmp_path, dtype):
    write_folder(tmp_path, np.zeros((4, 3, 5), dtype))
    with pytest.raises(TypeError, match=r"must be float32, float16, float64 or int8, got"):
        open_split(tmp_path, "test")


def test_no_captions_are_refused(tmp_path):
    write_folder(tmp_path, captions=0, caption_to_image=np.zeros(0, np.int64))
    with pytest.raises(ValueError, match=r"no captions|not a whole .npy"):
        open_split(tmp_path, "test")
    with pytest.raises(ValueError, match="there are no captions"):
        Split(FEATURES, [], [])


def test_rows_by_slices_and_indices():
    rows = Rows(FEATURES)
    for index in (slice(None), slice(1, 3), slice(None, None, 2), slice(None, None, -1), slice(3, 1), slice(-2, None)):
        assert np.array_equal(rows[index], FEATURES[index]), index
    assert rows[[]].shape == (0, 3, 5)
    assert np.array_equal(rows[np.array([3, 3, 0], np.int32)], FEATURES[[3, 3, 0]])
    taken = rows[0:2]
    taken[:] = 7
    assert not (FEATURES == 7).any()
    for wrong in ([4], [-1]):
        with pytest.raises(IndexError, match="array of 4 rows"):
            rows[wrong]
    for wrong in (0, [[0]], [0.0], [True, False, True, False]):
        with pytest.raises(TypeError, match="slice or by integers"):
            rows[wrong]


def test_a_limit_beyond_the_captions_cuts_no_image():
    assert len(Split(FEATURES, ["a"], [0]).first(1).features) == 4


def test_split_in_memory_refuses_what_it_cannot_read():
    with pytest.raises(TypeError, match="features must be a numpy array of floating-point numbers, got int64"):
        Split(np.zeros((1, 1, 1), np.int64), ["a"], [0])
    with pytest.raises(TypeError, match="got list"):
        Split([[[0.0]]], ["a"], [0])
    with pytest.raises(ValueError, match=r"image_ids must have one entry per image, \[4\]"):
        Split(FEATURES, ["a"], [0], image_ids=[1])


def test_a_repeated_folder_survives_saving(tmp_path):
    write_folder(tmp_path, FEATURES.repeat(5, axis=0))
    save_splits(tmp_path / "again", {"test": open_split(tmp_path, "test")})
    assert np.array_equal(np.load(tmp_path / "again" / "test_ims.npy"), FEATURES)
