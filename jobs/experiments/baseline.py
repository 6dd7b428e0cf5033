"""Train the dense network that is pruned later, on search-train alone.

    python jobs/experiments/baseline.py --data DIR --network resnet56 --fine-tune-epochs 200 \
        --learning-rate 0.1 --gpus-per-worker 1 --output baselines/resnet56
    fppmo-ray submit jobs/experiments/baseline.py ... --output /absolute/path --address http://HEAD:8265

Public weights have seen all training images, so scores and choices on some of them flatter these.
The output holds ``weights.pt``, ``search_val_rows.npy`` (the rows that were held out: give them to
the other jobs) and ``baseline.json`` (accuracies, curve, recipe). The same command goes on where it
was stopped (after the epoch that was running).
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cells import Cell, measure_missing, read_all, stopped_by_signal
from fine_tuning import Tuned, Tuner, TuningTask, TuningWorker
from trained import fixed_key

from fppmo_ray import Placement, Recipe, SearchSettings, Splits, load_dataset
from fppmo_ray.durable_files import write_whole
from fppmo_ray.job import require_lasting, run_job
from fppmo_ray.service.connection import connection
from fppmo_ray.service.pool.work import Work
from fppmo_ray.service.pool.worker_pool import worker_pool
from fppmo_ray.service.problem import Problem, state_problem
from fppmo_ray.training import (
    DType,
    build_network,
    load_weights,
    splits_from_files,
    stratified_splits,
)

WEIGHTS, ROWS, CELL = "weights.pt", "search_val_rows.npy", "baseline"
_ANY_CUT = 0.5  # a problem names one; nothing is pruned here
_HELD_OUT_SHARE = 0.1
RECIPE = Recipe(distillation_weight=0.0)
"""Where it differs from the default, for want of a network to learn from."""


def leave_weights(tuner: Tuner, tuned: Tuned) -> Mapping[str, Any]:
    """Leave the weights in the task's folder; accuracies on what was held out and on the test."""
    torch.save(tuned.network.state_dict(), tuned.task.folder / WEIGHTS)
    return {
        **tuner.look_at_held_out(tuned.network),
        "test": tuner.look(tuned.network, "test"),
        "epochs": tuned.epochs,
    }


def main(
    data: Path,
    output: Path,
    placement: Placement,
    recipe: Recipe = RECIPE,
    *,
    network: str = "resnet56",
    weights: Path | None = None,
    search_val_rows: Path | None = None,
    dtype: DType = "float32",
    seed: int = 0,
) -> None:
    """Train, and keep the weights and the rows they have never seen.

    Args:
        data: Folder with CIFAR-10 as parquet files or in torchvision's layout.
        output: Folder for weights, rows and figures; all workers must see it.
        placement: Where it is trained; there is work for one worker.
        recipe: How it is trained; from labels alone.
        network: Which network: resnet20, 32, 44, 56 or 110 (``_b``: projection shortcuts), or
            vgg16_bn.
        weights: Where training begins; by default with random weights.
        search_val_rows: .npy file of the rows to hold out; by default 10 % of every class.
        dtype: Of the passes.
        seed: Of the weights, the order of the images, and the rows.
    """
    require_lasting(output)
    if recipe.epochs < 1:
        raise ValueError("--fine-tune-epochs must be at least 1: a baseline is trained")
    if recipe.distillation_weight:
        raise ValueError(
            "--distillation-weight must be 0, the default here: there is no network to learn from, "
            f"got {recipe.distillation_weight}"
        )
    dataset = load_dataset("cifar10", data)
    dense = build_network(network, dataset.num_classes, seed=seed)
    if weights is not None:
        load_weights(dense, weights)
    settings = SearchSettings(macs_cut=_ANY_CUT, dtype=dtype, seed=seed, recipe=recipe)
    splits = _splits(dataset.train.labels, search_val_rows, seed)
    problem = state_problem(dense, dataset, settings, splits=splits, placement=placement)
    cell = Cell(name=CELL, key=_key(problem, seed))
    under_way = output.resolve() / "under-way"

    task = TuningTask(
        keep=None, recipe=recipe, seed=seed, compute=problem.compute, folder=under_way
    )
    work = Work(name=f"training of {network}", method="measure", arguments=(task, leave_weights))
    with (
        connection(placement),
        stopped_by_signal(output) as stop,
        worker_pool(
            TuningWorker, problem, num_workers=1, demand=placement.demand, stop=stop
        ) as pool,
    ):
        measure_missing(output, [(cell, work)], pool)
    if under_way.is_dir():
        np.save(under_way / ROWS, np.union1d(splits.search_val, splits.choose_val))
        for name in (WEIGHTS, ROWS):
            write_whole(output / name, (under_way / name).read_bytes())
        shutil.rmtree(under_way)
    figures = read_all(output)[CELL].figures
    for split in ("held_out", "test"):
        print(f"{split}: {100 * figures[split]['accuracy']:.2f} %")


def _splits(labels: np.ndarray, rows: Path | None, seed: int) -> Splits:
    """Which part of the rows held out is search-val does not matter: neither is trained on."""
    if rows is not None:
        return splits_from_files(labels, search_val=rows, seed=seed)
    search_val, choose_val = 0.6 * _HELD_OUT_SHARE, 0.4 * _HELD_OUT_SHARE
    return stratified_splits(labels, search_val=search_val, choose_val=choose_val, seed=seed)


def _key(problem: Problem, seed: int) -> dict[str, object]:
    return {
        **fixed_key(problem),
        "compute": asdict(problem.compute),
        "recipe": asdict(problem.recipe),
        "seed": seed,
    }


if __name__ == "__main__":
    run_job(main)
