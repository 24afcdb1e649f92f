"""Tokens, word ids and vocabulary files."""

import json
import pickle
import subprocess
import sys
import types
import warnings
import zipfile

import nltk
import numpy as np
import pytest
from nltk.tokenize import word_tokenize
from nltk.tokenize.destructive import NLTKWordTokenizer

from itm_fast.data import Vocabulary, encode_caption, tokenize
from itm_fast.data.tokens import _SEVERAL, _word_tokenizer

TRICKY = [
    "A man's dog can't swim.",
    'Two dogs, one "ball" -- and a t-shirt/sweater (red) .',
    "He said: 'it is 3.50$ & 10%' ...",
    "a mr. smith stands. he waves.",
    "One. Two. Three",
    "gonna wanna cannot d'ye",
    "caf\u00e9 \u2018quoted\u2019 \u201cdouble\u201d \u00abguillemets\u00bb",
    "tab\tand  spaces\u00a0here",
    "ends with dots...",
    "?!;:@#",
    "",
    "   ",
    "<unk> <start>",
    "I\u2019m \U0001f408 na\u00efve",
]


def lowered(text):
    return text.encode().lower().decode()


@pytest.fixture
def no_punkt(monkeypatch):
    monkeypatch.setattr(nltk.data, "path", [])
    yield from cleared()


@pytest.fixture
def punkt(monkeypatch, tmp_path):
    """A punkt model that knows one abbreviation, so that sentence splitting is seen to follow it."""
    folder = tmp_path / "tokenizers" / "punkt_tab" / "english"
    folder.mkdir(parents=True)
    for name in ("collocations.tab", "sent_starters.txt", "ortho_context.tab"):
        (folder / name).write_text("")
    (folder / "abbrev_types.txt").write_text("mr\n")
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    yield from cleared()


def cleared():
    from nltk.tokenize import _get_punkt_tokenizer

    for cache in (_word_tokenizer, _get_punkt_tokenizer):
        cache.cache_clear()
    yield
    for cache in (_word_tokenizer, _get_punkt_tokenizer):
        cache.cache_clear()


@pytest.mark.parametrize("text", TRICKY)
def test_with_punkt_tokens_are_those_of_word_tokenize(punkt, text):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tokenize(text) == word_tokenize(lowered(text))


def test_punkt_splits_sentences(punkt):
    assert tokenize("a mr. smith stands. he waves.") == ["a", "mr.", "smith", "stands", ".", "he", "waves", "."]


@pytest.mark.filterwarnings("ignore:NLTK's punkt")
@pytest.mark.parametrize("text", TRICKY)
def test_without_punkt_tokens_follow_the_word_rules(no_punkt, text):
    assert tokenize(text) == NLTKWordTokenizer().tokenize(lowered(text))


def test_without_punkt_the_first_caption_of_several_sentences_is_warned_of(no_punkt):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for plain in ("a cat sits.", "a cat ... sits", "3.5 cats, e.g.cats! they sit. ", "?!", "no. "):
            tokenize(plain)
        assert not caught
        assert tokenize("a cat. it sits.") == ["a", "cat.", "it", "sits", "."]
        tokenize("a dog. it sits.")
    assert len(caught) == 1
    assert str(caught[0].message).startswith("NLTK's punkt data are not installed: captions of several sentences")
    assert "keep 'cat.' as one word, where the published tokens are 'cat' and '.'" in str(caught[0].message)
    assert caught[0].filename == __file__


def test_where_nothing_is_warned_of_sentences_change_nothing(punkt):
    """punkt knows one abbreviation here and splits wherever it can."""
    random, said = np.random.default_rng(0), 0
    parts = [*"abc", "mr", "3", "'s", *".,:;?!()[]-", "...", *[" "] * 12]
    for _ in range(3000):
        text = "".join(random.choice(parts, random.integers(3, 16))).strip()
        differs = tokenize(text) != word_tokenize(text, preserve_line=True)
        said += differs
        assert _SEVERAL.search(text) or not differs, text
    assert said > 30


def damage_folder(tokenizers):
    (tokenizers / "punkt_tab" / "english").mkdir(parents=True)
    for name in ("collocations.tab", "sent_starters.txt", "ortho_context.tab", "abbrev_types.txt"):
        (tokenizers / "punkt_tab" / "english" / name).write_bytes(b"\xff\x00one\ttwo\tthree\n")


def damage_zip(tokenizers):
    (tokenizers / "punkt_tab.zip").write_bytes(b"PK\x03\x04cut")


def foreign_zip(tokenizers):
    with zipfile.ZipFile(tokenizers / "punkt_tab.zip", "w") as archive:
        archive.writestr("punkt_tab/german/abbrev_types.txt", "dr\n")


def empty_folder(tokenizers):
    (tokenizers / "punkt_tab" / "english").mkdir(parents=True)


@pytest.mark.parametrize("damage", [damage_folder, damage_zip, foreign_zip, empty_folder])
def test_damaged_punkt_data_are_named_and_not_used(monkeypatch, tmp_path, damage):
    (tmp_path / "tokenizers").mkdir()
    damage(tmp_path / "tokenizers")
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path / "nowhere"), str(tmp_path)])
    for _ in cleared():
        with pytest.warns(
            UserWarning, match=f"^NLTK's punkt data in {tmp_path}/tokenizers/punkt_tab.* cannot be read "
        ) as told:
            assert tokenize("a cat. it sits.") == ["a", "cat.", "it", "sits", "."]
        assert "`python -m nltk.downloader punkt_tab`" in str(told[0].message)
        assert "\n" not in str(told[0].message)


def test_too_little_memory_is_not_called_damaged_punkt_data(monkeypatch, punkt):
    def exhausted(*_, **__):
        raise MemoryError

    monkeypatch.setattr("nltk.tokenize.word_tokenize", exhausted)
    with pytest.raises(MemoryError):
        tokenize("a cat. it sits.")
    monkeypatch.undo()
    assert tokenize("a cat") == ["a", "cat"]


@pytest.mark.filterwarnings("ignore:NLTK's punkt")
def test_only_ascii_letters_are_lowered():
    assert tokenize("\u00c9cole \u0130stanbul ABC") == ["\u00c9cole", "\u0130stanbul", "abc"]


@pytest.mark.filterwarnings("ignore:NLTK's punkt")
def test_ids():
    vocabulary = Vocabulary(["<pad>", "<start>", "<end>", "<unk>", "a", "cat"])
    assert encode_caption("A cat sits", vocabulary) == [1, 4, 5, 3, 2]
    assert encode_caption("", vocabulary) == [1, 2]
    assert encode_caption("<pad>", vocabulary) == [1, 3, 3, 3, 2]
    assert vocabulary("zebra") == vocabulary("<unk>") == 3


@pytest.mark.filterwarnings("ignore:NLTK's punkt")
def test_build_counts_tokens():
    captions = ["The red cat"] * 3 + ["a red dog", "a Cat", "a dog", "a dog", "a dog"]
    vocabulary = Vocabulary.build(captions)
    assert vocabulary.idx2word == dict(enumerate(["<pad>", "<start>", "<end>", "<unk>", "red", "cat", "a", "dog"]))
    assert vocabulary("the") == 3
    with pytest.raises(ValueError, match="min_count must be at least 1, got 0"):
        Vocabulary.build(captions, min_count=0)


@pytest.mark.filterwarnings("ignore:NLTK's punkt")
@pytest.mark.parametrize(
    ("captions", "words"),
    [
        (
            ["一只黑色的狗", "两个小女孩"] * 2,
            r"no word appears 4 times in these 4 captions, which have 1\.0 words each",
        ),
        (
            ["一只黑色的狗 .", "两个小女孩 .", "长椅 .", "男人 ."],
            r"which have 2\.0 words each.*lower min_count \(--min-count\)",
        ),
        (["", ""], r"in these 2 captions, which have 0\.0 words each"),
        ([], "in these 0 captions"),
    ],
)
def test_a_vocabulary_that_knows_no_word_is_not_built(captions, words):
    with pytest.raises(ValueError, match=words):
        Vocabulary.build(captions)


def test_saved_as_published(tmp_path):
    words = ["<pad>", "<start>", "<end>", "<unk>", "caf\u00e9", '"``']
    path = tmp_path / "vocab.json"
    Vocabulary(words).save(path)
    word2idx = {word: i for i, word in enumerate(words)}
    published = {"word2idx": word2idx, "idx2word": dict(enumerate(words)), "idx": 6}
    assert path.read_text() == json.dumps(published)
    assert [file.name for file in tmp_path.iterdir()] == ["vocab.json"]
    loaded = Vocabulary.load(path)
    assert loaded.word2idx == word2idx
    assert loaded.idx2word == dict(enumerate(words))


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    Vocabulary(["<pad>", "<start>", "<end>", "<unk>"]).save(tmp_path / "vocab.json")
    before = (tmp_path / "vocab.json").read_bytes()

    def fail(*paths):
        raise OSError("no room")

    monkeypatch.setattr("itm_fast.data.vocabulary.os.replace", fail)
    with pytest.raises(OSError, match="no room"):
        Vocabulary(["<pad>", "<start>", "<end>", "<unk>", "cat"]).save(tmp_path / "vocab.json")
    assert (tmp_path / "vocab.json").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


GOOD = {
    "word2idx": {"<pad>": 0, "<start>": 1, "<end>": 2, "<unk>": 3, "cat": 4},
    "idx2word": {"0": "<pad>", "1": "<start>", "2": "<end>", "3": "<unk>", "4": "cat"},
    "idx": 5,
}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"[" * 100_000, "vocab.json is not a JSON file"),
        (b'{"caf\xe9": 1}', "vocab.json, line 1: not UTF-8"),
        ('{"word2idx": {}}'.encode("utf-16"), "vocab.json, line 1: this is UTF-16"),
        (b"{", "is not a JSON file"),
        ([1], "is not a vocabulary"),
        ({"cat": 1}, "is not a vocabulary"),
        (GOOD | {"idx": "5"}, "is not a vocabulary"),
        (GOOD | {"idx": 10**12}, "is not a consistent vocabulary: idx is 1000000000000"),
        (GOOD | {"idx2word": GOOD["idx2word"] | {"4": "dog"}}, "is not a consistent vocabulary"),
        (GOOD | {"idx2word": GOOD["idx2word"] | {"4": ["cat"]}}, "is not a consistent vocabulary"),
        (GOOD | {"word2idx": GOOD["word2idx"] | {"cat": 7}}, "is not a consistent vocabulary"),
        (GOOD | {"word2idx": GOOD["word2idx"] | {"dog": 4}}, "is not a consistent vocabulary"),
        (
            {"word2idx": {"cat": 0}, "idx2word": {"0": "cat"}, "idx": 1},
            "vocab.json: a vocabulary must begin with <pad>",
        ),
    ],
)
def test_other_files_are_refused(tmp_path, content, words):
    path = tmp_path / "vocab.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    with pytest.raises(ValueError, match=words):
        Vocabulary.load(path)


def test_a_good_file_is_taken(tmp_path):
    (tmp_path / "vocab.json").write_text(json.dumps(GOOD))
    assert Vocabulary.load(tmp_path / "vocab.json")("cat") == 4
    (tmp_path / "vocab.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode())
    assert Vocabulary.load(tmp_path / "vocab.json")("cat") == 4
    with pytest.raises(FileNotFoundError):
        Vocabulary.load(tmp_path / "other.json")


PICKLED = Vocabulary([*GOOD["word2idx"]][:4] + ["caf\u00e9"])


def python2_pickle():
    """As Python 2 writes a new-style object of __main__: special words are its bytes, others its unicode."""
    words = ["<pad>", "<start>", "<end>", "<unk>"]
    lines = [
        "ccopy_reg\n_reconstructor\n(c__main__\nVocabulary\nc__builtin__\nobject\nNtR(dS'idx'\nI5\nsS'idx2word'\n(d"
    ]
    lines += [f"I{i}\nS'{word}'\ns" for i, word in enumerate(words)] + ["I4\nVcaf\\u00e9\ns", "sS'word2idx'\n(d"]
    lines += [f"S'{word}'\nI{i}\ns" for i, word in enumerate(words)] + ["Vcaf\\u00e9\nI4\ns", "sb."]
    return "".join(lines).encode()


def python3_pickle(protocol, module="vocab"):
    made = type("Vocabulary", (), {"__module__": module})()
    made.word2idx, made.idx2word, made.idx = PICKLED.word2idx, PICKLED.idx2word, 5
    holder = types.ModuleType(module)
    holder.Vocabulary = type(made)
    before = sys.modules.get(module)
    sys.modules[module] = holder
    try:
        return pickle.dumps(made, protocol)
    finally:
        del sys.modules[module]
        if before is not None:
            sys.modules[module] = before


def test_a_pickled_vocabulary_is_read(tmp_path):
    raws = [python2_pickle(), *(python3_pickle(protocol) for protocol in range(6))]
    raws += [raws[0].replace(b"Vcaf\\u00e9", b"S'caf\\xc3\\xa9'")]  # captions that nobody decoded
    raws += [python3_pickle(2, "__main__"), python3_pickle(4, "scan_vocab")]
    raws += [pickle.dumps({"word2idx": PICKLED.word2idx, "idx2word": PICKLED.idx2word, "idx": 5})]
    for raw in raws:
        (tmp_path / "vocab.pkl").write_bytes(raw)
        assert Vocabulary.load(tmp_path / "vocab.pkl").word2idx == PICKLED.word2idx
        assert "vocab" not in sys.modules


class Hostile:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (pickle.dumps(Hostile(print, ("ran",))), "it names builtins.print, which no vocabulary needs"),
        (pickle.dumps(Hostile(eval, ("print('ran')",)), 0), "it names __builtin__.eval|it names builtins.eval"),
        (b"cos\nsystem\n(S'echo ran'\ntR.", "it names os.system"),
        (b"(ios\nsystem\n(S'echo ran'\n.", "it names os.system"),
        (b"c__main__\nVocabulary.__init__\n.", "it names __main__.Vocabulary.__init__"),
        (b"\x80\x04\x82\x01.", "unregistered extension code 1"),
        (b"\x80\x02P1\n.", "is no pickle of a published vocabulary; nothing in it was run: "),
        (b"\x80\x04]\x94r\xff\xff\xff\x7f.", "is not a vocabulary: "),
        (b"(" * 100_000, "is no pickle of a published vocabulary"),
        (python3_pickle(4)[:-20], "is no pickle of a published vocabulary"),
        (b"\x80", "is no pickle of a published vocabulary"),
        (b"\x80\x04K\x01.", "is no pickle of a published vocabulary"),
        (pickle.dumps([1, 2]), "is no pickle of a published vocabulary"),
        (pickle.dumps({"cat": 1}), "is not a vocabulary: it must hold objects word2idx and idx2word"),
        (pickle.dumps(GOOD | {"idx": 4}), "is not a consistent vocabulary: idx is 4"),
    ],
)
def test_other_pickles_are_refused_and_not_run(tmp_path, capfd, raw, words):
    (tmp_path / "vocab.pkl").write_bytes(raw)
    with pytest.raises(ValueError, match=words) as refused:
        Vocabulary.load(tmp_path / "vocab.pkl")
    assert str(refused.value).startswith(f"{tmp_path / 'vocab.pkl'} is no")
    assert "ran" not in capfd.readouterr().out


def test_words_are_named_once():
    with pytest.raises(ValueError, match="'cat' twice"):
        Vocabulary(["<pad>", "<start>", "<end>", "<unk>", "cat", "dog", "cat"])


def test_heavy_packages_wait_until_needed():
    program = "import itm_fast, itm_fast.data, sys; print([m for m in ('h5py', 'nltk') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
