"""Distillation on a few images: rows that go on, and the table's pairs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import few_images as study
import pytest
from archive import read_rows
from few_images import Row, few_images_table

pytestmark = pytest.mark.filterwarnings("ignore:channel groups left whole")


def row(feature_weight: float, seed: int, after: float, method: str = "obs") -> Row:
    return Row(
        network="resnet20",
        macs_cut=0.57,
        images=500,
        method=method,
        steps=300,
        feature_weight=feature_weight,
        learning_rate=0.02,
        seed=seed,
        before=77.0,
        after=after,
        seconds=60.0,
    )


def test_features_are_compared_with_answers_alone_on_the_same_images():
    table = few_images_table([row(0.0, 0, 82), row(0.0, 1, 83), row(10.0, 1, 85), row(10.0, 0, 84)])
    cells = zip(*[list(column.cells) for column in table.columns], strict=True)
    assert [line[4:5] + line[7:12] for line in cells] == [
        ("0", "77.00 ± 0.00", "82.50 ± 0.71", "", "", "2"),
        ("10", "77.00 ± 0.00", "84.50 ± 0.71", "+2.00 [+2.00, +2.00]", "", "2"),
    ]


@pytest.mark.parametrize("mended", [" + refit", ", reconstructed"])
def test_methods_are_compared_with_l1_that_was_mended_in_the_same_way(mended: str):
    method = "allocation, gamma 1" + mended.removesuffix(" + refit")
    rows = [row(10.0, seed, 80 + seed, "l1" + mended) for seed in (0, 1)]
    rows += [row(10.0, seed, 83 + seed, method) for seed in (0, 1)]
    differences = list(few_images_table(rows).columns[10].cells)
    assert differences == ["", "+3.00 [+3.00, +3.00]"]


def test_every_way_gives_a_row_and_no_row_is_measured_twice(
    few_images: Path, weights: Path, tmp_path: Path
):
    output = tmp_path / "few.csv"
    options = {"images": (50,), "seeds": (0,), "steps": (2,), "methods": ("l1 + refit",)}
    study.main(few_images, weights, output=output, **options)
    rows = read_rows(output)
    assert [entry["feature_weight"] for entry in rows] == ["0.0", "10.0"]
    assert rows[0]["before"] == rows[1]["before"]
    study.main(few_images, weights, output=output, **options)
    assert read_rows(output) == rows


def test_as_prune_the_weight_of_least_divergence_is_taken():
    found = {0: 0.3, 1: 0.1, 3: 0.2}  # divergence by weight
    prune = {
        f"allocation, gamma {gamma}, reconstructed": SimpleNamespace(divergence=distance)
        for gamma, distance in found.items()
    }
    subject: Any = SimpleNamespace(prune=lambda method, budget: prune[method])
    budget: Any = None
    chosen = study.pruned_by(subject, "allocation, gamma chosen, reconstructed", budget)
    assert chosen.divergence == 0.1
    other = study.pruned_by(subject, "allocation, gamma 3, reconstructed", budget)
    assert other.divergence == 0.2


def test_unknown_methods_are_refused(few_images: Path, weights: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="methods must be some of l1, fpgm"):
        study.main(few_images, weights, output=tmp_path / "few.csv", methods=("best",))
