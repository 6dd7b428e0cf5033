"""Recipes: what a variant changes, what a cell tells, and the job on a few real images."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import cells
import fine_tuning
import numpy as np
import pytest
import ray
import recipes
from agreement.masks import different_masks
from fine_tuning import Tuner, TuningTask, TuningWorker
from recipes import VARIANTS, look, recipe_of, recipe_tables
from rich.console import Console
from small_problem import small_problem
from trained import Trained

from fppmo_ray import Numerics, Recipe, Resources, Scoring, SearchSettings
from fppmo_ray.distribution import Budget
from fppmo_ray.pruning import importance
from fppmo_ray.service.problem import Problem
from fppmo_ray.training import PLAIN_COMPUTE

for module in (cells, recipes, fine_tuning):  # Ray's workers do not find them
    ray.cloudpickle.register_pickle_by_value(module)

DEFAULT = Recipe(epochs=2, batch_size=64)
SETTINGS = SearchSettings(
    macs_cut=0.57,
    fine_tune=DEFAULT,
    numerics=Numerics(dtype="float32"),
    scoring=Scoring(recalibrate_images=64),
)


def test_a_variant_is_the_default_but_for_what_it_names() -> None:
    assert recipe_of("default", DEFAULT) == DEFAULT
    assert recipe_of("learning-rate=0.1,schedule=one_cycle", DEFAULT) == replace(
        DEFAULT, learning_rate=0.1, schedule="one_cycle"
    )
    assert recipe_of("batch-size=32,clip-norm=1", DEFAULT) == replace(
        DEFAULT, batch_size=32, clip_norm=1.0
    )
    for variant in VARIANTS:
        assert recipe_of(variant, DEFAULT).epochs == 2


@pytest.mark.parametrize(
    ("variant", "complaint"),
    [
        ("rate=1", "expected default or SETTING=VALUE of epochs, batch-size, .*, got 'rate=1'"),
        ("learning-rate", "expected default or SETTING=VALUE .*, got 'learning-rate'"),
        ("learning-rate=fast", "expected a number for learning_rate, got 'fast'"),
        ("label-smoothing=1", r"label_smoothing must be in \[0, 1\), got 1.0"),
    ],
)
def test_a_variant_that_is_none_is_refused(variant: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        recipe_of(variant, DEFAULT)


def record(variant: str, mask: str, accuracy: float, **key: str) -> cells.Record:
    read = {name: {"loss": 1 - accuracy, "accuracy": accuracy} for name in ("held_out", "test")}
    epochs = [{"seconds": 3.0}, {"seconds": 5.0}]
    return cells.Record(
        key={"variant": variant, "mask": mask, "seed": 0, **key},
        figures={**read, "epochs": epochs},
        **{"seconds": 8.0, "versions": {}, "date": "", "cpu": ""},
    )


def test_recipes_are_paired_over_masks_and_seeds_and_the_best_comes_first() -> None:
    records = [
        record("default", "uniform l1", 0.80),
        record("default", "chosen by search 0", 0.84),
        record("default", "uniform l1", 0.81, weights="averaged, 0.99"),
        record("default", "chosen by search 0", 0.86, weights="averaged, 0.99"),
        record("learning-rate=0.1", "uniform l1", 0.82),
    ]
    console = Console(width=200, record=True, file=io.StringIO())
    tables = recipe_tables(records)
    console.print(tables[0])
    rows = [line for line in console.export_text().splitlines() if "│" in line]
    cut = [[cell.strip() for cell in row.strip("│ ").split("│")] for row in rows]
    assert [row[:5] for row in cut] == [
        ["default", "averaged, 0.99", "2", "83.50", "+1.50 [-4.85, +7.85]"],  # +1 and +2
        ["default", "last", "2", "82.00", ""],
        ["learning-rate=0.1", "last", "1", "82.00", "+2.00 (n = 1)"],
    ]
    assert {row[-1] for row in cut} == {"4.0"}
    assert [str(table.title).split(":")[0] for table in tables] == [
        "all masks",
        "uniform l1",
        "chosen by search 0",
    ]


@pytest.fixture(scope="module")
def problem(few_images: Path, weights: Path) -> Problem:
    return small_problem(few_images, weights, SETTINGS)


def test_a_cell_holds_what_the_tuner_sees_of_the_fine_tuned_network(
    problem: Problem, tmp_path: Path
) -> None:
    l1 = importance(problem.network, problem.tracing, "l1")
    budget = Budget.from_cut(problem.tracing.space, 0.57)
    [mask] = different_masks(budget, {"l1": l1}, 1, seed=0)
    task = TuningTask(
        keep=mask.keep, recipe=DEFAULT, seed=0, compute=PLAIN_COMPUTE, folder=tmp_path / "plain"
    )
    worker, tuner = TuningWorker(problem, 0), Tuner(problem)
    assert tuner.train(task) is None
    tuned = tuner.train(task)
    assert tuned is not None
    again = replace(task, folder=tmp_path / "again")
    assert worker.measure(again, look) is None
    measured = worker.measure(again, look)
    assert measured is not None
    assert measured.figures["held_out"] == tuner.look_at_held_out(tuned.network)["held_out"]
    assert measured.figures["test"] == tuner.look(tuned.network, "test")
    assert [epoch["train_loss"] for epoch in measured.figures["epochs"]] == [
        epoch["train_loss"] for epoch in tuned.epochs
    ]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:channel groups left whole")
@pytest.mark.usefixtures("local_ray")
def test_the_job_does_what_is_missing(
    few_images: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.npy"
    np.save(rows, np.arange(300, 400))
    trained = Trained(data=few_images, weights=weights, search_val_rows=rows, network="resnet20")

    def run(*variants: str) -> dict[str, Any]:
        recipes.main(
            trained,
            SETTINGS,
            Resources(workers=1),
            recipes.Plan(variants=variants),
            cells=tmp_path / "results",
        )
        files = (tmp_path / "results").glob("*.json")
        return {file.stem: json.loads(file.read_text()) for file in files}

    first = run("default")
    assert sorted(first) == ["compute", "default-mask0-s0"]
    second = run("default", "distillation-weight=0.5")
    assert first.items() <= second.items()
    assert not any((tmp_path / "results" / "under-way").iterdir())
    assert "distillation-weight=0.5" in capsys.readouterr().out
