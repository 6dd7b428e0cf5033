"""The study of scores and truths on a few real images, and its tables."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cells
import fidelity
import fine_tuning
import numpy as np
import pytest
import ray
import torch
from agreement import worker as fidelity_worker
from agreement.masks import (
    Mask,
)
from agreement.study import Plan, Study, Task, seconds_left, tasks
from agreement.table import agreement_tables
from agreement.worker import Depth, FidelityWorker
from fine_tuning import TuningTask, classification_of
from ray_head import Head, stop_and_go_on
from rich.console import Console
from simulated_masks import (
    CUT,
    facts_of,
    write_search,
)
from small_problem import small_problem
from trained import Trained

from fppmo_ray import Numerics, Recipe, Resources, Sampler, Scoring, SearchSettings, Space
from fppmo_ray.distribution import (
    Budget,
)
from fppmo_ray.pruning import Candidate, score
from fppmo_ray.service.problem import Problem
from fppmo_ray.service.worker import PruningWorker
from fppmo_ray.service.worker_protocol import TrainingTask, WeightsSnapshot, digest, to_arrays
from fppmo_ray.training import ComputeConfig

for module in (cells, fidelity_worker, fine_tuning):  # Ray's workers do not find them
    ray.cloudpickle.register_pickle_by_value(module)


COMPUTE = ComputeConfig()


SETTINGS = SearchSettings(
    macs_cut=CUT,
    proposals=4,
    fine_tune=Recipe(epochs=1, batch_size=64),
    sampler=Sampler(population=4),
    numerics=Numerics(dtype="float32"),
    scoring=Scoring(
        score_by="labels",
        recalibrate_images=64,
        score_recalibrate_images=64,
        score_images=16,
        rescore_images=32,
    ),
    space=Space(ignore=("conv1",)),  # as in small_problem
).on("cpu", has_images=False)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the last 100 of the few training images."""
    path = tmp_path_factory.mktemp("rows") / "search_val.npy"
    np.save(path, np.arange(300, 400))
    return path


@pytest.fixture(scope="module")
def problem(few_images: Path, weights: Path) -> Problem:
    return small_problem(few_images, weights, SETTINGS)


@pytest.fixture(scope="module")
def mask(problem: Problem) -> Mask:
    budget = Budget.from_cut(problem.tracing.space, CUT)
    priority = np.random.default_rng(0).random(problem.tracing.space.num_filters)
    return Mask("random", budget.fill(priority), is_near=False)


def test_a_score_of_the_job_is_that_of_a_search(problem: Problem, mask: Mask) -> None:
    worker = FidelityWorker(problem, 0)
    many = worker.score(COMPUTE, mask.keep, Depth(steps=1), (0, 1, 2))
    few = worker.score(COMPUTE, mask.keep, Depth(steps=1, images="few"), (0, 1, 2))
    images = (
        classification_of(problem)
        .open(problem.tracing, problem.settings, torch.device("cpu"), threads=problem.threads)
        .images
    )
    candidate = Candidate(
        dense=problem.network.eval(),
        tracing=problem.tracing,
        keep=mask.keep,
        search_train=images("search_train"),
        held_out=images("search_val"),
        fidelity=replace(problem.settings.rescore_fidelity(), steps=1),
        recipe=problem.settings.fine_tune,
        seed=(0, 1, 2),
        compute=COMPUTE,
    )
    expected = score(candidate)
    assert many.figures["val_loss"] == expected.val_loss
    assert many.figures["val_accuracy"] == expected.val_accuracy
    few_images = replace(problem.settings.fidelity(), steps=1)
    as_proposed = score(replace(candidate, fidelity=few_images))
    assert few.figures["val_loss"] == as_proposed.val_loss


def test_the_truth_is_the_fine_tuning_of_a_search(
    problem: Problem, mask: Mask, tmp_path: Path
) -> None:
    recipe = replace(problem.settings.fine_tune, epochs=2, distillation_weight=0.5)
    tuned = TuningTask(keep=mask.keep, recipe=recipe, seed=3, compute=COMPUTE, folder=tmp_path)
    worker = FidelityWorker(problem, 0)
    assert worker.truth(tuned) is None  # one epoch a call
    truth = worker.truth(tuned).figures
    service, arrays = PruningWorker(problem, 0), to_arrays(problem.network)
    weights = WeightsSnapshot(sha256=digest(arrays), arrays=arrays, compute=COMPUTE)
    task = TrainingTask(name="random", keep=mask.keep, recipe=recipe, seed=3)
    state, first = service.train_epoch(weights, task, 0, None, weights)
    state, second = service.train_epoch(weights, task, 1, state, weights)
    evaluation = service.evaluate(weights, mask.keep, state)
    assert truth["train_loss"] == [first.loss, second.loss]
    assert truth["test"] == pytest.approx(evaluation.test, rel=1e-5)
    assert truth["choose_val"] == pytest.approx(evaluation.choose_val, rel=1e-5)
    held_out = 0.6 * truth["search_val"]["loss"] + 0.4 * truth["choose_val"]["loss"]
    assert truth["held_out"]["loss"] == pytest.approx(held_out)  # of 60 and 40 images


def study_of(problem: Problem, masks: list[Mask], plan: Plan) -> Study:
    return Study(
        problem=problem,
        compute=COMPUTE,
        masks=masks,
        plan=plan,
        seed=0,
        score_timeout=None,
        work_dir=Path("/work"),
    )


TWICE = Plan(steps=(50, 0), few_images_steps=(), score_seeds=2, truth_seeds=2)


def record_of(task: Task, cost: float) -> cells.Record:
    figures = {
        "val_loss": cost,
        "val_accuracy": 1 - cost,
        "held_out": {"loss": cost, "accuracy": 1 - cost},
        "test": {"loss": cost, "accuracy": 1 - cost},
        "epoch_seconds": [40.0],
    }
    seconds = 40.0 if task.depth is None else 1.0 + task.depth.steps
    key = dict(task.cell.key)
    return cells.Record(key=key, figures=figures, seconds=seconds, versions={}, date="", cpu="")


def test_single_scores_come_before_truths_and_these_before_repeats(
    problem: Problem, mask: Mask
) -> None:
    masks = [mask, replace(mask, name="other", keep=~mask.keep), replace(mask, is_near=True)]
    names = [task.cell.name for task in tasks(study_of(problem, masks, TWICE))]
    order = ("different00", "near00", "different01")
    first = [f"{name}-{steps}steps-0" for steps in (0, 50) for name in order]
    assert names[:9] == first + [f"{name}-truth-0" for name in order]
    assert names[9:] == [f"{name.removesuffix('-0')}-1" for name in names[:9]]


def test_what_is_left_is_judged_by_what_was_measured(problem: Problem, mask: Mask) -> None:
    study = study_of(problem, [mask], replace(TWICE, score_seeds=1, truth_seeds=1))
    recalibrated, trained, truth = todo = tasks(study)
    assert seconds_left(study, todo, {}) is None
    records = {recalibrated.cell.name: record_of(recalibrated, 0.5)}  # 1 s for 64 + 32 images
    steps, epoch = 3 * 50 * 64 + 96, 3 * 128
    assert seconds_left(study, todo, records) == pytest.approx((steps + epoch) / 96)
    records |= {task.cell.name: record_of(task, 0.5) for task in (trained, truth)}
    assert seconds_left(study, todo, records) == 0


def printed(records: Iterable[cells.Record]) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    shown = agreement_tables(list(records), rank_by="val_accuracy", proposals=320)
    console.print(*shown, sep="\n")
    return console.export_text()


def test_tables_hold_what_is_there(problem: Problem, mask: Mask) -> None:
    masks = [
        replace(mask, name=f"mask {i}", keep=np.roll(mask.keep, i), is_near=i > 3) for i in range(8)
    ]
    todo = tasks(study_of(problem, masks, TWICE))
    costs = {mask.name: 0.1 * number for number, mask in enumerate(masks)}
    costs_of_scores = costs | {"mask 6": 0.7, "mask 7": 0.6}  # at no steps two of eight change
    records = {
        task.cell.name: record_of(
            task, (costs_of_scores if str(task.depth) == "recalibrated" else costs)[task.mask.name]
        )
        for task in todo
    }
    lines = printed(records.values()).splitlines()
    [everywhere, near] = [line for line in lines if "│ recalibrated" in line and "[" in line]
    assert "│ 8     │ 2     │ 0.98 [" in everywhere  # 1 - 6 (1 + 1) / (8 * 63)
    assert "│ 4     │ 2     │ 0.80 [" in near  # 1 - 6 (1 + 1) / (4 * 15)
    assert sum("│ parameters left, alone" in line for line in lines) == 2
    assert sum("│ fine-tuned again" in line and "1.00 [1.00, 1.00]" in line for line in lines) == 2
    [cost] = [line for line in lines if "│ 50 steps" in line and "[" not in line]
    assert "│ 16     │ 51.00     │ 408.0 " in cost  # 320 * 51 / 40
    assert sum("│ mask 7" in line and "│ 30.00 " in line for line in lines) == 1

    few = printed(record for name, record in records.items() if name.endswith("0steps-0"))
    assert "[" not in few  # no truth, no agreement
    assert "│ 8      │ 1.00" in few


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:channel groups left whole")  # option-A shortcuts
@pytest.mark.usefixtures("local_ray")
def test_the_job_does_what_is_missing(
    problem: Problem,
    few_images: Path,
    weights: Path,
    rows: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    space = problem.tracing.space
    budget = Budget.from_cut(space, CUT)
    rng = np.random.default_rng(0)
    found = [budget.fill(rng.random(space.num_filters)) for _ in range(3)]
    search = write_search(tmp_path / "run", facts_of(found, [0.9, 0.8]), space.fingerprint(), CUT)

    trained = Trained(data=few_images, weights=weights, search_val_rows=rows, network="resnet20")
    plan = Plan(masks=4, score_seeds=1)

    def run(
        *steps: int,
        settings: SearchSettings = SETTINGS,
        searches: tuple[str, ...] = (str(search),),
    ) -> dict[str, str]:
        fidelity.main(
            trained,
            settings,
            Resources(workers=1),
            replace(plan, steps=steps),
            searches=searches,
            cells=tmp_path / "results",
        )
        files = (tmp_path / "results").glob("*.json")
        return {file.stem: file.read_text() for file in files}

    first = run(0)
    assert not any((tmp_path / "results" / "under-way").iterdir())
    assert len(first) == 2 + 4 * (2 + 1)  # compute, masks; two scores and the truth of four masks
    assert "fine-tuned again" not in capsys.readouterr().out
    second = run(0, 1)
    assert first.items() <= second.items()
    assert sorted(second.keys() - first.keys()) == [
        f"{name}-1steps-0" for name in ("different00", "different01", "near00", "near01")
    ]
    with pytest.raises(ValueError, match=r"was measured with score_images = 32, this run has 31"):
        run(0, settings=SETTINGS.changed(rescore_images=31))
    with pytest.raises(ValueError, match=r"was measured with score_images = 16, this run has 15"):
        run(0, settings=SETTINGS.changed(score_images=15))
    assert "1 steps" in capsys.readouterr().out
    assert run(0, 1, searches=()) == second  # the cells keep the masks


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_stopped_ray_job_keeps_its_scores_and_epochs_and_goes_on(
    head: Head, problem: Problem, few_images: Path, weights: Path, rows: Path, tmp_path: Path
) -> None:
    space = problem.tracing.space
    budget, rng = Budget.from_cut(space, CUT), np.random.default_rng(0)
    found = [budget.fill(rng.random(space.num_filters)) for _ in range(2)]
    search = write_search(tmp_path / "run", facts_of(found, [0.9]), space.fingerprint(), CUT)
    results = tmp_path / "results"
    flags = {
        **{"data": few_images, "network": "resnet20", "weights": weights, "search-val-rows": rows},
        **{"searches": search, "cells": results, "macs-cut": CUT, "ignore": "conv1"},
        **{"masks": 2, "steps": 0},
        **{"score-seeds": 1, "recalibrate-images": 64, "workers": 1},
        **{"dtype": "float32", "fine-tune-epochs": 20},
    }
    parts = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    curves: dict[Path, list[Any]] = {}

    def begun() -> bool:
        for path in results.glob("under-way/*/epochs.json"):
            curves[path] = json.loads(path.read_text())
        return bool(curves)

    log = stop_and_go_on(head, "jobs/experiments/fidelity.py", *parts, begun=begun)
    assert f"stopped on request: 6 cells in {results}; the same command goes on" in log
    assert "Traceback" not in log
    records = cells.read_all(results)
    assert len(records) == 2 + 2 * 2 + 2  # compute, masks; two scores and a truth of each
    [(path, known)] = list(curves.items())[:1]
    truth = records[path.parent.name.rpartition("-")[0]].figures
    seconds = [round(epoch["seconds"], 3) for epoch in known]
    assert truth["epoch_seconds"][: len(known)] == seconds  # of the job that was stopped


@pytest.mark.filterwarnings("ignore:channel groups left whole")  # option-A shortcuts
def test_what_measures_nothing_is_refused(
    few_images: Path, weights: Path, rows: Path, tmp_path: Path
) -> None:
    trained = Trained(data=few_images, weights=weights, search_val_rows=rows, network="resnet20")

    def run(settings: SearchSettings) -> None:
        fidelity.main(trained, settings, Resources(), Plan(), searches=(), cells=tmp_path)

    with pytest.raises(ValueError, match="--searches must name at least one run directory"):
        run(SETTINGS)
    with pytest.raises(ValueError, match="--fine-tune-epochs must be at least 1"):
        run(SETTINGS.changed(fine_tune=Recipe(epochs=0)))
    with pytest.raises(ValueError, match="masks must be at least 2, got 1"):
        Plan(masks=1)
    with pytest.raises(ValueError, match="steps of scores must be at least 0, got -1"):
        Plan(few_images_steps=(0, -1))
