"""Arrays that stay in their file: damaged .npy files, and splits that go to another process."""

import copy
import multiprocessing
import os
import pickle

import h5py
import numpy as np
import pytest

from itm_fast.data import Split, TrainingBatches, Vocabulary, load_word_vectors, open_split, save_splits
from itm_fast.data.stored import open_npy

pytestmark = pytest.mark.filterwarnings("ignore:NLTK's punkt")

RNG = np.random.default_rng(0)
FEATURES = RNG.standard_normal((40, 3, 500)).astype(np.float32)  # 240 kB
BOXES = RNG.random((40, 3, 4)).astype(np.float32)


def header(text, version=1, data=bytes(240)):
    size = len(text).to_bytes(2 if version == 1 else 4, "little")
    return b"\x93NUMPY" + bytes([version, 0]) + size + text.encode("latin1") + data


DAMAGED = {
    "negative shape": header("{'descr': '<f4', 'fortran_order': False, 'shape': (-4, 3, 5), }\n"),
    "two negative sizes": header("{'descr': '<f4', 'fortran_order': False, 'shape': (-4, -3, 5), }\n"),
    "larger than the file": header("{'descr': '<f4', 'fortran_order': False, 'shape': (5, 3, 5), }\n"),
    "terabytes": header("{'descr': '<f4', 'fortran_order': False, 'shape': (2000000000, 36, 2048), }\n"),
    "beyond 64 bits": header("{'descr': '<f4', 'fortran_order': False, 'shape': (18446744073709551616, 3, 5), }\n"),
    "wraps to nothing": header("{'descr': '<f4', 'fortran_order': False, 'shape': (4294967296, 4294967296, 1), }\n"),
    "objects": header("{'descr': '|O', 'fortran_order': False, 'shape': (4, 3, 5), }\n"),
    "brackets": header("(" * 9000 + "\n"),
    "a program": header("{'descr': __import__('os').getcwd(), 'fortran_order': False, 'shape': (4, 3, 5), }\n"),
    "no dict": header("[1, 2]\n"),
    "no dtype": header("{'descr': 'unheard of', 'fortran_order': False, 'shape': (4, 3, 5), }\n"),
    "odd shape": header("{'descr': '<f4', 'fortran_order': False, 'shape': (4, None, 'x'), }\n"),
    "long header": header("{'descr': '<f4', " + " " * 20000 + "}\n", 2),
    "version 9": header("{'descr': '<f4', 'fortran_order': False, 'shape': (4, 3, 5), }\n", 9),
    "head alone": b"\x93NUMPY\x01\x00",
    "empty": b"",
    "text": b"not an array",
    "zip archive": b"PK\x03\x04" + bytes(100),
}


OTHER = {"text": "is not a .npy file", "zip archive": "is not a .npy file but an archive, such as .npz, which may hold"}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_npy_is_one_sentence_with_its_name(tmp_path, name, recwarn):
    content, what = DAMAGED[name], OTHER.get(name, "is not a whole .npy file of numbers: ")
    (tmp_path / "test_ims.npy").write_bytes(content)
    (tmp_path / "test_caps.txt").write_text("a dog\n" * 20)
    with pytest.raises(ValueError, match=rf"^.*test_ims.npy {what}[^\n]*$"):
        open_split(tmp_path, "test")
    for part in ("caption_to_image", "region_lengths", "boxes"):
        np.save(tmp_path / "test_ims.npy", FEATURES[:4])
        (tmp_path / f"test_{part}.npy").write_bytes(content)
        with pytest.raises(ValueError, match=f"test_{part}.npy {what}"):
            open_split(tmp_path, "test")
        (tmp_path / f"test_{part}.npy").unlink()
    if content.startswith(b"\x93NUMPY"):  # word vectors may be other files too
        (tmp_path / "vectors").write_bytes(content)
        with pytest.raises(ValueError, match=r"vectors is not a whole .npy file of numbers: "):
            load_word_vectors(tmp_path / "vectors", Vocabulary.build(["a dog"], min_count=1))
    assert not recwarn.list


class Exhausted:
    """Stands for an open file: reading from it needs more memory than there is."""

    def __getattr__(self, name):
        raise MemoryError("Unable to allocate 3 TiB")

    def __getitem__(self, index):
        raise MemoryError("Unable to allocate 3 TiB")


@pytest.mark.parametrize("form", ["set.h5", "folder"])
def test_too_little_memory_is_not_called_damage(tmp_path, monkeypatch, form):
    save_splits(tmp_path / form, {"test": Split(FEATURES, ["a"] * 40, range(40), boxes=BOXES)})
    split = open_split(tmp_path / form, "test")
    monkeypatch.setattr(split.features._source, "_array", Exhausted())
    with pytest.raises(MemoryError, match="Unable to allocate 3 TiB"):
        split.features[:]
    monkeypatch.setattr(h5py, "File", lambda *_: Exhausted())
    monkeypatch.setattr(np.lib.format, "open_memmap", lambda *_, **__: Exhausted())
    with pytest.raises(MemoryError, match="Unable to allocate 3 TiB"):
        open_split(tmp_path / form, "test")


def test_any_byte_order_and_layout_is_read(tmp_path):
    for stored in (FEATURES.astype(">f4"), np.asfortranarray(FEATURES), FEATURES.astype(np.longdouble)):
        save_splits(tmp_path, {"test": Split(FEATURES, ["a"] * 40, range(40))}, force=True)
        np.save(tmp_path / "test_ims.npy", stored)
        split = open_split(tmp_path, "test")
        assert np.array_equal(split.features[:], FEATURES)
        assert np.array_equal(split.features[[7, 3]], FEATURES[[7, 3]])


def test_an_opened_npy_cannot_be_written_to(tmp_path):
    np.save(tmp_path / "x.npy", FEATURES)
    with pytest.raises(ValueError, match="read-only"):
        open_npy(tmp_path / "x.npy")[0] = 1


def saved(path):
    captions = [f"a dog {t}" for t in range(40)]
    save_splits(path, {"train": Split(FEATURES, captions, range(40), [1 + i % 3 for i in range(40)], BOXES)})
    return open_split(path, "train")


@pytest.mark.parametrize("name", ["set.h5", "folder"])
def test_a_pickled_split_is_small_and_opens_its_files_again(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    split = saved(name)  # by a relative name
    for one in (split, split.first(20)):
        raw = pickle.dumps(one)
        assert len(raw) < 10_000
        monkeypatch.chdir("/")
        for again in (pickle.loads(raw), copy.deepcopy(one), pickle.loads(pickle.dumps(pickle.loads(raw)))):
            for index in (slice(None), [3, 1], slice(0, 2)):
                assert np.array_equal(again.features[index], one.features[index])
                assert np.array_equal(again.boxes[index], one.boxes[index])
            assert (again.captions, again.name) == (one.captions, one.name)
            assert np.array_equal(again.caption_to_image, one.caption_to_image)
            assert np.array_equal(again.region_lengths, one.region_lengths)


@pytest.mark.parametrize("name", ["set.h5", "folder"])
@pytest.mark.parametrize("change", ["size", "time", "gone"])
def test_a_file_that_changed_before_it_was_opened_again_is_refused(tmp_path, name, change):
    raw = pickle.dumps(saved(tmp_path / name))
    file = tmp_path / name if name == "set.h5" else tmp_path / name / "train_ims.npy"
    stamp = file.stat()
    if change == "gone":
        file.unlink()
    elif change == "size":
        with open(file, "ab") as out:
            out.write(b"x")
        os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    else:
        os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns + 1000))
    again = pickle.loads(raw)
    error, words = (FileNotFoundError, "") if change == "gone" else (ValueError, " has changed since it was opened")
    with pytest.raises(error, match=f"{file.name}{words}"):
        again.features[:]


def first_batch(batches):
    return next(batches.epoch(0)).features.double().sum().item()


def test_training_batches_go_to_a_spawned_process(tmp_path):
    made = [TrainingBatches(saved(tmp_path / n), Vocabulary.build(["a dog"], min_count=1), 8) for n in ("s.h5", "f")]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.map(first_batch, made) == [first_batch(batches) for batches in made]
