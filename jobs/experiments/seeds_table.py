"""One table of several runs: means, standard deviations, paired differences.

    python jobs/experiments/seeds_table.py runs/a/result.json runs/b/result.json ...

The runs must differ in their seeds only; a single one gets no spread. Of searches with several
budgets, every budget has its own rows.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from fppmo_ray.job import run_job

_ROWS = (
    ("dense", "dense", "before"),
    ("dense, same extra training", "dense", "after"),
    ("importance-only, before fine-tuning", "importance-only", "before"),
    ("FPPMO, before fine-tuning", "fppmo", "before"),
    ("importance-only", "importance-only", "after"),
    ("FPPMO", "fppmo", "after"),
)


def main(results: Annotated[tuple[Path, ...], tyro.conf.Positional]) -> None:
    """Print the table.

    Args:
        results: result.json files.
    """
    if not results:
        raise ValueError("a table needs at least one result.json")
    runs = [_read(path) for path in results]
    budgets = _budgets(runs)
    table = Table("network", "test accuracy, %", "MACs cut", title=_title(runs))
    for title, name, moment, budget in _lines(budgets):
        rows = [_row(run, name, budget) for run in runs]
        cut = statistics.fmean(100 * row["macs_cut"] for row in rows)
        table.add_row(title, _spread([_accuracy(row, moment) for row in rows]), f"{cut:.1f} %")
    console = Console(width=110)
    console.print(table)
    for budget in budgets:
        behind = _behind(budget)
        for title, moment in (("before", "before"), ("after equal", "after")):
            difference = _difference(runs, moment, budget)
            console.print(f"FPPMO - importance-only {title} fine-tuning{behind}: {difference}")


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path} does not exist; a finished run directory holds a result.json")
    run: dict[str, Any] = json.loads(path.read_text())
    return run


def _title(runs: list[dict[str, Any]]) -> str:
    seeds = ", ".join(str(run["settings"]["seed"]) for run in runs)
    return f"seeds {seeds}; scores x steps: {', '.join(sorted({_costs(run) for run in runs}))}"


def _costs(run: dict[str, Any]) -> str:
    return f"{run['scores']['scored']} x {run['settings']['scoring']['score_steps']}"


def _lines(budgets: list[float | None]) -> Iterator[tuple[str, str, str, float | None]]:
    """Title, name and moment of every row, and whose budget's it is."""
    yield from ((*row, None) for row in _ROWS if row[1] == "dense")
    for budget in budgets:
        for title, name, moment in _ROWS:
            if name != "dense":
                yield f"{title}{_behind(budget)}", name, moment, budget


def _behind(budget: float | None) -> str:
    return "" if budget is None else f", budget {budget}"


def _budgets(runs: list[dict[str, Any]]) -> list[float | None]:
    """The cuts of searches with several; None stands for the only one."""
    of_runs = [
        [row.get("budget") for row in run["variants"] if row["name"] == "fppmo"] for run in runs
    ]
    if any(budgets != of_runs[0] for budgets in of_runs):
        raise ValueError(f"the runs must have the same budgets, got {of_runs}")
    return of_runs[0]


def _row(run: dict[str, Any], name: str, budget: float | None) -> dict[str, Any]:
    rows = [row for row in run["variants"] if row["name"] == name]
    row: dict[str, Any] = next(row for row in rows if row.get("budget") in (None, budget))
    return row


def _accuracy(row: dict[str, Any], moment: str) -> float:
    accuracy: float = row[moment]["test"]["accuracy"]
    return 100 * accuracy


def _spread(values: list[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{statistics.fmean(values):.2f} ± {statistics.stdev(values):.2f}"


def _difference(runs: list[dict[str, Any]], moment: str, budget: float | None) -> str:
    """Mean of the paired differences, with its standard error."""
    differences = [
        _accuracy(_row(run, "fppmo", budget), moment)
        - _accuracy(_row(run, "importance-only", budget), moment)
        for run in runs
    ]
    line = f"{statistics.fmean(differences):+.2f} points"
    if len(differences) == 1:
        return line
    error = statistics.stdev(differences) / len(differences) ** 0.5
    return f"{line}, standard error {error:.2f}, n = {len(differences)}"


if __name__ == "__main__":
    run_job(main)
