"""Is any change of a run directory's files read as it stands, or answered by a traceback?

    python jobs/experiments/mutations.py --repeats 40 --output runs/mutations.csv

A small search is run once. Then every kind of line of its journal, and every file that it leaves,
is changed in every way, and read. A changed journal has to be refused with the line's number, and
to be repaired to the lines before it; where the change is the same as a crash (lines are missing at
the end), what is left has to be read. Some searches are resumed from changed files as well, and
have to end like the undisturbed one.

Then entries of lines are forged: the checksums are made again, so that nothing shows the change.
The journal, the status and the report then have to answer with a sentence, or as the line says.
"""

from __future__ import annotations

import random
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import ray
from archive import flattened, write_rows
from damage.files import changed_files, resumed_searches, run_search
from damage.journals import changed_lines, forged_lines, lines_with_latency
from damage.outcomes import outcomes_table
from rich.console import Console

from fppmo_ray.job import run_job


def main(
    repeats: int = 10, seed: int = 0, resumed: bool = True, output: Path | None = None
) -> None:
    """Change everything that a search leaves; end with 1 if a change is silent or a traceback.

    Args:
        repeats: Changes of each kind, of a line or place drawn at random.
        seed: Random seed of the changes.
        resumed: Resume searches too, one for each kind of line and file.
        output: CSV file with a row for each kind of change.
    """
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        origin = Path(folder) / "origin"
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
        try:
            run_search(origin, resume=False)
            rng, scratch = random.Random(seed), Path(folder) / "changed"
            rows = [
                *changed_lines(lines_with_latency(origin), scratch, rng, repeats),
                *forged_lines(origin, scratch, rng, repeats),
                *changed_files(origin, scratch, rng, repeats),
                *(resumed_searches(origin, scratch, rng) if resumed else ()),
            ]
        finally:
            ray.shutdown()
    Console(width=140).print(outcomes_table(rows))
    if output is not None:
        write_rows(output, [flattened(asdict(row)) for row in rows])
    if any(row.outcomes["silent"] or row.outcomes["traceback"] for row in rows):
        sys.exit("error: a change was read as it stood, or answered by a traceback")


if __name__ == "__main__":
    run_job(main)
