"""Files that a run must not overwrite, data that it must not go on with, and words that it cannot learn from."""

from __future__ import annotations

import re
import warnings

import numpy as np
import pytest
import torch
from training_cases import DEV, TRAIN, WORDS, log_rows, run_tiny, tiny_options

from itm_fast.cli import main
from itm_fast.data import Split, Vocabulary, save_splits
from itm_fast.training import resume, train, trainer
from itm_fast.training.log import COLUMNS

OTHERS = Vocabulary([*WORDS.idx2word.values()][:-1] + ["zebra"])


def _captioned(captions: list[str]) -> Split:
    return Split(np.ones((2, 36, 12), np.float32), captions, np.arange(len(captions)) % 2)


def _train(output, captions, words, dev_captions=None):
    dev = DEV if dev_captions is None else _captioned(dev_captions)
    opt = tiny_options("scan")
    return train(opt, _captioned(captions), dev, words, output, progress=False, device="cpu", max_steps=1)


@pytest.mark.parametrize("content", ["other words", "no vocabulary"])
def test_a_vocabulary_that_stands_in_the_folder_is_not_overwritten(tmp_path, content):
    file = tmp_path / "data_vocab.json"
    if content == "other words":
        OTHERS.save(file)
    else:
        file.write_text("mine")
    before = file.read_bytes()
    with pytest.raises(FileExistsError, match=r"data_vocab\.json is there already and holds other words .* --vocab /"):
        run_tiny(tmp_path)
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_equal_words_in_the_folder_stay_as_they_are(tmp_path):
    file = tmp_path / "data_vocab.json"
    WORDS.save(file)
    file.write_bytes(before := file.read_bytes() + b"\n")
    run_tiny(tmp_path, max_steps=1)
    assert file.read_bytes() == before


def test_training_into_the_folder_of_the_data_spares_their_vocabulary(tmp_path, capsys):
    folder = tmp_path / "f30k_precomp"
    save_splits(folder, {"train": TRAIN, "dev": DEV})
    OTHERS.save(folder / "f30k_precomp_vocab.json")
    before = (folder / "f30k_precomp_vocab.json").read_bytes()
    words = ["train", "--model", "dual", "--data", f"{folder}", "--output", f"{folder}", "--min-count", "1"]
    assert main([*words, "--quiet", "--device", "cpu"]) == 2
    assert f"{folder}/f30k_precomp_vocab.json is there already" in capsys.readouterr().err
    assert (folder / "f30k_precomp_vocab.json").read_bytes() == before


def test_a_run_that_cannot_start_writes_no_vocabulary(tmp_path):
    opt = tiny_options("scan")
    opt.embed_size = 10**7
    with pytest.raises(ValueError, match="choose smaller sizes"):
        run_tiny(tmp_path, opt=opt)
    assert not list(tmp_path.iterdir())


def test_a_run_whose_log_cannot_be_written_writes_no_vocabulary(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trainer, "Log", full)
    with pytest.raises(OSError, match="No space"):
        run_tiny(tmp_path)
    assert not list(tmp_path.iterdir())


HEADER = ",".join(COLUMNS) + "\n"


@pytest.mark.parametrize(
    "text",
    ["a,b\n1,2\n", "iteration,mine\n1,2\n", HEADER + "1,6" + "," * 15 + "99\n", HEADER + "," * 99 + "\n", ""],
    ids=["another table", "another one with iterations", "a whole epoch", "damaged", "empty"],
)
def test_a_new_run_does_not_touch_a_log_that_is_there(tmp_path, text):
    (tmp_path / "log.csv").write_text(text)
    with pytest.raises(FileExistsError, match=r"log\.csv exists, and a new run does not overwrite it"):
        run_tiny(tmp_path)
    assert (tmp_path / "log.csv").read_text() == text
    assert not (tmp_path / "data_vocab.json").exists()


def test_a_log_of_a_run_that_saved_nothing_is_begun_anew(tmp_path):
    (tmp_path / "log.csv").write_text(HEADER + "1,1,0.5" + "," * 14 + "\n")
    run_tiny(tmp_path, max_steps=1)
    assert [row["iteration"] for row in log_rows(tmp_path)] == ["1", "1"]


@pytest.mark.parametrize(
    "damage, why",
    [
        (lambda b: b.replace(b"epoch,", b"time,", 1), "its columns are not epoch, iteration, loss, ..."),
        (lambda b: b"", "its columns are not epoch"),
        (lambda b: b[:-1] + b"," * 9 + b"9\n", "a row has more values than there are columns"),
        (lambda b: b + b"\xff\n", "'utf-8' codec can't decode"),
        (lambda b: b + b'"', "unexpected end of data"),
    ],
)
def test_a_damaged_log_is_named_and_left_by_a_resumption(tmp_path, damage, why):
    run_tiny(tmp_path, max_steps=1)
    file = tmp_path / "log.csv"
    file.write_bytes(before := damage(file.read_bytes()))
    with pytest.raises(ValueError, match=rf"log\.csv is damaged, or is not the log .*: .*{re.escape(why)}.*; move it"):
        run_tiny(tmp_path, resuming=True)
    assert file.read_bytes() == before
    file.unlink()
    assert run_tiny(tmp_path, resuming=True).iterations == 12


def _changed(split: Split, what: str) -> Split:
    features, captions, owner = split.features[:], list(split.captions), split.caption_to_image.copy()
    lengths = np.full(len(features), 36)
    if what == "first image":
        features[0, 3, 5] += 1
    elif what == "last image":
        features[-1, 3, 5] += 1
    elif what == "captions":
        captions[:2] = captions[1::-1]
    elif what == "owners":
        owner = owner[::-1].copy()
    elif what == "regions":
        lengths[2] = 30
    return Split(features, captions, owner, lengths)


@pytest.mark.parametrize("name", ["training", "dev"])
@pytest.mark.parametrize("what", ["first image", "last image", "captions", "owners", "regions"])
def test_other_data_of_the_same_counts_are_not_resumed_with(tmp_path, monkeypatch, name, what):
    run_tiny(tmp_path, max_steps=1)
    splits = {"training": TRAIN, "dev": DEV, name: _changed({"training": TRAIN, "dev": DEV}[name], what)}
    with pytest.raises(ValueError, match=rf"belongs to a run with other captions or features in its {name} split"):
        _resumed(tmp_path, splits)
    splits[name] = _changed({"training": TRAIN, "dev": DEV}[name], "nothing")
    assert _resumed(tmp_path, splits).iterations == 2


def _resumed(output, splits):
    opt = tiny_options("scan")
    return train(
        opt, splits["training"], splits["dev"], WORDS, output, progress=False, device="cpu", resuming=True, max_steps=2
    )


def test_a_run_from_before_checksums_of_the_data_is_resumed(tmp_path):
    run_tiny(tmp_path, max_steps=1)
    content = torch.load(tmp_path / resume.NAME, weights_only=True)
    content["data"] = content["data"][:2]
    torch.save(content, tmp_path / resume.NAME)
    assert run_tiny(tmp_path, resuming=True, max_steps=2).iterations == 2
    assert len(resume.load(tmp_path).data) == 6


@pytest.mark.parametrize("known, refused", [(0, True), (1, True), (2, False)])
def test_captions_that_hardly_ever_have_a_known_word_are_refused(tmp_path, known, refused):
    captions = ["a red dog"] * known + ["zwei rote hunde"] * (10 - known)
    share = f"{100 - 10 * known}.0 % of the captions have no known word"
    if refused:
        with pytest.raises(ValueError, match=rf"training split's unknown words: .*{share}; is the voc.*--vocab"):
            _train(tmp_path, captions, WORDS)
        assert not list(tmp_path.iterdir())
        return
    with pytest.warns(UserWarning, match=rf"training split's unknown words: .*{share}"):
        _train(tmp_path, captions, WORDS)


def test_a_vocabulary_of_whole_captions_is_warned_of(tmp_path):
    captions = ["a" * n for n in range(1, 7)] + ["zz"] * 4
    with pytest.warns(UserWarning, match=r"60\.0 % of the captions have no known word.*separated by spaces"):
        _train(tmp_path, captions, Vocabulary.build(captions, min_count=4))


@pytest.mark.parametrize("unknown", [0, 2, 10])
def test_a_dev_split_of_unknown_words_is_warned_of(tmp_path, unknown):
    dev = ["red"] * (10 - unknown) + ["rot"] * unknown
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        _train(tmp_path, ["a red dog"] * 10, WORDS, dev)
    sentences = [str(one.message) for one in told if "unknown words" in str(one.message)]
    assert ["dev split's" in sentence for sentence in sentences] == [True] * (unknown > 0)
