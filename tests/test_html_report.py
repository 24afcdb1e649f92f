"""report.html: complete in itself, with the numbers of the tables; the queries that failed worst; their pictures."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from itm_fast.cli import main
from itm_fast.cli._pictures import pictures_of
from itm_fast.data import Split
from itm_fast.evaluation import encode, metrics, rate, score_all
from itm_fast.evaluation.html_report import to_html
from itm_fast.evaluation.svg_charts import rank_chart, recall_chart
from itm_fast.evaluation.worst import rows_of_scorer

from .test_evaluation_report import models, pets

VOID = {"meta", "img"}


class Page(HTMLParser):
    """Checks that tags are closed; collects the tags, the cells of tables and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.text: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def made():
    """A report on random scores with ties, with hostile texts, and its scores."""
    rng = np.random.default_rng(0)
    score = rng.normal(size=(20, 60)).round(1).astype(np.float32)
    score[np.arange(60) // 3, np.arange(60)] += 1
    texts = [f"caption {t} <script>alert({t})</script> & \"'" for t in range(60)]
    found = rate(score, np.arange(60) // 3, name="<q>A&B", cutoffs=(2, 40), folds=2, captions=texts, worst=5)
    return found, score, texts


def test_the_page_needs_nothing_else_and_escapes_every_text(made):
    report, _, texts = made
    text = to_html(report, lambda number: b"\xff\xd8picture" if number % 2 else None)
    page = Page(text)
    assert not {"script", "link", "iframe", "q"} & {tag for tag, _ in page.tags}
    assert not re.search(r"https?:|url\(|@import", text)
    sources = [attrs["src"] for tag, attrs in page.tags if tag == "img"]
    assert sources
    assert set(sources) == {"data:image/jpeg;base64," + base64.b64encode(b"\xff\xd8picture").decode()}
    worst = next(query for query in report.systems[0].worst if query.side == "t2i")
    assert f"“{texts[worst.query]}”" in page.text


def test_the_page_has_the_numbers_of_the_tables(made):
    report, score, _ = made
    text = to_html(report)
    found = metrics(score, np.arange(60) // 3)
    rows = re.findall(r"<tr[^>]*><td>(.*?)</td></tr>", text)
    cells = [row.split("</td><td>") for row in rows if row.startswith("&lt;q&gt;")]
    by_ties = found.by_ties
    expected = ["&lt;q&gt;A&amp;B"]
    for side in ("i2t", "t2i"):
        for key in ("r1", "r5", "r10", "medr", "meanr"):
            value, *ends = (
                getattr(getattr(one, side), key) for one in (found, *map(by_ties.get, ("pessimistic", "optimistic")))
            )
            low, high = (f"{end:.1f}" for end in sorted(ends))
            expected.append(f"{value:.1f}" + (f"<small>{low}-{high}</small>" if low != high else ""))
    assert cells[1][:-1] == expected
    assert re.match(r"\d+\.\d<small>", cells[1][-1])  # rsum and its range
    assert len(cells[2]) == 1 + 2 * 2  # other cut-offs
    page = Page(text)  # tables wider than a telephone scroll, also by keys, and the page says so there
    assert [tag for tag, _ in page.tags].count("table") == text.count('<div class="wide" tabindex="0"><table')
    assert page.text.count("Tables scroll sideways.") == 1


def test_the_charts_show_recall_and_the_share_of_ranks(made):
    report, _, _ = made
    counted = [(system.name, system.counts) for system in report.systems]
    found = report.systems[0].pools[-1].metrics
    for side in ("i2t", "t2i"):
        chart = recall_chart(counted, side, "pessimistic")
        for k, value in zip((1, 5, 10), getattr(found, side).recalls, strict=True):
            assert f"R@{k} {value:.1f}</title>" in chart
        assert 'class="band"' in chart
        bars = re.findall(r"rank ([\d,-]+): ([\d.]+) %", rank_chart(counted, side, "pessimistic"))
        assert bars[0] == ("1", f"{getattr(found, side).r1:.1f}")
        assert [label for label, _ in bars[1:4]] == ["2", "3-4", "5-8"]
        assert sum(float(share) for _, share in bars) == pytest.approx(100, abs=0.05 * len(bars))


def test_a_pool_of_one_is_drawn():
    report = rate(np.ones((1, 1)), [0], worst=3)
    assert report.systems[0].worst == ()
    Page(to_html(report))


def test_the_worst_queries_are_those_of_a_sorted_list(made):
    report, score, _ = made
    owner = np.arange(60) // 3
    for side, rows in (("i2t", score), ("t2i", score.T)):
        ranked = []
        for query, row in enumerate(rows):
            right = np.flatnonzero(owner == query) if side == "i2t" else [owner[query]]
            wrong = np.setdiff1d(np.arange(len(row)), right)
            ranked.append(1 + int((row[wrong] >= row[right].max()).sum()))
        found = [query for query in report.systems[0].worst if query.side == side]
        order = np.argsort(-np.array(ranked), kind="stable")[:5]
        assert [query.query for query in found] == order.tolist()
        for one in found:
            row = rows[one.query]
            assert one.rank == ranked[one.query]
            right = np.flatnonzero(owner == one.query) if side == "i2t" else [owner[one.query]]
            assert one.right in right
            assert one.right_score == row[one.right] == row[right].max()
            assert [score for _, score in one.first] == sorted(row, reverse=True)[:3]
            assert all(row[item] == score for item, score in one.first)


def test_scores_of_queries_are_computed_again_without_a_matrix():
    split, vocabulary = pets(6, 3)
    split = Split(split.features[:], split.captions, split.caption_to_image, region_lengths=[36, 5, 9, 1, 30, 2])
    (model,) = models(vocabulary, "SGR")
    encoded = encode(model, split, vocabulary, progress=False)
    score = score_all(model.scorer, encoded, progress=False)
    rows = rows_of_scorer(model.scorer, encoded)
    np.testing.assert_allclose(rows("i2t", np.array([4, 1])), score[[4, 1]], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(rows("t2i", np.array([7, 2, 9])), score[:, [7, 2, 9]].T, rtol=1e-5, atol=1e-6)


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, color in (("COCO_val2014_000000000007.jpg", "red"), ("b.png", "blue")):
        Image.new("RGB", (400, 200), color).save(folder / name)
    (folder / "broken.jpg").write_bytes(b"\xff\xd8 no picture")
    Image.new("RGB", (8, 8), "green").save(tmp_path / "outside.png")
    return folder


def size(data: bytes, path) -> tuple[int, int]:
    path.write_bytes(data)
    with Image.open(path) as picture:
        return picture.size


def test_pictures_are_found_by_id_and_by_name(pictures, tmp_path):
    split = Split(np.zeros((2, 1, 3), np.float32), ["a", "b"], [0, 1], image_ids=[7, 8])
    found = pictures_of(str(pictures), str(tmp_path), "test", split)
    assert size(found(0), tmp_path / "x.jpg") == (144, 72)
    assert found(1) is None
    split = Split(np.zeros((4, 1, 3), np.float32), ["a"] * 4, [0, 1, 2, 3])
    (tmp_path / "test_pictures.txt").write_text("b 123\nbroken\n../outside.png\n\n")
    found = pictures_of(str(pictures), str(tmp_path), "test", split)
    assert size(found(0), tmp_path / "x.jpg") == (144, 72)
    assert [found(number) for number in (1, 2, 3)] == [None, None, None]  # the third leads out of the folder


@pytest.mark.parametrize(
    "ids, lines, folder, sentence",
    [
        (None, None, "pictures", "has no image ids, and there is no"),
        ([8, 9], None, "pictures", "no file name ends in an image id of the split, such as 8"),
        (None, "b\n", "pictures", "has 1 lines, and the test split 2 images"),
        (None, None, "none", "is no folder"),
    ],
)
def test_pictures_that_cannot_be_told_apart_are_refused(pictures, tmp_path, ids, lines, folder, sentence):
    split = Split(np.zeros((2, 1, 3), np.float32), ["a", "b"], [0, 1], image_ids=ids)
    if lines is not None:
        (tmp_path / "test_pictures.txt").write_text(lines)
    with pytest.raises(ValueError, match=sentence):
        pictures_of(str(tmp_path / folder), str(tmp_path), "test", split)


def test_pictures_without_a_report_are_refused(capsys):
    assert main(["evaluate", "--checkpoint", "x", "--data", "y", "--pictures", "z"]) == 2
    assert "--pictures are for report.html" in capsys.readouterr().err
