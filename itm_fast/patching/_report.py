"""What a call of `patch` did, as rows that print as a table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

REPLACED, REFUSED, LEFT = "replaced", "refused", "left alone"


@dataclass(frozen=True)
class Row:
    """One function or class of the repository.

    Args:
        where: "module:line" of its definition.
        name: its name.
        outcome: "replaced", "refused" or "left alone".
        detail: the largest difference from the code that it replaces, or the reason.
    """

    where: str
    name: str
    outcome: str
    detail: str


@dataclass
class Report:
    """The rows of one call of `patch`. Its text is a table.

    >>> print(Report([Row("model:335", "EncoderSimilarity", "replaced", "differs by 1e-16")]))
    model:335  EncoderSimilarity  replaced  differs by 1e-16
    """

    rows: list[Row] = field(default_factory=list)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def outcomes(self, outcome: str) -> list[str]:
        """Names of the rows with this outcome.

        >>> Report([Row("model:1", "i2t", "replaced", "")]).outcomes("replaced")
        ['i2t']
        """
        return [row.name for row in self.rows if row.outcome == outcome]

    def __str__(self) -> str:
        if not self.rows:
            return "nothing that itm_fast.patch knows is defined here"
        cells = [(row.where, row.name, row.outcome, row.detail) for row in self.rows]
        widths = [max(len(row[column]) for row in cells) for column in range(3)]
        return "\n".join(
            "  ".join([*(text.ljust(width) for text, width in zip(row, widths, strict=False)), row[3]]).rstrip()
            for row in cells
        )
