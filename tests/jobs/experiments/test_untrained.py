"""Networks pruned without training: rows that go on, and the table's pairs."""

from __future__ import annotations

from pathlib import Path

import pytest
import untrained
from archive import read_rows
from untrained import CHOSEN, Row, untrained_tables
from untrained_methods import METHODS, Study

pytestmark = pytest.mark.filterwarnings("ignore:channel groups left whole")


def row(method: str, seed: int, accuracy: float, divergence: float = 1.0) -> Row:
    return Row(
        network="resnet20",
        macs_cut=0.57,
        images=100,
        method=method,
        seed=seed,
        accuracy=accuracy,
        divergence=divergence,
        parameters=100_000,
        seconds=2.0,
    )


def lines(rows: list[Row]) -> dict[str, list[str]]:
    (table,) = untrained_tables([row("dense", 0, 87.5), *rows])
    cells = [list(column.cells) for column in table.columns]
    return {name: values for name, *values in zip(*cells, strict=True)}


def test_methods_are_compared_with_l1_on_the_same_images():
    table = lines([row("l1", 0, 40), row("l1", 1, 42), row("fpgm", 1, 45), row("fpgm", 0, 43)])
    assert table["l1"][:3] == ["41.00 ± 1.41", "", "2"]
    assert table["fpgm"][:3] == ["44.00 ± 1.41", "+3.00 [+3.00, +3.00]", "2"]


def test_the_chosen_gamma_is_the_one_that_diverges_least_and_pays_for_all():
    table = lines(
        [
            row("l1", 0, 40),
            row("allocation, gamma 0.3", 0, 99, divergence=0.1),
            row("allocation, gamma 1", 0, 50, divergence=0.3),
            row("allocation, gamma 3", 0, 60, divergence=0.2),
        ]
    )
    assert table[CHOSEN] == ["60.00", "+20.00 (n = 1)", "1", "100,000", "4.0"]


def test_every_method_gives_a_row_and_no_row_is_measured_twice(
    few_images: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    output = tmp_path / "untrained.csv"
    options = {"macs_cuts": (0.5,), "images": (50,), "seeds": (0,), "random_scores": 2}
    untrained.main(few_images, weights, output=output, **options)
    rows = read_rows(output)
    assert [entry["method"] for entry in rows] == ["dense", *METHODS]
    parameters = {entry["method"]: int(entry["parameters"]) for entry in rows}
    assert parameters["l1"] == parameters["l1 + refit"] < parameters["allocation, gamma 1"]
    deep = {"macs_cuts": (0.8,), "methods": ("allocation, gamma 0, multiples of 8, reconstructed",)}
    with pytest.raises(ValueError, match=r"widths in multiples cost .* name a smaller cut"):
        untrained.main(few_images, weights, output=tmp_path / "deep.csv", **options | deep)
    monkeypatch.setattr(Study, "prune", None)  # nothing is left to do
    untrained.main(few_images, weights, output=output, **options)
    assert read_rows(output) == rows
