"""Which update rule, with which steps? Searches on landscapes whose best masks are known.

    python jobs/experiments/rules.py --output runs/rules

Scores cost nothing here, so every rule can search hundreds of times: on landscapes over the
spaces of ResNet-20, ResNet-56 and ResNet-50, made as ``landscapes.py`` says. Steps are
tuned on the landscapes of even numbers and confirmed on those of odd ones.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from archive import flattened, write_rows
from landscape_searches import DEFAULTS, MEASURES, Row, rows, variations
from rich.console import Console
from rich.table import Table

from fppmo_ray.job import run_job

logger = logging.getLogger(__name__)

_SHARE = {
    "resnet20": 1.0,
    "resnet56": 0.5,
    "resnet50": 0.2,
}  # of the landscapes; wide ones take long


def main(
    landscapes: int = 20,
    tuned_at: tuple[int, ...] = (320,),
    confirmed_at: tuple[int, ...] = (80, 160, 320, 640),
    output: Path | None = None,
) -> None:
    """Compare rules and steps; print and keep the tables.

    Args:
        landscapes: Of the space of ResNet-20, in each half; half as many of ResNet-56, a fifth of
            ResNet-50, two at least.
        tuned_at: Proposals of the searches on landscapes of even numbers, with all variations;
            none: nothing is tuned.
        confirmed_at: Proposals of those on odd ones, with the rules as they come.
        output: Folder for ``rules-tuned.csv`` and ``rules-confirmed.csv``.
    """
    tuned = [
        row
        for proposals in tuned_at
        for row in _told(rows(variations(), _numbers(landscapes, 0), proposals))
    ]
    confirmed = [
        row
        for proposals in confirmed_at
        for row in _told(rows(DEFAULTS, _numbers(landscapes, 1), proposals))
    ]
    for title, table in {"rules-tuned": tuned, "rules-confirmed": confirmed}.items():
        Console(width=140).print(rows_table(title, table))
        if output is not None:
            output.mkdir(parents=True, exist_ok=True)
            write_rows(output / f"{title}.csv", [flattened(asdict(row)) for row in table])


def _numbers(landscapes: int, first: int) -> dict[str, list[int]]:
    """The numbers of each space's landscapes: every second from the first on."""
    return {
        space: list(range(first, 2 * max(2, round(share * landscapes)), 2))
        for space, share in _SHARE.items()
    }


def _told(measured: Iterable[Row]) -> list[Row]:
    """The rows, each logged as it comes."""
    table = []
    for row in measured:
        logger.info("%s  %s@%d  %.3f", row.candidate, row.space, row.proposals, row.gains["mode"])
        table.append(row)
    return table


def rows_table(title: str, table: Sequence[Row]) -> Table:
    """Return a line for each row; gains are in hundredths.

    Args:
        title: Title of the table.
        table: Rows in the order of the lines.
    """
    lines = Table("search", "space", "proposals", "n", *MEASURES, "mode over first", title=title)
    for row in table:
        mode, *others = (f"{100 * row.gains[measure]:.1f}" for measure in MEASURES)
        lines.add_row(
            row.candidate,
            row.space,
            str(row.proposals),
            str(row.landscapes),
            f"{mode} ± {100 * row.standard_error:.1f}",
            *others,
            f"{100 * row.over_first:+.1f} ± {100 * row.over_first_error:.1f}",
        )
    return lines


if __name__ == "__main__":
    run_job(main)
