"""A report as table, JSON, CSV and LaTeX: all its numbers differ, so each is found in its own place or nowhere."""

from __future__ import annotations

import csv
import itertools
import json
import re
from dataclasses import replace

import numpy as np
import pytest

from itm_fast.evaluation import TIES, Direction, Metrics, Pool, Report, System
from itm_fast.evaluation.report import speed_line

SIDES = ("i2t", "t2i")
RELEVANCE = ("eccv_map_at_r", "eccv_rprecision", "eccv_r1", "cxc_r1", "cxc_r5", "cxc_r10")


def report(folds: int = 3, ties: str = "published", **settings) -> Report:
    """Two systems; no two numbers are equal, even when rounded to one digit."""
    values = (number / 10 for number in itertools.count(1))
    sizes = itertools.count(1000)

    def side() -> Direction:
        found = [next(values) for _ in range(8)]
        return Direction(*found[:5], next(sizes), tuple(found[5:]))

    def metrics(ties: str, others: tuple[Metrics, ...] = ()) -> Metrics:
        return Metrics(side(), side(), next(sizes), next(sizes), ties, others)

    def whole() -> Metrics:
        return metrics(ties, tuple(metrics(rule) for rule in TIES if rule != ties))

    def system(name: str) -> System:
        parts = tuple(whole() for _ in range(folds))
        pools = (Pool(whole(), parts), Pool(whole())) if folds else (Pool(whole()),)
        least, published, most = ({key: {side: next(values) for side in SIDES} for key in RELEVANCE} for _ in range(3))
        by_ties = {"pessimistic": least, "optimistic": most, "published": published}
        seconds = {"encode": next(values), "score": next(values)}
        backends = {"cross_attention_score": "cpu"}
        return System(name, pools, published, seconds, next(values), backends, by_ties)

    return Report((system("SGR_50%"), system("SAF")), settings, "no ids", np.zeros((2, 2), np.float32))


def plain(side: Direction) -> dict[str, float]:
    return {"r1": side.r1, "r5": side.r5, "r10": side.r10, "medr": side.medr, "meanr": side.meanr}


def one_digit(*values: float) -> list[str]:
    return [f"{value:.1f}" for value in values]


def test_table_has_every_number_in_its_column():
    made = report()
    tables = str(made).split("\n\n")
    assert len(tables) == 3
    for number, table in enumerate(tables[:2]):
        lines = table.splitlines()
        first = made.systems[0].pools[number].metrics
        assert lines[0] == made.systems[0].pools[number].title
        assert re.split(r"\s{2,}", lines[1].strip()) == ["image to text", "text to image"]
        assert lines[2].split() == ["R@1", "R@5", "R@10", "medr", "meanr"] * 2 + ["rsum"]
        for line, system in zip(lines[3:5], made.systems, strict=True):
            found = system.pools[number].metrics
            numbers = [value for side in (found.i2t, found.t2i) for value in plain(side).values()]
            assert line.split() == [system.name, *one_digit(*numbers, found.rsum)]
        chance = one_digit(*first.i2t.chance, *first.t2i.chance, sum(first.i2t.chance) + sum(first.t2i.chance))
        assert lines[5].split() == ["chance", *chance]
        assert len({len(line) for line in lines[2:6]}) == 1
        for title, before in (("image to text", 0), ("text to image", lines[2].index("meanr") + len("meanr"))):
            assert before < lines[1].index(title) <= lines[2].index("R@1", before)


def test_titles_tell_the_pool():
    made = report(folds=3)
    folds, whole = made.systems[0].pools
    assert folds.title == f"mean of 3 folds of {folds.metrics.images:,} images, {folds.metrics.captions:,} captions"
    assert whole.title == f"all {whole.metrics.images:,} images, {whole.metrics.captions:,} captions"


def test_json_holds_every_fold_and_number(tmp_path):
    made = report(split="test", epochs=[3])
    made.save(tmp_path / "new" / "folder")
    found = json.loads((tmp_path / "new" / "folder" / "results.json").read_text())

    def expected(metrics: Metrics) -> dict:
        sides = {}
        for name, side in (("i2t", metrics.i2t), ("t2i", metrics.t2i)):
            r1, r5, r10 = side.chance
            sides[name] = {**plain(side), "queries": side.queries, "chance": {"r1": r1, "r5": r5, "r10": r10}}
        rules = {
            rule: {"rsum": one.rsum, "i2t": plain(one.i2t), "t2i": plain(one.t2i)}
            for rule, one in [(metrics.ties, metrics), *((other.ties, other) for other in metrics.others)]
        }
        size = {"images": metrics.images, "captions": metrics.captions, "rsum": metrics.rsum}
        return {**size, **sides, "ties": "published", "by_ties": rules}

    systems = []
    for system in made.systems:
        folds, whole = system.pools
        pools = [
            {"title": folds.title, **expected(folds.metrics), "folds": [expected(part) for part in folds.folds]},
            {"title": whole.title, **expected(whole.metrics)},
        ]
        systems.append(
            {
                "name": system.name,
                "pools": pools,
                "relevance": system.relevance,
                "relevance_by_ties": system.relevance_by_ties,
                "seconds": system.seconds,
                "pairs_per_second": system.pairs_per_second,
                "backends": {"cross_attention_score": "cpu"},
            }
        )
    settings = {"split": "test", "epochs": [3]}
    assert found == {"settings": settings, "systems": systems, "relevance_missing": "no ids"}


def test_csv_has_a_row_per_system_pool_fold_and_direction_with_every_number():
    made = report()
    rows = list(csv.DictReader(made.to_csv().splitlines()))
    expected = []
    for system in made.systems:
        folds, whole = system.pools
        parts = [("folds", "mean", folds.metrics), *(("folds", str(n), part) for n, part in enumerate(folds.folds))]
        for pool, fold, metrics in [*parts, ("all", "", whole.metrics)]:
            rsums = {f"rsum_{other.ties}": other.rsum for other in (metrics, *metrics.others)}
            for name, side in (("i2t", metrics.i2t), ("t2i", metrics.t2i)):
                chance = dict(zip(("chance_r1", "chance_r5", "chance_r10"), side.chance, strict=True))
                size = {"images": metrics.images, "captions": metrics.captions, "queries": side.queries}
                cells = {**size, **plain(side), "rsum": metrics.rsum, **chance, "ties": "published", **rsums}
                first = {"system": system.name, "pool": pool, "fold": fold, "direction": name}
                relevance = {
                    f"{key}_{rule}": system.relevance_by_ties[rule][key][name] if pool == "all" else ""
                    for rule in ("pessimistic", "optimistic", "published")
                    for key in RELEVANCE
                }
                expected.append({**first, **{key: str(value) for key, value in {**cells, **relevance}.items()}})
    assert rows == expected


def test_csv_has_columns_of_cxc_and_eccv_only_where_there_are_numbers():
    made = report()
    bare = [replace(system, relevance=None, relevance_by_ties={}) for system in made.systems]
    columns = Report(tuple(bare), {}, "no ids", made.score).to_csv().splitlines()[0].split(",")
    assert columns[-1] == "rsum_published"
    some = Report((bare[0], made.systems[1]), {}, None, made.score).to_csv()
    first, *_, last = csv.DictReader(some.splitlines())
    assert first["cxc_r1_optimistic"] == ""
    assert last["cxc_r1_optimistic"] == str(made.systems[1].relevance_by_ties["optimistic"]["cxc_r1"]["t2i"])


def test_latex_is_a_booktabs_table_with_every_number_under_its_direction():
    made = report()
    lines = made.to_latex().split("\n\n")[0].splitlines()
    assert lines[:5] == [
        r"\begin{tabular}{lccccccc}",
        r"\toprule",
        r" & \multicolumn{3}{c}{Image to text} & \multicolumn{3}{c}{Text to image} & \\",
        r"\cmidrule(lr){2-4}\cmidrule(lr){5-7}",
        r"Model & R@1 & R@5 & R@10 & R@1 & R@5 & R@10 & rSum \\",
    ]
    expected = []
    for number in range(2):
        title = made.systems[0].pools[number].title
        expected += [r"\midrule", rf"\multicolumn{{8}}{{l}}{{{title}}} \\"]
        for name, system in ((r"SGR\_50\%", made.systems[0]), ("SAF", made.systems[1])):
            found = system.pools[number].metrics
            cells = one_digit(*found.i2t.recalls, *found.t2i.recalls, found.rsum)
            expected.append(" & ".join([name, *cells]) + r" \\")
        first = made.systems[0].pools[number].metrics
        by_chance = [*first.i2t.chance, *first.t2i.chance]
        expected.append(" & ".join(["chance", *one_digit(*by_chance, sum(by_chance))]) + r" \\")
        for name, system in ((r"SGR\_50\%", made.systems[0]), ("SAF", made.systems[1])):
            low, high, mid = ties_of(system, number)
            line = f"{name}, ties: rsum {low} to {high}; {mid} by the published order"
            expected.append(rf"\multicolumn{{8}}{{l}}{{\footnotesize {line}}} \\")
    rule = r"\multicolumn{8}{l}{\footnotesize Ties are ranked by the rule: published.} \\"
    assert lines[5:] == [*expected, r"\midrule", rule, r"\bottomrule", r"\end{tabular}"]


def ties_of(system: System, number: int) -> list[str]:
    metrics = system.pools[number].metrics
    by_rule = {one.ties: one.rsum for one in (metrics, *metrics.others)}
    return one_digit(*(by_rule[rule] for rule in ("pessimistic", "optimistic", "published")))


@pytest.mark.parametrize("ties", TIES)
def test_a_line_under_the_table_tells_how_far_ties_move_rsum(ties: str):
    made = report(folds=0, ties=ties)
    expected = []
    for system in made.systems:
        low, high, mid = ties_of(system, 0)
        expected.append(f"{system.name}, ties: rsum {low} to {high}; {mid} by the published order")
    assert str(made).split("\n\n")[0].splitlines()[-2:] == expected
    low, high, mid = ties_of(made.systems[0], 0)
    alone = Report(made.systems[:1], {}, None, made.score)
    assert str(alone).split("\n\n")[0].splitlines()[-1] == f"ties: rsum {low} to {high}; {mid} by the published order"


def test_the_line_on_ties_shows_small_differences_and_no_line_stands_where_there_is_none():
    def rsum(value: float, ties: str, others: tuple[Metrics, ...] = ()) -> Metrics:
        side = Direction(value, 0.0, 0.0, 1.0, 1.0, 1, (0.0, 0.0, 0.0))
        return Metrics(side, Direction(0.0, 0.0, 0.0, 1.0, 1.0, 1, (0.0, 0.0, 0.0)), 1, 1, ties, others)

    def made(optimistic: float) -> str:
        others = tuple(rsum(optimistic if rule == "optimistic" else 50.0, rule) for rule in TIES[1:])
        pool = Pool(rsum(50.0, "pessimistic", others))
        return str(Report((System("SAF", (pool,)),), {}, None, np.zeros((1, 1), np.float32)))

    assert made(50.004).endswith("\nties: rsum 50.000 to 50.004; 50.000 by the published order")
    assert "ties" not in made(50.0)


def test_relevance_stands_in_the_table_under_its_direction():
    made = report(relevance_ties="optimistic")
    lines = str(made).split("\n\n")[2].splitlines()
    assert lines[0] == "CxC and ECCV Caption relevance, %, ties optimistic"
    heads = ["ECCV mAP@R", "ECCV R-P", "ECCV R@1", "CxC R@1", "CxC R@5", "CxC R@10"]
    assert re.split(r"\s{2,}", lines[1].strip()) == ["image to text", "text to image"]
    assert lines[2].split() == [word for head in heads * 2 for word in head.split()]
    for line, system in zip(lines[3:5], made.systems, strict=True):
        assert line.split() == [system.name, *one_digit(*in_columns(system.relevance))]
    expected = [cells for system in made.systems for cells in relevance_ties(system, "-")]
    assert [re.split(r"\s{2,}| (?=\d)", line) for line in lines[5:]] == expected
    assert len({len(line) for line in lines[2:]}) == 1


def in_columns(relevance: dict) -> list[float]:
    return [relevance[key][side] for side in SIDES for key in RELEVANCE]


def relevance_ties(system: System, to: str) -> list[list[str]]:
    """The two rows beneath the table that tell how far ties move the metrics of a system."""
    by_rule = {rule: one_digit(*in_columns(found)) for rule, found in system.relevance_by_ties.items()}
    ends = zip(by_rule["pessimistic"], by_rule["optimistic"], strict=True)
    return [
        [f"{system.name}, ties", *(f"{low}{to}{high}" for low, high in ends)],
        [f"{system.name}, published order", *by_rule["published"]],
    ]


def test_latex_has_a_second_table_of_cxc_and_eccv_metrics_and_how_far_ties_move_them():
    made = report(relevance_ties="published")
    lines = made.to_latex().split("\n\n")[1].splitlines()
    heads = ["ECCV mAP@R", "ECCV R-P", "ECCV R@1", "CxC R@1", "CxC R@5", "CxC R@10"]
    rows = [[system.name, *one_digit(*in_columns(system.relevance))] for system in made.systems]
    rows += [cells for system in made.systems for cells in relevance_ties(system, "--")]
    assert lines == [
        r"\begin{tabular}{lcccccccccccc}",
        r"\toprule",
        r" & \multicolumn{6}{c}{Image to text} & \multicolumn{6}{c}{Text to image} \\",
        r"\cmidrule(lr){2-7}\cmidrule(lr){8-13}",
        " & ".join(["Model", *heads, *heads]) + r" \\",
        r"\midrule",
        r"\multicolumn{13}{l}{CxC and ECCV Caption relevance, \%, ties published} \\",
        *(" & ".join(row).replace("SGR_50%", r"SGR\_50\%") + r" \\" for row in rows),
        r"\bottomrule",
        r"\end{tabular}",
    ]


def test_ranges_of_cxc_and_eccv_stand_only_where_the_rules_differ_and_show_small_differences():
    def table(optimistic: float) -> list[list[str]]:
        rules = {"pessimistic": 50.0, "optimistic": optimistic, "published": 50.0}
        by_ties = {rule: {key: dict.fromkeys(SIDES, 50.0) for key in RELEVANCE} for rule in rules}
        by_ties["optimistic"]["cxc_r1"]["t2i"] = optimistic
        (first, _) = report().systems
        system = replace(first, relevance=by_ties["pessimistic"], relevance_by_ties=by_ties)
        lines = str(Report((system,), {}, None, np.zeros((1, 1)))).split("\n\n")[2].splitlines()
        return [line.split() for line in lines[4:]]

    at = len(RELEVANCE) + RELEVANCE.index("cxc_r1")
    for optimistic, ends, published in ((50.004, "50.000-50.004", "50.000"), (62.5, "50.0-62.5", "50.0")):
        ties, order = (["50.0"] * 12 for _ in range(2))
        ties[at], order[at] = ends, published
        assert table(optimistic) == [["ties", *ties], ["published", "order", *order]]
    assert table(50.0) == []


def test_unknown_words_stand_under_the_table_where_there_are_any():
    shares = {"unknown_tokens_percent": 12.34, "captions_without_known_word_percent": 0.02}
    line = "unknown words: 12.3 % of the words; under 0.1 % of the captions have no known word"
    assert str(report(**shares)).split("\n\n")[-1] == line
    assert "unknown words" not in str(report(**dict.fromkeys(shares, 0.0)))
    empty = {**shares, "unknown_tokens_percent": 0.0}  # captions of no words at all
    assert "unknown words: 0.0 % of the words; under 0.1 % of the captions" in str(report(**empty))


@pytest.mark.parametrize(
    "speed, backends, text",
    [
        (1234.0, {"a": "cpu", "b": "cpu"}, " (1,234 pairs/s) by the cpu backend"),
        (1234.0, {"a": "cpu", "b": "torch"}, " (1,234 pairs/s) by a in the cpu backend, b in the torch backend"),
        (1234.0, {}, " (1,234 pairs/s) by torch's own operations"),
        (None, {}, ""),
    ],
)
def test_the_speed_line_names_what_ran(speed, backends, text):
    system = System("SAF", (), None, {"encode": 1.23, "score": 4.56}, speed, backends)
    assert speed_line(system, "NVIDIA X") == f"SAF: encoded in 1.2 s, scored in 4.6 s{text} on NVIDIA X"
    assert speed_line(System("mean", ()), "cpu") == ""
