"""What the page about a search tells of other methods."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_page import a_run

from fppmo_ray.report import write_report
from fppmo_ray.report.rivals import read_rivals


def a_cell(folder: Path, method: str, seed: int, accuracy: float, macs: int = 1_000_000) -> None:
    figures = {"macs": macs, "macs_cut": 0.5, "after": {"test": {"accuracy": accuracy}}}
    folder.mkdir(exist_ok=True)
    told = {"key": {"method": method, "seed": seed, "macs_cut": 0.5}, "figures": figures}
    (folder / f"{method}-50-s{seed}.json").write_text(json.dumps(told))


@pytest.fixture
def cells(tmp_path: Path) -> Path:
    folder = tmp_path / "cells"
    a_cell(folder, "fpgm", 0, 0.90)
    a_cell(folder, "fpgm", 1, 0.92)
    a_cell(folder, "random", 0, 0.85)
    a_cell(folder, "fppmo", 0, 0.95)
    a_cell(folder, "fppmo@80", 0, 0.93)
    return folder


def test_rivals_are_the_other_methods_from_the_worst_to_the_best(cells: Path) -> None:
    rivals = read_rivals(cells, 2_000_000)
    assert [rival.method for rival in rivals] == ["random", "fpgm"]
    assert rivals[0].deviation == 0
    assert rivals[1].mean == pytest.approx(0.91)
    assert rivals[1].deviation == pytest.approx(0.0141421, rel=1e-4)


def test_the_page_tells_and_draws_them(cells: Path, tmp_path: Path) -> None:
    page, *figures = write_report(a_run(tmp_path / "run"), tmp_path / "report.html", rivals=cells)
    text = page.read_text()
    assert "<td>fpgm</td><td>0.5</td><td>2</td><td>1.00</td><td>91.00 ± 1.41</td>" in text
    [results] = [path for path in figures if path.name == "report-results.svg"]
    assert "fpgm" in results.read_text()
    assert "fppmo@80" not in text


def test_cells_of_another_network_are_refused(cells: Path) -> None:
    with pytest.raises(ValueError, match="is of a network of 2,000,000 MACs, and this search of"):
        read_rivals(cells, 3_000_000)


def test_a_folder_without_cells_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no cells"):
        read_rivals(tmp_path, 1)
    (tmp_path / "other.json").write_text("[1]")
    with pytest.raises(ValueError, match="is no cell"):
        read_rivals(tmp_path, 1)
