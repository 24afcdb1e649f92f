"""Word vectors: every form of file, what it lacks, and what is refused."""

import numpy as np
import pytest

from itm_fast.data import Vocabulary, load_word_vectors

WORDS = Vocabulary.build(["red cat naïve dog"], min_count=1)
VECTORS = {"cat": [0.5, -1.25, 3e-05], "zebra": [7, 8, 9], "naïve": [1, 2, 3], "dog": [-4, 5, 0.125]}


def text(vectors=VECTORS, head=""):
    lines = [" ".join([word, *map(str, numbers)]) for word, numbers in vectors.items()]
    return (head + "\n".join(lines) + "\n").encode()


def binary(end=b"\n", vectors=VECTORS):
    records = [word.encode() + b" " + np.array(v, "<f4").tobytes() + end for word, v in vectors.items()]
    return f"{len(vectors)} 3\n".encode() + b"".join(records)


FORMS = {
    "glove": text(),
    "word2vec-text": text(head="4 3\n"),
    "word2vec-binary": binary(),
    "word2vec-binary-without-newlines": binary(b""),
    "words-with-spaces": text({". . .": [1, 1, 1], **VECTORS, "at home": [2, 2, 2]}),
    "twice": text() + b"cat 9 9 9\n",
    "windows": text().replace(b"\n", b"\r\n"),
}


@pytest.mark.parametrize("content", FORMS.values(), ids=FORMS)
def test_every_form_gives_the_same(tmp_path, content):
    (tmp_path / "file").write_bytes(content)
    vectors, found = load_word_vectors(tmp_path / "file", WORDS)
    assert vectors.dtype == np.float32
    assert vectors.shape == (len(WORDS), 3)
    for word, index in WORDS.word2idx.items():
        assert found[index] == (word in VECTORS)
        np.testing.assert_array_equal(vectors[index], np.array(VECTORS.get(word, [0, 0, 0]), np.float32))


def test_a_long_binary_file_is_read_in_pieces(tmp_path):
    many = {f"w{n}": [n, n, n] for n in range(100_000)}
    (tmp_path / "file").write_bytes(binary(vectors={**many, **VECTORS}))
    vectors, found = load_word_vectors(tmp_path / "file", WORDS)
    assert int(found.sum()) == 3
    np.testing.assert_array_equal(vectors[WORDS("dog")], np.float32([-4, 5, 0.125]))


def test_an_array_has_a_row_for_every_word(tmp_path):
    rows = np.random.default_rng(0).standard_normal((len(WORDS), 5)).astype(np.float16)
    np.save(tmp_path / "rows.npy", rows)
    vectors, found = load_word_vectors(tmp_path / "rows.npy", WORDS)
    np.testing.assert_array_equal(vectors, rows.astype(np.float32))
    assert found.all()


def test_a_model_of_numbers_is_not_taken_for_a_header(tmp_path):
    """GloVe vectors of one number: the first line has two parts, as word2vec's has."""
    (tmp_path / "file").write_bytes(b"cat 2.5\ndog 3.5\n")
    vectors, _ = load_word_vectors(tmp_path / "file", WORDS)
    assert vectors[WORDS("dog")].tolist() == [3.5]


REFUSED = {
    "empty": (b"\n", "is empty; word vectors are GloVe"),
    "prose": (b"This is no file of vectors\n", "does not begin with a word and its numbers"),
    "one part": (b"cat\n", "does not begin with a word and its numbers"),
    "short line": (text() + b"red 1 2\n", "line 5: must be a word and 3 numbers, got 3 parts"),
    "no number": (text() + b"red 1 2 x\n", "line 5: 3 numbers must follow the word"),
    "other words": (text({"zebra": [1, 2, 3]}), "none of the vocabulary's 8 words"),
    "infinite": (text({"cat": [1, "inf", 3]}), "the vector of 'cat' holds NaN or infinity"),
    "cut short": (binary()[:-9], "ends within record 4 of 4"),
}


@pytest.mark.parametrize("content,sentence", REFUSED.values(), ids=REFUSED)
def test_refusals(tmp_path, content, sentence):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match=sentence):
        load_word_vectors(tmp_path / "file", WORDS)


def test_an_array_of_another_vocabulary_is_refused(tmp_path):
    for wrong in (np.zeros((3, 5), np.float32), np.zeros(len(WORDS), np.float32), np.zeros((len(WORDS), 2), int)):
        np.save(tmp_path / "rows.npy", wrong)
        with pytest.raises(ValueError, match="with a row for each of the vocabulary's 8 words"):
            load_word_vectors(tmp_path / "rows.npy", WORDS)
    with pytest.raises(FileNotFoundError):
        load_word_vectors(tmp_path / "absent", WORDS)
