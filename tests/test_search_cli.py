"""`itm-fast gallery` and `itm-fast search`: from data to results in the terminal, as JSON and on a page."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from itm_fast import Gallery
from itm_fast.cli import main
from itm_fast.cli._page import page
from itm_fast.cli._pictures import pictures_by_name
from itm_fast.data import save_splits
from itm_fast.data.openclipart import CHECKPOINTS, FOLDER
from itm_fast.gallery import Found, Recall
from itm_fast.models import load
from itm_fast.training import checkpoint

from .test_evaluation_report import options
from .test_gallery import IMAGES, loaded, ragged


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Two tiny checkpoints with their vocabulary, and data as HDF5."""
    root = tmp_path_factory.mktemp("search")
    save_splits(root / "pets.h5", {"test": ragged()})
    for kind in ("SGR", "SCAN"):
        model = loaded(kind)
        model.vocab.save(root / "vocab.json")
        states, opt = model.model.state_dict(), options(kind, len(model.vocab))
        checkpoint.save(root / f"{kind}.pth.tar", epoch=1, model=states, best_rsum=1.0, opt=opt, iterations=7)
    (root / "names.txt").write_text("".join(f"pet {n}.png\n" for n in range(IMAGES)))
    words = ["--checkpoint", f"{root}/SGR.pth.tar", "--first", f"{root}/SCAN.pth.tar", "--data", f"{root}/pets.h5"]
    words += ["--gallery", f"{root}/g", "--names", f"{root}/names.txt", "--no-progress", "--device", "cpu"]
    assert main(["gallery", *words]) == 0
    return root


def search(made: Path, *words: str) -> list[str]:
    return ["search", "--checkpoint", f"{made}/SGR.pth.tar", "--gallery", f"{made}/g", "--no-progress", *words]


def test_the_terminal_shows_names_scores_and_how_they_were_found(made, capsys):
    assert main(search(made, "-k", "3", "an old cat", "--device", "cpu")) == 0
    out, err = capsys.readouterr()
    found = Gallery.open(made / "g", load(made / "SGR.pth.tar", "cpu")).search(["an old cat"], 3)
    rows = [
        f"{rank:>4}  {name:<{max(map(len, found.names[0]))}}  {score:9.4f}"
        for rank, (name, score) in enumerate(zip(found.names[0], found.scores[0].tolist(), strict=True), 1)
    ]
    lines = out.splitlines()
    assert lines[:-1] == ["an old cat", "      unknown to the model: an", *rows]
    assert re.fullmatch(r"exact: SGR scored all 12 images \(\d+\.\d\d s\)", lines[-1])
    assert err == ""


def test_two_stages_are_called_approximate_on_the_last_line(made, capsys):
    words = ["two dogs", "--candidates", "6", "--first", f"{made}/SCAN.pth.tar", "-k", "2"]
    assert main(search(made, *words)) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("APPROXIMATE: SGR scored 6 of 12 images per caption, chosen by the pooled vectors of SCAN")
    assert re.search(r"[\d.]+% of the 2 best of exact search are found \(95 % interval [\d.]+% to [\d.]+%, ", last)


def test_a_list_from_standard_input_as_json(made, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("\ufeffold cat\n\n\u3000\n two dogs\xa0\n".encode())))
    assert main(search(made, "--json", "-k", "2", "-")) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["caption"] for row in found["results"]] == ["old cat", "two dogs"]
    assert (found["approximate"], found["recall_of_exact_search"], found["images"]) == (False, None, 12)
    assert {"image", "name", "score"} == set(found["results"][1]["found"][1])


@pytest.mark.parametrize(
    "words, sentence",
    [
        ([], 'give a caption in quotes, such as "a red kite over the sea", or -'),
        (["a cat", "-"], "- reads all captions from standard input; give it alone"),
        (["a cat", "--first", "x"], "--first chooses the candidates of an approximate search; say how many"),
        (["a cat", "--pictures", "."], "--pictures are for a page; name it with --html PAGE"),
        (["a cat", "--html", "x", "--pictures", "nowhere"], "--pictures nowhere is not a folder"),
        (["a cat", "--html", "nowhere/x.html"], "the folder of --html nowhere/x.html does not exist"),
        (["a cat", "--html", "."], "--html . is a folder; give the name of a file in it"),
        (["a cat", "--candidates", "6"], "a two-stage search of SGR needs first= (--first)"),
        (["a cat", "-k", "0"], "k must be at least 1, got 0"),
        ([" "], "captions[0] is blank"),
        (["a cat", "--gallery", "nowhere"], "nowhere does not exist: `itm-fast gallery`"),
    ],
)
def test_mistakes_are_one_sentence(made, capsys, words, sentence):
    assert main(search(made, *words)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("itm-fast search: ")
    assert sentence in line


def test_standard_input_of_white_space_alone_has_no_caption(made, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("\ufeff\n\u3000\n \n".encode())))
    assert main(search(made, "-")) == 2
    assert "standard input has no caption; give one a line" in capsys.readouterr().err


def test_standard_input_that_is_not_utf8_is_refused(made, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"old cat\n\ncaf\xe9\n")))
    assert main(search(made, "-")) == 2
    assert "line 3 of standard input is not UTF-8 (unexpected end of data): b'caf\\xe9'" in capsys.readouterr().err


def test_a_gallery_of_another_checkpoint_is_refused(made, capsys):
    assert main(search(made, "a cat", "--checkpoint", f"{made}/SCAN.pth.tar")) == 2
    assert "g was built with another checkpoint (SGR) than this one (SCAN t2i): " in capsys.readouterr().err


def shown(text: str) -> list[Image.Image]:
    found = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', text)
    return [Image.open(io.BytesIO(base64.b64decode(data))) for data in found]


@pytest.fixture
def found() -> Found:
    names = [["a.png", "<b>"], ["7", "../secret"]]
    recall = Recall(0.5, 0.4, 0.6, 10, 2, 3, 9, "SCAN <t2i>", "all products")
    two = np.zeros((2, 2))
    return Found(["<script>x</script>", "b & c"], two.astype(int), two, names, [["zebu"], []], "SGR", 9, 0.1, recall)


def test_a_page_holds_its_pictures_and_only_text_of_others(found, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    Image.new("RGBA", (900, 450), (255, 0, 0, 0)).save(folder / "a.png")
    Image.new("L", (20, 10)).save(folder / "COCO_val2014_000000000007.jpg")
    Image.new("L", (20, 10)).save(tmp_path / "secret.png")
    (folder / "<b>.jpg").write_text("no picture")
    text = page(found, pictures_by_name(str(folder), 320))
    assert [one.size for one in shown(text)] == [(320, 160), (20, 10)]
    assert min(shown(text)[0].getpixel((5, 5))) > 250  # transparent is white
    assert text.count("no picture") == 2
    for raw, escaped in (("<script>", "&lt;script&gt;x"), ("<b>", "&lt;b&gt;"), ("<t2i>", "&lt;t2i&gt;")):
        assert raw not in text
        assert escaped in text
    assert '<p class="approximate">APPROXIMATE: SGR scored 3 of 9 images per caption' in text
    assert "unknown to the model: zebu" in text
    assert not re.search(r"(src|href)=\"(?!data:)|url\(|@import", text)  # nothing is loaded from elsewhere
    assert shown(page(found, None)) == []


@pytest.mark.slow
def test_the_packaged_pictures_are_shown(tmp_path, capsys):
    words = ["--checkpoint", str(CHECKPOINTS["scan"]), "--gallery", f"{tmp_path}/g", "--no-progress"]
    assert main(["gallery", *words, "--data", str(FOLDER), "--half"]) == 0
    capsys.readouterr()
    assert main(["search", *words, "-k", "5", "--json", "--html", f"{tmp_path}/x.html", "a yellow duck", "a tree"]) == 0
    results = json.loads(capsys.readouterr().out)["results"]
    names = [line.split("\t")[0] for line in (FOLDER / "test_pictures.txt").read_text().splitlines()]
    assert all(names[one["image"]] == one["name"] for row in results for one in row["found"])
    assert [one.size for one in shown((tmp_path / "x.html").read_text())] == [(128, 128)] * 10
