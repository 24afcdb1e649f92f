"""A report as one HTML file that needs no other file, no script and no network: `report.html`."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from .counting import Counts
from .svg_charts import SHOWN, rank_chart, recall_chart
from .tables import DIRECTIONS, RELEVANCE, recalls_at
from .worst import WorstQuery

if TYPE_CHECKING:
    from .report import Report, System

PAGE = "report.html"
WORST = 12  # queries of each direction that the commands list
Pictures = Callable[[int], bytes | None]  # an image's number -> a JPEG or PNG file, or None

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --faint: #59636e; --line: #d1d9e0; --page: #fff; --row: #f3f5f7;
  --c0: #0063a6; --c1: #c2510b; --c2: #00785a; --c3: #9b4a86; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ec; --faint: #9aa4ae; --line: #3a4149; --page: #14171a;
  --row: #1f2429; --c0: #5db1ef; --c1: #f0945a; --c2: #43c59e; --c3: #dd98c9; } }
body { font: 15px/1.45 system-ui, sans-serif; color: var(--ink); background: var(--page); margin: 0 auto;
  padding: 1rem; max-width: 1080px; }
h1 { font-size: 1.5rem; margin: .5rem 0; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
h3 { font-size: 1rem; margin: .5rem 0; } p, figcaption { color: var(--faint); margin: .3rem 0; max-width: 75ch; }
.wide { overflow-x: auto; } .two { display: grid; gap: 1rem 1.5rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .5rem; text-align: right; vertical-align: top; white-space: nowrap; }
th { font-weight: 600; } th[colspan] { text-align: center; }
thead tr:last-child th { border-bottom: 1px solid var(--line); }
th:first-child, td:first-child, .words td { text-align: left; } .words td { white-space: normal;
  overflow-wrap: anywhere; } tbody tr:nth-child(odd) { background: var(--row); }
td small { display: block; color: var(--faint); } tr.chance { color: var(--faint); }
svg { width: 100%; height: auto; display: block; } svg text { font-size: 12px; fill: var(--faint); }
.grid { stroke: var(--line); } .line { fill: none; stroke-width: 2; } .band { opacity: .25; }
polyline.chance { fill: none; stroke: var(--faint); stroke-dasharray: 4 4; } figure { margin: 0; min-width: 0; }
.legend span { margin-right: 1rem; white-space: nowrap; }
.legend i { display: inline-block; width: .8em; height: .8em; margin-right: .35em; border-radius: 2px; }
.query { border-top: 1px solid var(--line); padding: .6rem 0; } .query ol { margin: .2rem 0; padding-left: 1.6rem; }
.query ol.row { display: flex; flex-wrap: wrap; gap: .2rem 2rem; }
.query img { height: 72px; max-width: 108px; border-radius: 4px; vertical-align: middle; margin: 2px 6px 2px 0;
  background: #fff; }
.query b { color: var(--ink); } .rank { color: var(--faint); }
.scrolls { display: none; }
@media (max-width: 52rem) { .scrolls { display: block; } th, td { padding: .25rem .4rem; }
  .wide table:not(.words) :is(th, td):first-child { position: sticky; left: 0; background: var(--page);
    white-space: normal; }
  .wide tbody tr:nth-child(odd) td:first-child { background: var(--row); } }
"""


def to_html(report: Report, pictures: Pictures | None = None) -> str:
    """The page of a report.

    Args:
        report: as `evaluate` or `rate` returns it.
        pictures: gives the file of a picture by the number of its image; None: no pictures are known.
    """
    names = ", ".join(system.name for system in report.systems)
    counted = [(system.name, system.counts) for system in report.systems if system.counts is not None]
    title = escape(f"Image-text matching: {names}")
    parts = [f"<h1>{title}</h1>", f"<p>{escape(_what(report))}</p>", "<h2>Recall</h2>", *_recalls(report)]
    if counted:
        parts += _charts(counted, report.settings["ties"])
    parts += _relevance(report)
    if any(system.worst for system in report.systems):
        parts += _worst(report.systems[-1], report.captions, pictures)
    parts += _costs(report)
    parts += ["<h2>Settings</h2>", _table(["setting", "value"], _settings(report.settings), kind="words")]
    head = '<!doctype html><html lang="en"><head><meta charset="utf-8">'
    head += '<meta name="viewport" content="width=device-width, initial-scale=1">'
    return f"{head}<title>{title}</title><style>{_STYLE}</style></head><body>{''.join(parts)}</body></html>\n"


def _what(report: Report) -> str:
    settings = report.settings
    where = " of ".join(str(settings[key]) for key in ("split", "data") if settings.get(key))
    pool = report.systems[0].pools[-1].title
    return f"{pool}; {where}" if where else pool


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], *, kind: str = "", last: str = "", each: int = 0) -> str:
    """A table of cells that are HTML already.

    Args:
        head: titles of the columns.
        rows: the cells.
        kind: class of the table.
        last: class of the last row.
        each: columns under the name of each direction, from the second column on; 0: no such names.
    """
    body = [f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows]
    if last:
        body[-1] = body[-1].replace("<tr>", f'<tr class="{last}">')
    sides = "".join(f'<th colspan="{each}">{name}</th>' for name in DIRECTIONS.values())
    top = f"<tr><th></th>{sides}</tr>" if each else ""
    top += f"<tr>{''.join(f'<th>{cell}</th>' for cell in head)}</tr>"
    table = f'<table class="{kind}"><thead>{top}</thead><tbody>{"".join(body)}</tbody></table>'
    return f'<div class="wide" tabindex="0">{table}</div>'  # tabindex: the arrow keys scroll it


def _recalls(report: Report) -> list[str]:
    parts = [
        "<p>R@k in percent; medr and meanr: median and mean rank. Under a number: its range between the rules for "
        "ties, where it depends on them. "
        f"Ties here are ranked by the rule “{escape(str(report.settings.get('ties', '')))}”.</p>"
        '<p class="scrolls">Tables scroll sideways.</p>'
    ]
    for number, pool in enumerate(report.systems[0].pools):
        rows = []
        for system in report.systems:
            metrics = system.pools[number].metrics
            ends = [metrics.by_ties.get(rule, metrics) for rule in ("pessimistic", "optimistic")]
            cells = [escape(system.name)]
            for side in DIRECTIONS:
                one, low, high = (getattr(found, side) for found in (metrics, *ends))
                cells += [_ranged(*(getattr(found, key) for found in (one, low, high))) for key in _COLUMNS.values()]
            rows.append([*cells, _ranged(metrics.rsum, ends[0].rsum, ends[1].rsum)])
        metrics = report.systems[0].pools[number].metrics
        by_chance = [[f"{value:.1f}" for value in side.chance] + ["", ""] for side in (metrics.i2t, metrics.t2i)]
        total = sum(metrics.i2t.chance) + sum(metrics.t2i.chance)
        rows.append(["chance", *by_chance[0], *by_chance[1], f"{total:.1f}"])
        head = ["", *_COLUMNS, *_COLUMNS, "rsum"]
        parts.append(f"<h3>{escape(pool.title)}</h3>" + _table(head, rows, last="chance", each=len(_COLUMNS)))
    if report.cutoffs and all(system.counts for system in report.systems):
        head = [f"R@{k}" for k in report.cutoffs]
        found = [
            (system.name, recalls_at(system.counts, report.cutoffs, report.settings["ties"]))
            for system in report.systems
            if system.counts
        ]
        rows = [
            [escape(name), *(f"{recalls[side][key]:.1f}" for side in DIRECTIONS for key in head)]
            for name, recalls in [*found, ("chance", found[0][1]["chance"])]
        ]
        parts.append("<h3>other cut-offs, whole pool</h3>")
        parts.append(_table(["", *head, *head], rows, last="chance", each=len(head)))
    return parts


_COLUMNS = {"R@1": "r1", "R@5": "r5", "R@10": "r10", "medr": "medr", "meanr": "meanr"}


def _ranged(value: float, low: float, high: float) -> str:
    ends = sorted((low, high))
    same = f"{ends[0]:.1f}" == f"{ends[1]:.1f}"
    return f"{value:.1f}" + ("" if same else f"<small>{ends[0]:.1f}-{ends[1]:.1f}</small>")


def _charts(counted: list[tuple[str, Counts]], ties: str) -> list[str]:
    legend = [
        f'<span><i style="background:var(--c{number})"></i>{escape(name)}</span>'
        for number, (name, _) in enumerate(counted[:SHOWN])
    ]
    left = len(counted) - SHOWN
    more = f"<p>The charts show the first {SHOWN} of {len(counted)} models.</p>" if left > 0 else ""
    parts = []
    for title, chart, note in (
        ("Recall against k", recall_chart, "Dashed: chance. Shaded: the range between the rules for ties."),
        ("Ranks", rank_chart, "Percent of the queries whose best right item has this rank."),
    ):
        figures = [f"<figure><h3>{name}</h3>{chart(counted, side, ties)}</figure>" for side, name in DIRECTIONS.items()]
        parts.append(f'<h2>{title}</h2><p class="legend">{"".join(legend)}</p>{more}<p>{note}</p>')
        parts.append(f'<div class="two">{"".join(figures)}</div>')
    return parts


def _relevance(report: Report) -> list[str]:
    found = [(system.name, system.relevance) for system in report.systems if system.relevance]
    if not found:
        return []
    keys = list(found[0][1] or {})
    titles = [RELEVANCE[key] for key in keys]
    rows = [
        [escape(name), *(f"{(one or {})[key][side]:.1f}" for side in DIRECTIONS for key in keys)] for name, one in found
    ]
    return ["<h2>CxC and ECCV Caption relevance, %</h2>", _table(["", *titles, *titles], rows, each=len(keys))]


def _worst(system: System, captions: Sequence[str] | None, pictures: Pictures | None) -> list[str]:
    def item(kind: str, number: int) -> str:
        if kind == "caption":
            return f"“{escape(captions[number])}”" if captions is not None else f"caption {number}"
        picture = pictures(number) if pictures is not None else None
        if picture is None:
            return f"image {number}"
        form = "png" if picture.startswith(b"\x89PNG") else "jpeg"
        data = base64.b64encode(picture).decode()
        return f'<img alt="image {number}" title="image {number}" src="data:image/{form};base64,{data}">'

    def one(query: WorstQuery) -> str:
        asked, wanted = ("image", "caption") if query.side == "i2t" else ("caption", "image")
        first = "".join(f"<li>{item(wanted, number)} <small>{score:.3f}</small></li>" for number, score in query.first)
        right = f"right: {item(wanted, query.right)} <small>{query.right_score:.3f}</small>"
        row = ' class="row"' if query.side == "t2i" else ""
        return (
            f'<div class="query"><b>{item(asked, query.query)}</b> <span class="rank">rank {query.rank:,}</span>'
            f"<ol{row}>{first}</ol><div>{right}</div></div>"
        )

    sides = [
        f"<div><h3>{name}</h3>{''.join(one(query) for query in system.worst if query.side == side)}</div>"
        for side, name in DIRECTIONS.items()
    ]
    note = f"{escape(system.name)}: the queries whose right item ranks lowest, what came first, and the scores."
    return ["<h2>Queries that failed worst</h2>", f"<p>{note}</p>", f'<div class="two">{"".join(sides)}</div>']


def _costs(report: Report) -> list[str]:
    timed = [system for system in report.systems if system.seconds]
    if not timed:
        return []
    rows = []
    for system in timed:
        speed = "" if system.pairs_per_second is None else f"{system.pairs_per_second:,.0f}"
        seconds = [f"{system.seconds[part]:.1f}" if part in system.seconds else "" for part in ("encode", "score")]
        ran = ", ".join(f"{op}: {name}" for op, name in system.backends.items())
        rows.append([escape(system.name), *seconds, speed, escape(ran)])
    parts = ["<h2>Speed and memory</h2>"]
    parts.append(_table(["", "encode, s", "score, s", "pairs/s", "op: backend"], rows))
    plans: list[dict[str, float]] = report.settings.get("memory_plan_gb") or []
    if plans:
        rows = [[escape(part), *(f"{plan.get(part, 0):.3f}" for plan in plans)] for part in plans[0]]
        parts.append("<h3>Memory plan, GB</h3>")
        parts.append(_table(["", *(escape(system.name) for system in timed)], rows))
    return parts


def _settings(settings: dict[str, Any]) -> list[list[str]]:
    left_out = ("memory_plan_gb",)
    return [
        [escape(key), escape(value if isinstance(value, str) else json.dumps(value))]
        for key, value in settings.items()
        if key not in left_out and value is not None
    ]
