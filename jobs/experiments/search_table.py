"""The table of the searches job."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from statistics import fmean

from cells import Record
from intervals import paired_difference
from rich.table import Table

DEFAULT = "default"
_MODE = "mode"


def searches_table(records: Sequence[Record]) -> Table:
    """How good the masks are that each way to search ends with, the best way first.

    Args:
        records: Of one job; there may be more to come.
    """
    rows: dict[str, dict[int, Record]] = defaultdict(dict)
    for record in records:
        rows[record.key["variant"]][record.key["seed"]] = record
    table = Table(title="masks that searches end with, not fine-tuned, on choose-val; best first")
    table.add_column("search", no_wrap=True)
    columns = ("seeds", "scores", "loss of the mode", "minus the default's [95 %]", "accuracy, %")
    for column in (*columns, "averaged mode", "importance-only", "core seconds"):
        table.add_column(column, justify="right", no_wrap="[95 %]" in column)
    for variant in sorted(rows, key=lambda variant: _mean(rows[variant], _MODE, "loss")):
        of_seed = rows[variant]
        table.add_row(
            variant.replace(",", ",\n"),  # a line for each setting, or the figures have no room
            str(len(of_seed)),
            f"{fmean(record.figures['scores'] for record in of_seed.values()):.0f}",
            f"{_mean(of_seed, _MODE, 'loss'):.3f}",
            "" if variant == DEFAULT else _difference(of_seed, rows.get(DEFAULT, {})),
            f"{100 * _mean(of_seed, _MODE, 'accuracy'):.2f}",
            f"{_mean(of_seed, 'averaged mode', 'loss'):.3f}",
            f"{_mean(of_seed, 'importance-only', 'loss'):.3f}",
            f"{fmean(record.seconds for record in of_seed.values()):.0f}",
        )
    return table


def _mean(of_seed: dict[int, Record], finalist: str, measure: str) -> float:
    return fmean(_read(record, finalist, measure) for record in of_seed.values())


def _read(record: Record, finalist: str, measure: str) -> float:
    """Of a finalist; modes that equal another finalist are named by that one."""
    found = record.figures["found"]
    same = found.get(finalist) or found.get(_MODE) or found["importance-only"]
    return float(same[measure])


def _difference(of_seed: dict[int, Record], others: dict[int, Record]) -> str:
    """Of the mode's loss, over the seeds that both have."""
    both = sorted(of_seed.keys() & others.keys())
    if not both:
        return ""
    pair = ([_read(rows[seed], _MODE, "loss") for seed in both] for rows in (of_seed, others))
    return str(paired_difference(*pair))
