"""The results of an evaluation as a table for the terminal, JSON, CSV and LaTeX."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._files import atomic_write
from .._text import several
from . import TIES
from .counting import Counts
from .html_report import PAGE, Pictures, to_html
from .kept_ranks import RANKS, KeptRanks, texts_checksum
from .latex import escape, relevance_table, row
from .tables import DIRECTIONS, RELEVANCE, cutoff_table, recalls_at, table
from .tie_rules import Direction, Metrics, average
from .unknown_words import unknown_words_line
from .worst import WorstQuery

_HEAD = ("R@1", "R@5", "R@10", "medr", "meanr")
_RANGE = ("pessimistic", "optimistic", "published")  # the lowest numbers, the highest, and some between


@dataclass(frozen=True)
class Pool:
    """Metrics over all images, or averaged over folds.

    Attributes:
        metrics: of the whole pool, or the mean over `folds`.
        folds: the metrics of each fold; empty for the whole pool.
    """

    metrics: Metrics
    folds: tuple[Metrics, ...] = ()

    @property
    def title(self) -> str:
        """What was ranked against what."""
        size = f"{several(self.metrics.images, 'image')}, {several(self.metrics.captions, 'caption')}"
        return f"mean of {len(self.folds)} folds of {size}" if self.folds else f"all {size}"


def pools(whole: Metrics, folds: Sequence[Metrics]) -> tuple[Pool, ...]:
    """The pools of a system: the mean over its folds, if there are any, and all images."""
    return (Pool(average(folds), tuple(folds)), Pool(whole)) if folds else (Pool(whole),)


@dataclass(frozen=True)
class System:
    """The results of one model or of the ensemble.

    Attributes:
        name: row title.
        pools: folds first, when there are any, then the whole pool.
        relevance: CxC and ECCV Caption metrics in percent, `{metric: {"i2t": ..., "t2i": ...}}`, or None.
        seconds: time spent, by part ("encode", "score"); ranking counts as part of "score" where no matrix is made.
        pairs_per_second: pairs scored per second, identical captions counted once; None for an ensemble and for a
            resumed run.
        backends: op -> backend that ran it; empty if no itm-fast op ran: for an ensemble, for a dual encoder, and for
            scores that an earlier run had finished.
        relevance_by_ties: `relevance` under each of its rules for ties; empty if `relevance` is None.
        counts: what the rank of each query follows from; None if they are not kept.
        worst: the queries of both directions that failed worst, if they were asked for.
    """

    name: str
    pools: tuple[Pool, ...]
    relevance: dict[str, dict[str, float]] | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    pairs_per_second: float | None = None
    backends: dict[str, str] = field(default_factory=dict)
    relevance_by_ties: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    counts: Counts | None = field(default=None, repr=False, compare=False)
    worst: tuple[WorstQuery, ...] = field(default=(), repr=False, compare=False)


@dataclass(frozen=True, eq=False)
class Report:
    """All systems of one evaluation; `print(report)` shows the tables.

    Attributes:
        systems: one per model and, with several models, the ensemble last.
        settings: versions, device, backend and the other conditions of the run, as plain values.
        relevance_missing: why there are no CxC and ECCV metrics; None if there are.
        score: [I, T] scores of the last system; None if `evaluate` was not to keep them.
        pairs: int64 [2, P], the right pairs of images and captions, as `many_right.pairs_of`; None if not known.
        captions: the T texts; None if they are not known.
        cutoffs: the k of R@k that are reported beside 1, 5 and 10, over the whole pool.
        best: the best items of the last system, as `Ranking.best`; None if they were not asked for.
        texts: checksum of the captions' texts where `captions` is None; "" if it is not known either.
    """

    systems: tuple[System, ...]
    settings: dict[str, Any]
    relevance_missing: str | None
    score: NDArray[np.float32] | None = field(repr=False)
    pairs: NDArray[np.int64] | None = field(default=None, repr=False)
    captions: Sequence[str] | None = field(default=None, repr=False)
    cutoffs: tuple[int, ...] = ()
    best: dict[str, tuple[NDArray[np.int64], NDArray[np.float32]]] | None = field(default=None, repr=False)
    texts: str = ""

    def __str__(self) -> str:
        parts = [self._recalls(number) for number in range(len(self.systems[0].pools))]
        if keys := self._relevance_keys():
            titles = [RELEVANCE[key] for key in keys]
            groups = (1, 1 + len(keys), 1 + 2 * len(keys))
            parts.append(table(self._relevance_title(), [["", *titles, *titles], *self._relevance()], groups))
        if self.cutoffs:
            counted = [(system.name, system.counts) for system in self.systems if system.counts is not None]
            parts.append(cutoff_table(counted, self.cutoffs, self.settings["ties"]))
        if words := unknown_words_line(self.settings):
            parts.append(words)
        return "\n\n".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the score matrix, ready for `json.dump`."""
        return {
            "settings": self.settings,
            "systems": [_system(system) | self._at_cutoffs(system) for system in self.systems],
            "relevance_missing": self.relevance_missing,
        }

    def to_csv(self) -> str:
        """One row per system, pool, fold and direction; rsum, and CxC and ECCV metrics, under every rule for ties."""
        text = io.StringIO()
        columns = [
            "system", "pool", "fold", "direction", "images", "captions", "queries", "r1", "r5", "r10", "medr",
            "meanr", "rsum", "chance_r1", "chance_r5", "chance_r10", "ties", *(f"rsum_{rule}" for rule in TIES),
        ]  # fmt: skip
        rules = list(dict.fromkeys(rule for system in self.systems for rule in system.relevance_by_ties))
        columns += [f"{key}_{rule}" for key in self._relevance_keys() for rule in rules]
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(columns)
        for system in self.systems:
            for pool in system.pools:
                title = "folds" if pool.folds else "all"
                rows = [("mean" if pool.folds else "", pool.metrics)]
                rows += [(str(fold), metrics) for fold, metrics in enumerate(pool.folds)]
                for fold, metrics in rows:
                    by_ties = [metrics.by_ties[rule].rsum if rule in metrics.by_ties else "" for rule in TIES]
                    for name in DIRECTIONS:
                        side: Direction = getattr(metrics, name)
                        found = {} if pool.folds else system.relevance_by_ties
                        keys = self._relevance_keys()
                        relevance = [found[rule][key][name] if found else "" for key in keys for rule in rules]
                        writer.writerow(
                            [system.name, title, fold, name, metrics.images, metrics.captions, side.queries,
                             *side.recalls, side.medr, side.meanr, metrics.rsum, *side.chance, metrics.ties, *by_ties,
                             *relevance]
                        )  # fmt: skip
        return text.getvalue()

    def to_latex(self) -> str:
        r"""A `tabular` for the booktabs package (`\usepackage{booktabs}`): one row per system, grouped by pool.

        Each pool ends with the recalls of chance; the last line states the rule for ties. A second table holds CxC and
        ECCV Caption metrics, where there are any.
        """
        lines = [
            r"\begin{tabular}{lccccccc}",
            r"\toprule",
            r" & \multicolumn{3}{c}{Image to text} & \multicolumn{3}{c}{Text to image} & \\",
            r"\cmidrule(lr){2-4}\cmidrule(lr){5-7}",
            r"Model & R@1 & R@5 & R@10 & R@1 & R@5 & R@10 & rSum \\",
        ]
        for number, pool in enumerate(self.systems[0].pools):
            lines += [r"\midrule", rf"\multicolumn{{8}}{{l}}{{{escape(pool.title)}}} \\"]
            rows = [(system.name, system.pools[number].metrics) for system in self.systems]
            for name, found in rows:
                lines.append(row(name, [*found.i2t.recalls, *found.t2i.recalls, found.rsum]))
            by_chance = [*rows[0][1].i2t.chance, *rows[0][1].t2i.chance]
            lines.append(row("chance", [*by_chance, sum(by_chance)]))
            lines += [rf"\multicolumn{{8}}{{l}}{{\footnotesize {escape(line)}}} \\" for line in self._ties(number)]
        rule = f"Ties are ranked by the rule: {self.systems[0].pools[0].metrics.ties}."
        lines += [r"\midrule", rf"\multicolumn{{8}}{{l}}{{\footnotesize {rule}}} \\"]
        lines += [r"\bottomrule", r"\end{tabular}", ""]
        if keys := self._relevance_keys():
            lines += relevance_table([RELEVANCE[key] for key in keys], self._relevance_title(), self._relevance("--"))
        return "\n".join(lines)

    def save(self, folder: str | os.PathLike[str], pictures: Pictures | None = None) -> list[Path]:
        """Write `results.txt`, `.json`, `.csv`, `.tex` and `report.html` into a folder, each completely or not at all.

        `ranks.npz`, which `compare` reads, is written too if every system has its `counts`.

        Args:
            folder: created if it does not exist; older results in it are replaced.
            pictures: gives a JPEG or PNG file, or None, by the number of an image; for `report.html`.

        Returns:
            The files written.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        written = []
        if (kept := self.kept_ranks()) is not None:
            written.append(kept.save(folder / RANKS))
        contents = {
            "results.txt": f"{self}\n",
            "results.json": json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n",
            "results.csv": self.to_csv(),
            "results.tex": self.to_latex(),
            PAGE: to_html(self, pictures),  # last: with pictures it is the largest, and a disk may be full
        }
        for name, content in contents.items():
            with atomic_write(folder / name) as file:
                file.write(content)
            written.append(folder / name)
        return written

    def kept_ranks(self) -> KeptRanks | None:
        """What the ranks of all queries follow from, as `compare` takes it; None if it is not known."""
        counts = [system.counts for system in self.systems if system.counts is not None]
        if self.pairs is None or len(counts) < len(self.systems):
            return None
        data = self.texts if self.captions is None else texts_checksum(self.captions)
        return KeptRanks(tuple(system.name for system in self.systems), tuple(counts), self.pairs, data)

    def _at_cutoffs(self, system: System) -> dict[str, Any]:
        if not self.cutoffs or system.counts is None:
            return {}
        return {"recall_at": recalls_at(system.counts, self.cutoffs, self.settings["ties"])}

    def _recalls(self, number: int) -> str:
        rows = [["", *_HEAD, *_HEAD, "rsum"]]
        for system in self.systems:
            metrics = system.pools[number].metrics
            cells = [_side(metrics.i2t), _side(metrics.t2i)]
            rows.append([system.name, *cells[0], *cells[1], f"{metrics.rsum:.1f}"])
        metrics = self.systems[0].pools[number].metrics
        by_chance = [[f"{value:.1f}" for value in side.chance] + ["", ""] for side in (metrics.i2t, metrics.t2i)]
        total = sum(metrics.i2t.chance) + sum(metrics.t2i.chance)
        rows.append(["chance", *by_chance[0], *by_chance[1], f"{total:.1f}"])
        return "\n".join([table(self.systems[0].pools[number].title, rows, (1, 6, 11)), *self._ties(number)])

    def _ties(self, number: int) -> list[str]:
        """A line for each system whose rsum depends on the rule for ties, with the range of rsum."""
        lines = []
        for system in self.systems:
            by_ties = system.pools[number].metrics.by_ties
            rsums = {rule: metrics.rsum for rule, metrics in by_ties.items()}
            if rsums.keys() < set(TIES) or abs(rsums["optimistic"] - rsums["pessimistic"]) < 1e-6:
                continue
            low, high, published = (rsums[rule] for rule in _RANGE)
            d = _digits(low, high)
            found = f"rsum {low:.{d}f} to {high:.{d}f}; {published:.{d}f} by the published order"
            lines.append(f"{self._of(system)}ties: {found}")
        return lines

    def _relevance_keys(self) -> list[str]:
        found = next((system.relevance for system in self.systems if system.relevance), {})
        return [key for key in RELEVANCE if key in found]

    def _relevance_title(self) -> str:
        ties = self.settings.get("relevance_ties")
        what = "plausible matches" if self._relevance_keys() == ["pmrp"] else "CxC and ECCV Caption relevance"
        return f"{what}, %" + (f", ties {ties}" if ties else "")

    def _relevance(self, to: str = "-") -> list[list[str]]:
        """A row per system; then, for each that depends on the rule for ties, its ranges and its published numbers."""
        rows = []
        for system in self.systems:
            rows.append([system.name, *(f"{value:.1f}" for value in _in_columns(system.relevance or {}))])
        for system in self.systems:
            if not system.relevance_by_ties:
                continue
            rules = [_in_columns(system.relevance_by_ties[rule]) for rule in _RANGE]
            cells = [_cells(low, high, published, to) for low, high, published in zip(*rules, strict=True)]
            if any(to in ends for ends, _ in cells):
                rows.append([f"{self._of(system)}ties", *(ends for ends, _ in cells)])
                rows.append([f"{self._of(system)}published order", *(published for _, published in cells)])
        return rows

    def _of(self, system: System) -> str:
        """The prefix that names a system in the lines below a table; "" if there is one system only."""
        return f"{system.name}, " if len(self.systems) > 1 else ""


def _in_columns(relevance: dict[str, dict[str, float]]) -> list[float]:
    return [relevance[key][side] for side in DIRECTIONS for key in RELEVANCE if key in relevance]


def _digits(low: float, high: float) -> int:
    """Decimals that tell the ends of a range apart: one caption of 25,000 is 0.004."""
    return 1 if high - low < 1e-6 or f"{low:.1f}" != f"{high:.1f}" else 3


def _cells(low: float, high: float, published: float, to: str) -> tuple[str, str]:
    """A range, one number where its ends are equal, and the number of the published order."""
    digits = _digits(low, high)
    ends = [f"{low:.{digits}f}", f"{high:.{digits}f}"]
    return to.join(dict.fromkeys(ends)), f"{published:.{digits}f}"


def backend_names(systems: Iterable[System]) -> str:
    """The backends that the scorers' ops ran on, such as "cpu" or "cpu, torch"; "" if no itm-fast op ran."""
    names = [name for system in systems for ran in system.backends.values() for name in ran.split(", ")]
    return ", ".join(dict.fromkeys(names))


def speed_line(system: System, device: str) -> str:
    """Time, speed and backend of a system; "" for an ensemble, whose members have lines of their own."""
    if not system.seconds:
        return ""
    speed = "" if system.pairs_per_second is None else f" ({system.pairs_per_second:,.0f} pairs/s)"
    took = f"encoded in {system.seconds['encode']:.1f} s, scored in {system.seconds['score']:.1f} s{speed}"
    return f"{system.name}: {took}{_by(system)} on {device}"


def _by(system: System) -> str:
    """The backend that ran, or each op's if they differ; "" for scores that an earlier run had finished."""
    names = set(system.backends.values())
    if len(names) > 1:
        return " by " + ", ".join(f"{op} in the {name} backend" for op, name in system.backends.items())
    if not names:
        return "" if system.pairs_per_second is None else " by torch's own operations"
    return f" by the {names.pop()} backend"


def _side(side: Direction) -> list[str]:
    return [f"{value:.1f}" for value in (*side.recalls, side.medr, side.meanr)]


def _system(system: System) -> dict[str, Any]:
    return {
        "name": system.name,
        "pools": [
            {
                "title": pool.title,
                **_metrics(pool.metrics),
                **({"folds": [_metrics(fold) for fold in pool.folds]} if pool.folds else {}),
            }
            for pool in system.pools
        ],
        "relevance": system.relevance,
        "relevance_by_ties": system.relevance_by_ties,
        "seconds": system.seconds,
        "pairs_per_second": system.pairs_per_second,
        "backends": system.backends,
    }


def _metrics(metrics: Metrics) -> dict[str, Any]:
    sides: dict[str, Any] = {}
    for name in DIRECTIONS:
        side: Direction = getattr(metrics, name)
        chance = dict(zip(("r1", "r5", "r10"), side.chance, strict=True))
        sides[name] = {**_values(side), "queries": side.queries, "chance": chance}
    by_ties = {
        rule: {"rsum": found.rsum, **{name: _values(getattr(found, name)) for name in DIRECTIONS}}
        for rule, found in metrics.by_ties.items()
    }
    return {
        "images": metrics.images,
        "captions": metrics.captions,
        "rsum": metrics.rsum,
        **sides,
        "ties": metrics.ties,
        "by_ties": by_ties,
    }


def _values(side: Direction) -> dict[str, float]:
    return {"r1": side.r1, "r5": side.r5, "r10": side.r10, "medr": side.medr, "meanr": side.meanr}
