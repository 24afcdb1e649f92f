"""Which arguments are accepted as captions, and how text files are decoded."""

import os
import re
import socket
import warnings

import numpy as np
import pytest

from itm_fast._files import open_regular
from itm_fast.data import Split, Vocabulary, caption_batches, encode_caption, load_word_vectors, open_split, tokenize

pytestmark = pytest.mark.filterwarnings("ignore:NLTK's punkt")

FEATURES = np.ones((2, 3, 4), np.float32)
VOCABULARY = Vocabulary.build(["a red dog", "one cat"], min_count=1)


class Column:
    """Like a column of a table: a length, one dimension, its entries in order."""

    ndim, shape = 1, (2,)

    def __len__(self):
        return 2

    def __iter__(self):
        return iter(["a red dog", "one cat"])


class Table(Column):
    """Iterating over it gives the names of its columns."""

    ndim, shape = 2, (2, 2)


GOOD = {
    "list": ["a red dog", "one cat"],
    "tuple": ("a red dog", "one cat"),
    "numpy": np.array(["a red dog", "one cat"]),
    "numpy objects": np.array(["a red dog", "one cat"], object),
    "numpy bytes": np.array([b"a red dog", b"one cat"]),
    "bytes": [b"a red dog", b"one cat"],
    "generator": (text for text in ["a red dog", "one cat"]),
    "column": Column(),
    "byte-order mark": ["\ufeffa red dog", b"\xef\xbb\xbfone cat"],
}
BAD = {
    "one text": ("a red dog", TypeError, r"must be a list of texts, got the single text 'a red dog'; write \['a red"),
    "one long text": ("a " * 100, TypeError, "got the single text .{60}"),
    "bytes alone": (b"a dog", TypeError, "got the single text b'a dog'"),
    "none": (None, TypeError, "must be a list of texts, one for each caption, got None"),
    "number": (3, TypeError, "got int 3"),
    "dict": ({"a": 1}, TypeError, "must be a list of texts, one for each caption, got dict of 1"),
    "set": ({"a dog"}, TypeError, "got set of 1"),
    "table": (Table(), TypeError, r"got Table \[2, 2\]"),
    "matrix": (np.array([["a dog"], ["b"]]), TypeError, r"got ndarray \[2, 1\]"),
    "scalar": (np.array("a dog"), TypeError, r"got ndarray \[\]"),
    "nested": (
        ["a", ["b", "c"]],
        TypeError,
        r"captions\[1\] must be a text \(str\), got list of 2; give one flat list",
    ),
    "missing": (["a", float("nan")], TypeError, r"captions\[1\] must be a text \(str\), got float nan; leave that"),
    "nothing": (["a", None], TypeError, r"captions\[1\] must be a text \(str\), got None; leave that caption out"),
    "ids": (np.array([1, 2]), TypeError, r"captions\[0\] must be a text \(str\), got int64 \[\]"),
    "no line breaks": (
        ["a", "dog " * 50_000],
        ValueError,
        r"captions\[1\] has 200,000 characters, and a caption may have 10,000; is a line break missing\?",
    ),
    "half a character": (["a", "b\ud83d"], ValueError, r"captions\[1\] holds '\\ud83d', half of a surrogate pair"),
    "not UTF-8": (["a", b"\xe9t\xe9"], ValueError, r"captions\[1\] is not UTF-8 \(.*\): b'\\xe9t\\xe9'"),
}


def by_split(captions):
    return Split(FEATURES, captions, [0, 1]).captions


def by_batches(captions):
    batches = [(index.tolist(), ids.tolist()) for index, ids, _ in caption_batches(captions, VOCABULARY)]
    names = {i: word for word, i in VOCABULARY.word2idx.items()}
    found = {t: " ".join(names[i] for i in row if i > 3) for index, ids in batches for t, row in zip(index, ids)}
    return [found[t] for t in sorted(found)]


def by_vocabulary(captions):
    assert list(Vocabulary.build(captions, min_count=1).word2idx)[4:] == ["a", "red", "dog", "one", "cat"]
    return ["a red dog", "one cat"]


@pytest.mark.parametrize("take", [by_split, by_batches, by_vocabulary])
def test_sequences_of_texts_are_taken(take):
    for kind, captions in GOOD.items():
        if kind == "generator":
            captions = iter(GOOD["list"])
        assert take(captions) == ["a red dog", "one cat"], kind


@pytest.mark.parametrize("take", [by_split, by_batches, by_vocabulary])
@pytest.mark.parametrize(("captions", "error", "words"), BAD.values(), ids=BAD)
def test_other_captions_are_refused_by_argument_and_row(take, captions, error, words):
    name = {by_split: "split: ", by_batches: "caption_batches: ", by_vocabulary: "Vocabulary.build: "}[take]
    with pytest.raises(error, match=f"^{name}captions.*{words.removeprefix('captions')}"):
        take(captions)


def test_the_longest_caption():
    assert len(tokenize("dog " * 2_500)) == 2_500
    with pytest.raises(ValueError, match="tokenize: text has 10,001 characters"):
        tokenize("dog " * 2_500 + ".")


def test_captions_become_plain_str():
    assert {type(caption) for caption in by_split(np.array(["a red dog", "one cat"]))} == {str}


def test_one_caption_is_a_text():
    assert tokenize(b"A \xc3\xa9 cat") == tokenize("A \u00e9 cat") == ["a", "\u00e9", "cat"]
    assert tokenize("\ufeffcat") == ["cat"]
    for wrong in (["a cat"], None, 3.0):
        with pytest.raises(TypeError, match=r"tokenize: text must be a text \(str\), got"):
            encode_caption(wrong, VOCABULARY)


def folder(path, captions):
    np.save(path / "test_ims.npy", FEATURES)
    (path / "test_caps.txt").write_bytes(captions)
    return path


@pytest.mark.parametrize("before", [" \ufeff", "\ufeff\ufeff", "\ufeff \ufeff", "\u3000\t\ufeff  "])
def test_byte_order_marks_after_white_space_or_in_a_row_belong_to_no_word(tmp_path, before):
    text = f"{before}dog"
    assert tokenize(text) == tokenize(text.encode()) == ["dog"]
    assert encode_caption(text, VOCABULARY) == encode_caption("dog", VOCABULARY)
    assert Vocabulary.build([text], min_count=1).idx2word[4] == "dog"
    assert Split(FEATURES, [text, "a"], [0, 1]).captions == ["dog", "a"]
    assert open_split(folder(tmp_path, f"{text}\na\n".encode()), "test", captions_per_image=1).captions == ["dog", "a"]
    (tmp_path / "test_ids.txt").write_text(f"{before}7\n8\n", encoding="utf-8")
    assert open_split(tmp_path, "test", captions_per_image=1).image_ids.tolist() == [7, 8]


def test_a_byte_order_mark_belongs_to_no_word(tmp_path):
    # The second one: two files put together.
    split = open_split(folder(tmp_path, b"\xef\xbb\xbfdog runs\n\xef\xbb\xbfcat\n"), "test", captions_per_image=1)
    assert split.captions == ["dog runs", "cat"]
    (tmp_path / "test_ids.txt").write_bytes(b"\xef\xbb\xbf7\n8\n")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_split(tmp_path, "test", captions_per_image=1).image_ids.tolist() == [7, 8]
    (tmp_path / "vectors.txt").write_bytes(b"\xef\xbb\xbfdog 1 2\ncat 3 4\n")
    vectors, _ = load_word_vectors(tmp_path / "vectors.txt", VOCABULARY)
    assert vectors[VOCABULARY("dog")].tolist() == [1, 2]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("dog runs\ncat\n".encode("utf-16"), "line 1: this is UTF-16 or UTF-32; convert the file to UTF-8"),
        ("dog runs\ncat\n".encode("utf-32"), "line 1: this is UTF-16 or UTF-32"),
        (b"\xfe\xff" + "dog runs\ncat\n".encode("utf-16-be"), "line 1: this is UTF-16"),
        ("dog runs\ncat\n".encode("utf-16-le"), "line 1: holds a NUL character, as UTF-16 and damaged files do"),
        (b"dog runs\nca\0t\n", "line 2: holds a NUL character"),
        (b"dog runs\nca\xe9\n", "line 2: not UTF-8 .*; convert the file to UTF-8"),
    ],
)
def test_other_encodings_are_named_with_file_and_line(tmp_path, content, words):
    with pytest.raises(ValueError, match=f"^{re.escape(str(tmp_path))}/test_caps.txt, {words}"):
        open_split(folder(tmp_path, content), "test", captions_per_image=1)
    (tmp_path / "vocab.json").write_bytes(content)
    with pytest.raises(ValueError, match=f"vocab.json, {words}"):
        Vocabulary.load(tmp_path / "vocab.json")


def test_word_vectors_in_utf16_are_refused(tmp_path):
    (tmp_path / "vectors.txt").write_bytes("dog 1 2\n".encode("utf-16"))
    with pytest.raises(ValueError, match=r"vectors.txt, line 1: this is UTF-16 or UTF-32; convert the file to UTF-8"):
        load_word_vectors(tmp_path / "vectors.txt", VOCABULARY)


def place(kind, path):
    path.unlink(missing_ok=True)
    if kind == "folder":
        path.mkdir()
    elif kind == "FIFO":
        os.mkfifo(path)
    elif kind == "socket":
        socket.socket(socket.AF_UNIX).bind(os.path.relpath(path))
    else:
        path.symlink_to("/dev/zero")


@pytest.mark.parametrize("kind", ["folder", "FIFO", "socket", "device"])
def test_what_is_no_regular_file_is_refused_at_once(tmp_path, kind):
    """A FIFO would wait for a writer for ever, a device never end."""
    folder(tmp_path, b"dog runs\ncat\n" * 5)
    place(kind, tmp_path / "thing")
    with pytest.raises(OSError, match=f"is a {kind}, and a .*file is needed.*thing"):
        open_regular(tmp_path / "thing")
    for file in ("vocab.json", "vectors.txt", "set.h5", "test_caps.txt", "test_ims.npy", "test_ids.txt"):
        place(kind, tmp_path / file)
    readers = {
        "vocab.json": lambda: Vocabulary.load(tmp_path / "vocab.json"),
        "vectors.txt": lambda: load_word_vectors(tmp_path / "vectors.txt", VOCABULARY),
        "test_ims.npy": lambda: open_split(tmp_path, "test"),
    }
    if kind != "folder":  # that would be a data folder without splits
        readers["set.h5"] = lambda: open_split(tmp_path / "set.h5", "test")
    for name, read in readers.items():
        with pytest.raises(OSError, match=f"is a {kind}, and a .*file is needed.*{name}"):
            read()
    (tmp_path / "test_ims.npy").rmdir() if kind == "folder" else (tmp_path / "test_ims.npy").unlink()
    np.save(tmp_path / "test_ims.npy", FEATURES)
    with pytest.raises(OSError, match=rf"is a {kind}, and a .*file is needed.*test_caps.txt"):
        open_split(tmp_path, "test")
    (tmp_path / "test_caps.txt").rmdir() if kind == "folder" else (tmp_path / "test_caps.txt").unlink()
    (tmp_path / "test_caps.txt").write_text("dog runs\ncat\n" * 5)
    with pytest.raises(OSError, match=rf"is a {kind}, and a .*file is needed.*test_ids.txt"):
        open_split(tmp_path, "test")
