"""What the page about a search tells of how right scores are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_page import a_run

from fppmo_ray.report import write_report
from fppmo_ray.report.fidelity import read_agreements
from fppmo_ray.service.record.facts import Started

STARTED = Started(
    search_id="c0ffee",
    identity={"network": "n", "space": "s"},
    versions={},
    groups=[],
    dense_macs=1,
)
TRUE = {"near00": 0.3, "near01": 0.4, "different00": 0.6, "different01": 0.5}
SHALLOW = {"near00": 1.0, "near01": 1.1, "different00": 1.3, "different01": 1.2}  # in order
DEEP = {"near00": 0.8, "near01": 0.7, "different00": 0.9, "different01": 0.95}  # two pairs swapped


def a_cell(folder: Path, name: str, figures: object, network: str = "n") -> None:
    folder.mkdir(exist_ok=True)
    told = {"key": {"network": network, "space": "s"}, "figures": figures}
    (folder / f"{name}.json").write_text(json.dumps(told))


@pytest.fixture
def cells(tmp_path: Path) -> Path:
    folder = tmp_path / "cells"
    for mask, loss in TRUE.items():
        a_cell(folder, f"{mask}-truth-0", {"held_out": {"loss": loss}})
        a_cell(folder, f"{mask}-50steps-adapted-0", {"val_loss": DEEP[mask]})
        a_cell(folder, f"{mask}-0steps-0", {"val_loss": SHALLOW[mask]})
    a_cell(folder, "near00-0steps-1", {"val_loss": 9.0})  # a repeat with another seed
    a_cell(folder, "near07-0steps-0", {"val_loss": 9.0})  # not fine-tuned yet
    a_cell(folder, "engine", {"engine": {}})
    return folder


def test_scores_are_told_from_the_rightest_on(cells: Path) -> None:
    told = [(one.kind, one.correlation) for one in read_agreements(cells, STARTED)]
    # 1 - 6 (1 + 1 + 1 + 1) / (4 * 15)
    assert told == [("0steps", pytest.approx(1)), ("50steps-adapted", pytest.approx(0.6))]


def test_the_page_tells_and_draws_how_right_scores_are(cells: Path, tmp_path: Path) -> None:
    run_dir = a_run(tmp_path / "run", identity=STARTED.identity)
    page, *figures = write_report(run_dir, tmp_path / "report.html", fidelity=cells)
    text = page.read_text()
    assert "<td>50steps-adapted</td><td>4</td><td>0.60</td>" in text
    [drawn] = [path for path in figures if path.name == "report-fidelity.svg"]
    assert "Spearman up to 1.00" in drawn.read_text()


@pytest.mark.parametrize("told", ["network", "space"])
def test_cells_of_other_weights_are_refused(cells: Path, told: str) -> None:
    started = Started(**{**vars(STARTED), "identity": {**STARTED.identity, told: "other"}})
    with pytest.raises(ValueError, match=rf"0.json is of another {told} than this search"):
        read_agreements(cells, started)


def test_a_folder_with_too_few_cells_or_others_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "few"
    for mask in ("near00", "near01", "different00"):
        a_cell(folder, f"{mask}-truth-0", {"held_out": {"loss": 1.0}})
        a_cell(folder, f"{mask}-0steps-0", {"val_loss": 1.0})
    with pytest.raises(ValueError, match=r"holds no cells of .* with scores of 4 or more masks"):
        read_agreements(folder, STARTED)
    (folder / "near09-0steps-0.json").write_text("{}")
    with pytest.raises(ValueError, match="is no cell"):
        read_agreements(folder, STARTED)
