"""Print the tables of the archive, or of a study that is still running.

python jobs/experiments/tables.py                     # all of them
python jobs/experiments/tables.py rivals-resnet20 rules-tuned
python jobs/experiments/tables.py runs/compare/resnet20 --study rivals
python jobs/experiments/tables.py rivals-resnet20 fidelity-resnet20 --figures runs/figures
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from agreement.figure import draw_agreement
from agreement.table import agreement_tables
from archive import RESULTS, read_rows, records_of, table_names, unflattened
from cells import Record
from chaos import Trial, trials_table
from damage.outcomes import Row as Changed
from damage.outcomes import outcomes_table
from feedback import Row as FeedbackRow
from feedback import feedback_table
from few_images import Row as FewImages
from few_images import few_images_table
from landscape_searches import Row
from long_training import Row as LongTraining
from long_training import long_training_table
from model_zoo import Attempt, attempts_table
from packages import packages_table
from recipes import recipe_tables
from rich.console import Console
from rich.table import Table
from rivals.figure import draw_comparison
from rivals.table import comparison_tables
from rules import rows_table
from searches import searches_table
from untrained import Row as Untrained
from untrained import untrained_tables

from fppmo_ray.job import run_job

Study = Literal["rivals", "fidelity", "recipes", "searches"]
"""Studies whose measurements are cells."""


def _fidelity_tables(records: Sequence[Record]) -> list[Table]:
    """Agreement of losses as they are and of weighed losses, then cost and masks."""
    weighed, weighed_near, *others = agreement_tables(records, capacity_weight=1.0)
    as_they_are = agreement_tables(records)[:2]
    return [*as_they_are, weighed, weighed_near, *others]


def _load_table(path: Path) -> Table:
    table = Table("figure", "value", title="large searches")
    for row in read_rows(path):
        table.add_row(row["figure"], row["value"])
    return table


_OF_CELLS: dict[str, Callable[[Sequence[Record]], list[Table]]] = {
    "rivals": comparison_tables,
    "fidelity": _fidelity_tables,
    "recipes": recipe_tables,
    "searches": lambda records: [searches_table(records)],
}
_OF_ROWS: dict[str, Callable[[Path], list[Table]]] = {
    "rules": lambda path: [rows_table(path.stem, [Row(**row) for row in _values(path)])],
    "networks": lambda path: [attempts_table([Attempt(**row) for row in _values(path)])],
    "chaos": lambda path: [trials_table([Trial(**row) for row in _values(path)])],
    "load": lambda path: [_load_table(path)],
    "packages": lambda path: [packages_table(path)],
    "mutations": lambda path: [outcomes_table([Changed(**row) for row in _values(path)])],
    "feedback": lambda path: [feedback_table([FeedbackRow(**row) for row in _values(path)])],
    "long": lambda path: [long_training_table([LongTraining(**row) for row in _values(path)])],
    "unlabelled": lambda path: [few_images_table([FewImages(**row) for row in _values(path)])],
    "untrained": lambda path: untrained_tables([Untrained(**row) for row in _values(path)]),
}
_DRAWN: dict[str, Callable[[Sequence[Record], Path], None]] = {
    "rivals": draw_comparison,
    "fidelity": draw_agreement,
}


def main(
    sources: Annotated[tuple[str, ...], tyro.conf.Positional] = (),
    *,
    study: Study | None = None,
    figures: Path | None = None,
) -> None:
    """Print tables; draw figures of rivals and of fidelity if asked to.

    Args:
        sources: Tables of the archive or work folders of studies; by default all tables.
        study: The study that work folders belong to; names of tables begin with theirs.
        figures: Folder for figures, one for each comparison and each study of fidelity.
    """
    console = Console(width=None if sys.stdout.isatty() else 170)
    for source in sources or table_names():
        kind = source.partition("-")[0]
        if kind in _OF_ROWS and (path := RESULTS / f"{source}.csv").is_file():
            console.print(*_OF_ROWS[kind](path), sep="\n")
            continue
        records = list(records_of(source).values())
        kind = study or kind
        if kind not in _OF_CELLS:
            raise ValueError(f"say by --study which study {source} is: {', '.join(_OF_CELLS)}")
        console.print(*_OF_CELLS[kind](records), sep="\n")
        if figures is not None and kind in _DRAWN:
            figures.mkdir(parents=True, exist_ok=True)
            _DRAWN[kind](records, figures / f"{Path(source).name}.png")


def _values(path: Path) -> list[dict[str, Any]]:
    return [unflattened(row) for row in read_rows(path)]


if __name__ == "__main__":
    run_job(main)
