"""Rows and tables for the booktabs package of LaTeX."""

from __future__ import annotations

from collections.abc import Sequence


def row(name: str, values: Sequence[float]) -> str:
    r"""A row of numbers with one digit.

    >>> print(row("A&B", [1.25, 30]))
    A\&B & 1.2 & 30.0 \\
    """
    return " & ".join([escape(name), *(f"{value:.1f}" for value in values)]) + r" \\"


def relevance_table(titles: Sequence[str], caption: str, rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of the table of CxC, ECCV Caption and plausible matches.

    Args:
        titles: the metrics of one direction.
        caption: the line above the rows.
        rows: the name and the numbers of both directions.
    """
    each = len(titles)
    sides = " & ".join(rf"\multicolumn{{{each}}}{{c}}{{{side}}}" for side in ("Image to text", "Text to image"))
    return [
        rf"\begin{{tabular}}{{l{'c' * (2 * each)}}}",
        r"\toprule",
        rf" & {sides} \\",
        rf"\cmidrule(lr){{2-{1 + each}}}\cmidrule(lr){{{2 + each}-{1 + 2 * each}}}",
        " & ".join(["Model", *titles, *titles]) + r" \\",
        r"\midrule",
        rf"\multicolumn{{{1 + 2 * each}}}{{l}}{{{escape(caption)}}} \\",
        *(" & ".join([escape(name), *cells]) + r" \\" for name, *cells in rows),
        r"\bottomrule",
        r"\end{tabular}",
        "",
    ]


def escape(text: str) -> str:
    r"""Text with LaTeX's special characters escaped.

    >>> print(escape("50%_x"))
    50\%\_x
    """
    special = {character: f"\\{character}" for character in "&%$#_{}"}
    special |= {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return "".join(special.get(character, character) for character in text)
