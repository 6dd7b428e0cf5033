"""What can become of a change, and the rows that count it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from rich.table import Table

OUTCOMES = (
    *("refused", "as after a crash", "unchanged", "made again", "as it says"),
    *("silent", "traceback"),
)
SENTENCES = (ValueError, RuntimeError, OSError)


@dataclass(frozen=True, kw_only=True)
class Row:
    """The outcomes of one kind of change of one kind of line or file."""

    changed: str
    """Kind of a journal's line, or name of a file."""
    mutation: str
    """Name of the change."""
    outcomes: dict[str, int]
    """Number of changes with each outcome."""


def row_of(changed: str, mutation: str, outcomes: list[str]) -> Row:
    """Count the outcomes of one kind of change.

    Args:
        changed: Kind of line, or name of a file.
        mutation: Name of the change.
        outcomes: Some of ``OUTCOMES``.
    """
    counts = Counter(outcomes)
    return Row(
        changed=changed, mutation=mutation, outcomes={name: counts[name] for name in OUTCOMES}
    )


def outcomes_table(rows: list[Row]) -> Table:
    """Return the outcomes of each kind of line and file, over all changes of it.

    Args:
        rows: What was found, in the order of the lines.
    """
    table = Table("changed", "changes", *OUTCOMES, title="changed files of a search")
    for changed in dict.fromkeys(row.changed for row in rows):
        counts: Counter[str] = Counter()
        for row in rows:
            if row.changed == changed:
                counts.update(row.outcomes)
        cells = [str(counts[name]) for name in OUTCOMES]
        table.add_row(changed, str(counts.total()), *cells)
    return table
