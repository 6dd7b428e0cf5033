"""Add the cells of a study's work folder to a table of the archive.

python jobs/experiments/collect.py runs/compare/resnet20 rivals-resnet20
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro
from archive import RESULTS, add_to_table, records_of

from fppmo_ray.job import run_job


def main(
    cells: Annotated[Path, tyro.conf.Positional],
    table: Annotated[str, tyro.conf.Positional],
    *,
    archive: Path = RESULTS,
) -> None:
    """Add all cells of a folder to a CSV file; cells of the same name are replaced.

    Args:
        cells: Work folder of a study.
        table: Name of the CSV file without its suffix. The part before the first ``-`` names the
            kind of study, which decides how ``tables.py`` prints it.
        archive: Folder of the CSV files.
    """
    if not cells.is_dir():
        raise ValueError(f"expected a folder of cells, got {cells}")
    records = records_of(str(cells))
    add_to_table(table, records, archive)
    print(f"{len(records)} cells added to {archive / table}.csv")


if __name__ == "__main__":
    run_job(main)
