"""`itm-fast demo`: both ways of scoring on a few of the shipped pictures, and the picture of the attention."""

import json
import math

import numpy as np
import pytest
from PIL import Image

from itm_fast.cli import _comparison, _picture, demo, main
from itm_fast.data import Vocabulary, encode_caption, open_split
from itm_fast.data.openclipart import FOLDER, VOCABULARY
from itm_fast.evaluation import metrics


def run(tmp_path, *options):
    return main(["demo", "--images", "24", "--output", str(tmp_path), *options])


def test_it_compares_draws_and_writes(tmp_path, capsys):
    assert run(tmp_path, "--queries", "3", "a red apple") == 0
    printed = capsys.readouterr().out
    for name in ("SGR", "SAF", "SGRAF", "SCAN t2i"):
        assert f"{name}, papers' loop" in printed
        assert f"{name}, itm-fast" in printed
    assert "chance" in printed
    assert printed.count("tables equal") == 4
    found = json.loads((tmp_path / "demo.json").read_text())
    assert [row["name"] for row in found["compared"]] == ["SGR", "SAF", "SGRAF", "SCAN t2i"]
    for row in found["compared"]:
        assert row["tables_equal"]
        assert row["largest_score_difference"] < 1e-5
        assert row["loop_seconds"] > 0
        assert math.isclose(row["ratio"], row["loop_seconds"] / row["itm_fast_seconds"])
    by_name = {system["name"]: system["pools"][0] for system in found["systems"]}
    assert by_name["SAF, itm-fast"]["images"] == 24
    assert {"torch", "threads", "device"} <= found["settings"].keys()
    systems = {system["name"]: system for system in found["systems"]}
    assert systems["SAF, papers' loop"]["backends"] == {}
    assert systems["SGRAF, itm-fast"]["backends"].keys() == {"similarity_filter_score", "similarity_graph_score"}
    assert systems["SCAN t2i, itm-fast"]["backends"] == {"cross_attention_score": found["settings"]["backend"]}
    with Image.open(tmp_path / "attention.png") as picture:
        assert picture.width == _picture.WIDTH
        assert picture.height > 600
    assert sorted(path.name for path in tmp_path.iterdir()) == ["attention.png", "demo.json"]


@pytest.mark.slow
def test_one_model_and_the_same_seed_draws_the_same(tmp_path, capsys):
    pictures = []
    for folder, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert run(tmp_path / folder, "--model", "scan", "--seed", seed) == 0
        pictures.append((tmp_path / folder / "attention.png").read_bytes())
    assert "SGR" not in capsys.readouterr().out
    assert pictures[0] == pictures[1] != pictures[2]


def test_a_difference_is_said_and_changes_the_exit_code(tmp_path, capsys, monkeypatch):
    honest = _comparison.scan.loop
    monkeypatch.setattr(_comparison.scan, "loop", lambda *given, **options: honest(*given, **options) * -1)
    assert run(tmp_path, "--model", "scan") == 1
    assert "tables DIFFER" in capsys.readouterr().out
    (row,) = json.loads((tmp_path / "demo.json").read_text())["compared"]
    assert row["largest_score_difference"] > 0.1
    assert row["queries_with_another_rank"] > 30  # of 24 images and as many captions


@pytest.mark.parametrize(
    "options,sentence",
    [
        (("--queries", "99999"), "caption 99999"),
        (("--queries", " "), "an empty query"),
        (("--images", "1"), "--images must be 2 to"),
        (("--full",), "--full uses all pictures, and --images some"),
    ],
)
def test_bad_options_are_a_sentence(tmp_path, capsys, options, sentence):
    assert run(tmp_path, *options) == 2
    captured = capsys.readouterr()
    assert sentence in captured.err
    assert "Traceback" not in captured.err
    assert not list(tmp_path.iterdir())


def test_answers_that_only_rounding_tells_apart_count_as_wrong_on_both_sides():
    owner = np.array([0, 1, 1])
    score = np.array([[0.5, 0.5 - 1e-7, 0.1], [0.2, 0.9, 0.3]], np.float32)
    for tied in (score, np.where(score == np.float32(0.5 - 1e-7), np.float32(0.5 + 1e-7), score)):
        lowered = _comparison._lowered(tied, owner)
        assert metrics(lowered, owner).i2t.r1 == 50
        assert (lowered != tied).sum() == 3


def test_heat_is_red_where_the_weight_is():
    weight = np.zeros((6, 6))
    weight[1, 4] = 1.0
    pixels = np.asarray(_picture.heat(Image.new("RGB", (60, 60), "white"), weight), np.int64)
    redness = pixels[:, :, 0] - pixels[:, :, 1]
    assert np.unravel_index(redness.argmax(), redness.shape) == pytest.approx((14.5, 44.5), abs=1)
    assert (pixels[30:, :30] == 255).all()


def test_default_queries_have_known_words_and_their_picture_first():
    split, vocabulary = open_split(FOLDER, "test"), Vocabulary.load(VOCABULARY)
    score = np.zeros((len(split.features), len(split.captions)), np.float32)
    first = set(range(0, len(split.captions), 10))
    for t in first:
        score[split.caption_to_image[t], t] = 1
    drawn = demo._drawn(score, split, vocabulary, 0)
    assert len(set(drawn)) == demo.DRAWN
    assert set(drawn) <= first
    for t in drawn:
        assert 3 not in encode_caption(split.captions[t], vocabulary)  # <unk>
    assert demo._drawn(score, split, vocabulary, 1) != drawn
