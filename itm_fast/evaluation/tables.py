"""Tables of both directions for the terminal, and recalls at any cut-offs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .counting import Counts
from .kept_ranks import chance, recall_at

DIRECTIONS = {"i2t": "image to text", "t2i": "text to image"}
RELEVANCE = {
    "eccv_map_at_r": "ECCV mAP@R",
    "eccv_rprecision": "ECCV R-P",
    "eccv_r1": "ECCV R@1",
    "cxc_r1": "CxC R@1",
    "cxc_r5": "CxC R@5",
    "cxc_r10": "CxC R@10",
    "pmrp": "PMRP",  # only where its labels are given
}


def table(title: str, rows: Sequence[Sequence[str]], groups: tuple[int, int, int]) -> str:
    """Right-aligned columns under the two directions' names; `groups` are the first columns of the three groups.

    >>> print(table("all", [["", "R@1", "R@1", "sum"], ["SCAN", "1.0", "2.0", "3.0"]], (1, 2, 3)))
    all
           image to text   text to image
           R@1   R@1   sum
    SCAN   1.0   2.0   3.0
    """
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]

    def line(row: Sequence[str]) -> str:
        cells = [row[0].ljust(widths[0])]
        for column in range(1, len(row)):
            cells.append(("   " if column in groups else " ") + row[column].rjust(widths[column]))
        return "".join(cells).rstrip()

    spans = [sum(widths[a:b]) + (b - a) + 2 for a, b in zip(groups, groups[1:], strict=False)]
    names = (f"   {name}".ljust(span) for name, span in zip(DIRECTIONS.values(), spans, strict=True))
    return "\n".join([title, (" " * widths[0] + "".join(names)).rstrip(), *map(line, rows)])


def recalls_at(counts: Counts, cutoffs: Sequence[int], ties: str) -> dict[str, Any]:
    """Recalls and chance at these cut-offs: {"i2t": {"R@50": ..., ...}, "t2i": {...}, "chance": {"i2t": ..., ...}}."""
    found: dict[str, Any] = {"chance": {}}
    for side, pool in (("i2t", counts.captions), ("t2i", counts.images)):
        standings = getattr(counts, side)
        found[side] = {f"R@{k}": recall_at(standings, k, ties) for k in cutoffs}
        found["chance"][side] = {f"R@{k}": chance(standings, pool, k) for k in cutoffs}
    return found


def cutoff_table(systems: Sequence[tuple[str, Counts]], cutoffs: Sequence[int], ties: str) -> str:
    """A table of the recalls at these cut-offs over all images and captions, chance last."""
    head = [f"R@{k}" for k in cutoffs]
    found = [(name, recalls_at(counts, cutoffs, ties)) for name, counts in systems]
    rows = [["", *head, *head]]
    for name, recalls in [*found, ("chance", found[0][1]["chance"])]:
        rows.append([name, *(f"{recalls[side][column]:.1f}" for side in DIRECTIONS for column in head)])
    return table("recall at other cut-offs, all images and captions", rows, (1, 1 + len(head), 1 + 2 * len(head)))
