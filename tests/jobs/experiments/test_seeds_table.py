"""One table of several runs, of searches with one budget and with several."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import seeds_table


def row(name: str, before: float, after: float, **budget: float) -> dict[str, object]:
    moments = {"before": before, "after": after}
    figures = {moment: {"test": {"accuracy": value}} for moment, value in moments.items()}
    return {"name": name, "macs_cut": budget.get("budget", 0.5), **budget, **figures}


def result(folder: Path, seed: int, *variants: dict[str, object]) -> Path:
    path = folder / f"{seed}.json"
    dense = row("dense", 0.9, 0.9) | {"macs_cut": 0.0}
    settings = {"seed": seed, "scoring": {"score_steps": 5}}
    run = {"settings": settings, "scores": {"scored": 8}, "variants": [dense, *variants]}
    path.write_text(json.dumps(run))
    return path


def printed(capsys: pytest.CaptureFixture[str], *paths: Path) -> list[str]:
    seeds_table.main(paths)
    lines = capsys.readouterr().out.replace("│", " ").splitlines()
    return [" ".join(line.split()) for line in lines]


def test_runs_with_one_budget_are_paired_by_seed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [
        result(tmp_path, 0, row("importance-only", 0.3, 0.80), row("fppmo", 0.5, 0.81)),
        result(tmp_path, 1, row("importance-only", 0.3, 0.82), row("fppmo", 0.5, 0.85)),
    ]
    lines = printed(capsys, *runs)
    assert "FPPMO 83.00 ± 2.83 50.0 %" in lines
    assert (
        "FPPMO - importance-only after equal fine-tuning: +2.00 points, standard error 1.00, n = 2"
    ) in lines


def test_every_budget_has_rows_and_differences_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    variants = [
        row("importance-only", 0.6, 0.86, budget=0.4),
        row("fppmo", 0.7, 0.87, budget=0.4),
        row("importance-only", 0.3, 0.80, budget=0.6),
        row("fppmo", 0.5, 0.84, budget=0.6),
    ]
    lines = printed(capsys, result(tmp_path, 0, *variants))
    assert [line for line in lines if line.startswith("dense")] == [
        "dense 90.00 0.0 %",
        "dense, same extra training 90.00 0.0 %",
    ]
    assert "FPPMO, budget 0.4 87.00 40.0 %" in lines
    assert "FPPMO, budget 0.6 84.00 60.0 %" in lines
    difference = "FPPMO - importance-only after equal fine-tuning, budget"
    assert [line for line in lines if line.startswith(difference)] == [
        f"{difference} 0.4: +1.00 points",
        f"{difference} 0.6: +4.00 points",
    ]


def test_runs_with_different_budgets_are_refused(tmp_path: Path) -> None:
    one = result(tmp_path, 0, row("fppmo", 0.5, 0.8))
    several = result(tmp_path, 1, row("fppmo", 0.5, 0.8, budget=0.4))
    with pytest.raises(ValueError, match=r"the same budgets, got \[\[None\], \[0\.4\]\]"):
        seeds_table.main((one, several))
