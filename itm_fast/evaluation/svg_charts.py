"""Charts of ranks as SVG without scripts: recall against k, and how many queries have which rank.

Colours are CSS variables of the page: --c0 ... --c3 for the models, --ink, --faint and --line.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

import numpy as np

from .counting import Counts, Standings
from .kept_ranks import chance, recall_at
from .tie_rules import ranks_by

SHOWN = 4  # models that the charts tell apart
_WIDTH, _HEIGHT = 480, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 22, 12, 42
_MARKED = (1, 5, 10)


def recall_chart(systems: Sequence[tuple[str, Counts]], side: str, ties: str) -> str:
    """Recall at every k up to the size of the pool, with the range between the rules for ties and chance.

    Args:
        systems: name and counts of each model.
        side: "i2t" or "t2i".
        ties: rule for ties of the lines.
    """
    pool = _pool(systems[0][1], side)
    cutoffs = sorted({round(k) for k in np.geomspace(1, pool, 60)} | {k for k in _MARKED if k <= pool})
    span = math.log(max(pool, 2))

    def x(k: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * math.log(k) / span

    parts = _frame([(_y(100, percent), f"{percent}") for percent in (0, 25, 50, 75, 100)])
    ticks = [1, 5] + [10**power for power in range(1, 9)]
    parts += [_x_tick(x(k), f"{k:,}") for k in ticks if k <= pool]
    parts.append(_x_title("k: a right item is among the first k"))
    first = getattr(systems[0][1], side)
    by_chance = _points([(x(k), _y(100, chance(first, pool, k))) for k in cutoffs])
    parts.append(f'<polyline points="{by_chance}" class="chance"><title>chance</title></polyline>')
    for number, (name, counts) in enumerate(systems[:SHOWN]):
        standings = getattr(counts, side)
        low, high = (
            [(x(k), _y(100, recall_at(standings, k, rule))) for k in cutoffs] for rule in ("pessimistic", "optimistic")
        )
        if low != high:
            parts.append(f'<polygon points="{_points(low + high[::-1])}" class="band" fill="var(--c{number})"/>')
        line = _points([(x(k), _y(100, recall_at(standings, k, ties))) for k in cutoffs])
        parts.append(f'<polyline points="{line}" class="line" stroke="var(--c{number})"/>')
        for k in (k for k in _MARKED if k <= pool):
            value = recall_at(standings, k, ties)
            label = f"{escape(name)}: R@{k} {value:.1f}"
            where = f'cx="{x(k):.1f}" cy="{_y(100, value):.1f}"'
            parts.append(f'<circle {where} r="3" fill="var(--c{number})"><title>{label}</title></circle>')
    return _svg(parts, f"Recall against k, pool of {pool:,}")


def rank_chart(systems: Sequence[tuple[str, Counts]], side: str, ties: str) -> str:
    """Share of queries by rank, in bins that double: 1, 2, 3-4, 5-8, ..."""
    pool = _pool(systems[0][1], side)
    bins = math.ceil(math.log2(pool)) + 1 if pool > 1 else 1
    shares = [_shares(getattr(counts, side), ties, bins) for _, counts in systems[:SHOWN]]
    top = max(1.0, *(float(share.max()) for share in shares))
    step = next(step for step in (1, 2, 5, 10, 20, 25) if top / step <= 5 or step == 25)
    top = step * math.ceil(top / step)
    parts = _frame([(_y(top, value), f"{value}") for value in range(0, top + 1, step)])
    slot = (_WIDTH - _LEFT - _RIGHT) / bins
    width = slot * 0.8 / len(shares)
    for place in range(bins):
        low, high = (2 ** (place - 1) + 1, min(2**place, pool)) if place else (1, 1)
        label = f"{low:,}" if low == high else f"{low:,}-{high:,}"
        start = _LEFT + slot * place
        if bins <= 8 or place % 2 == 0:
            parts.append(_x_tick(start + slot / 2, f"{low:,}"))
        for number, share in enumerate(shares):
            y = _y(top, share[place])
            title = f"{escape(systems[number][0])}: rank {label}: {share[place]:.1f} % of the queries"
            parts.append(
                f'<rect x="{start + slot * 0.1 + width * number:.1f}" y="{y:.1f}" width="{width:.1f}" '
                f'height="{_HEIGHT - _BOTTOM - y:.1f}" fill="var(--c{number})"><title>{title}</title></rect>'
            )
    parts.append(_x_title("rank of the best right item: 1, 2, 3-4, 5-8, ...; first of each bin"))
    return _svg(parts, f"Queries by rank, in percent, pool of {pool:,}")


def _shares(side: Standings, ties: str, bins: int) -> np.ndarray:
    rank = ranks_by(side, "pessimistic" if ties == "expected" else ties) + 1
    place = np.ceil(np.log2(rank)).astype(int)
    return 100 * np.bincount(place, minlength=bins)[:bins] / len(rank)


def _pool(counts: Counts, side: str) -> int:
    return counts.captions if side == "i2t" else counts.images


def _y(top: float, value: float) -> float:
    return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * value / top


def _points(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _frame(rows: Sequence[tuple[float, str]]) -> list[str]:
    parts = []
    for y, label in rows:
        parts.append(f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    return parts


def _x_tick(x: float, label: str) -> str:
    return f'<text x="{x:.1f}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="middle">{label}</text>'


def _x_title(title: str) -> str:
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    return f'<text x="{middle}" y="{_HEIGHT - 6}" text-anchor="middle">{escape(title)}</text>'


def _svg(parts: Sequence[str], title: str) -> str:
    head = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">'
    return head + "".join(parts) + "</svg>"
