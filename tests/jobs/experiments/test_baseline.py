"""Baselines: weights that never saw what was held out, and the rows that say what that is."""

from __future__ import annotations

from pathlib import Path

import baseline
import cells
import fine_tuning
import numpy as np
import pytest
import ray
from fine_tuning import TuningTask, TuningWorker
from small_problem import small_problem

from fppmo_ray import Placement, Recipe, SearchSettings, load_dataset
from fppmo_ray.training import (
    PLAIN_COMPUTE,
    build_network,
    evaluate,
    load_weights,
    open_images,
)

for module in (baseline, cells, fine_tuning):  # Ray's workers do not find them
    ray.cloudpickle.register_pickle_by_value(module)

RECIPE = Recipe(epochs=2, batch_size=64, distillation_weight=0.0)


def test_the_weights_left_behind_are_those_whose_accuracy_is_told(
    few_images: Path, weights: Path, tmp_path: Path
) -> None:
    settings = SearchSettings(macs_cut=0.5, dtype="float32", recipe=RECIPE)
    problem = small_problem(few_images, weights, settings)
    task = TuningTask(keep=None, recipe=RECIPE, seed=0, compute=PLAIN_COMPUTE, folder=tmp_path)
    worker = TuningWorker(problem, 0)
    assert worker.measure(task, baseline.leave_weights) is None  # one epoch a call
    measured = worker.measure(task, baseline.leave_weights)
    assert measured is not None
    trained = build_network("resnet20", 10, seed=1)
    load_weights(trained, tmp_path / "weights.pt")
    dataset = problem.dataset
    images = open_images(dataset.test, None, dataset, "cpu")
    told = measured.figures["test"]["accuracy"]
    assert evaluate(trained.eval(), images.batches(250)).accuracy == told


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:channel groups left whole")
@pytest.mark.usefixtures("local_ray")
def test_the_job_trains_once_and_holds_a_tenth_of_every_class_out(
    few_images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(seed: int) -> dict[str, bytes]:
        baseline.main(
            few_images, tmp_path, Placement(workers=1), RECIPE, network="resnet20", seed=seed
        )
        return {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    first = run(0)
    assert sorted(first) == ["baseline.json", "search_val_rows.npy", "weights.pt"]
    assert "held_out: " in capsys.readouterr().out
    assert run(0) == first
    rows = np.load(tmp_path / "search_val_rows.npy")
    labels = load_dataset("cifar10", few_images).train.labels
    shares = np.bincount(labels[rows], minlength=10) / np.bincount(labels, minlength=10)
    assert len(rows) == 40
    assert np.allclose(shares, 0.1, atol=0.05)
    with pytest.raises(ValueError, match="was measured with data = "):
        run(1)


@pytest.mark.parametrize(
    ("recipe", "complaint"),
    [
        (Recipe(epochs=0, distillation_weight=0.0), "--fine-tune-epochs must be at least 1"),
        (Recipe(), "--distillation-weight must be 0, .*no network to learn from, got 0.5"),
    ],
)
def test_a_baseline_without_epochs_or_with_a_teacher_is_refused(
    tmp_path: Path, recipe: Recipe, complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        baseline.main(tmp_path, tmp_path, Placement(), recipe)
