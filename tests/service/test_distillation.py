"""Distillation on a worker: from which images, recorded how, and where fine-tuning goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from simulated_training import PoolHere, SimulatedTrainer, TinyCNN
from torch import nn

from fppmo_ray import Recipe, SearchSettings, load_dataset
from fppmo_ray.distribution import Proposal
from fppmo_ray.pruning import score
from fppmo_ray.pruning.calibration.divergence import answers, divergence
from fppmo_ray.pruning.calibration.features import last_feature_match
from fppmo_ray.pruning.distillation import distill_pruned
from fppmo_ray.service import worker_protocol
from fppmo_ray.service.image_task import image_classification
from fppmo_ray.service.journal.facts import EpochFinished
from fppmo_ray.service.journal.run_directory import open_run
from fppmo_ray.service.problem import Problem, build_problem, started_of
from fppmo_ray.service.trainings import Training, train_side_by_side
from fppmo_ray.service.worker import PruningWorker
from fppmo_ray.service.worker_protocol import (
    SharedWeights,
    TrainingTask,
    WeightsSnapshot,
    digest,
    share_weights,
    to_arrays,
)
from fppmo_ray.training import fine_tune, open_images, state_from_bytes


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    monkeypatch.setattr(worker_protocol.ray, "put", lambda value: value)


def dense() -> nn.Module:
    torch.manual_seed(0)
    return TinyCNN().eval()


def problem_of(**changes: Any) -> Problem:
    settings = SearchSettings(macs_cut=0.5).changed(calibration_images=150, **changes)
    return build_problem(dense(), image_classification(load_dataset("digits")), settings)


def snapshot(problem: Problem) -> WeightsSnapshot:
    arrays = to_arrays(dense())
    return WeightsSnapshot(sha256=digest(arrays), arrays=arrays, compute=problem.compute)


KEEP = np.arange(28) % 2 == 0


def distillation(steps: int) -> TrainingTask:
    recipe = Recipe(epochs=1)
    return TrainingTask(name="x-distilled", keep=KEEP, recipe=recipe, seed=3, distill_steps=steps)


def test_an_epoch_teaches_the_last_feature_map_of_the_dense_network_by_the_recipes_weight() -> None:
    problem = problem_of(refit=False)
    worker, weights = PruningWorker(problem, 0), snapshot(problem)
    opened = problem.task.open(problem.tracing, problem.settings, torch.device("cpu"), threads=1)
    for weight in (0.0, 10.0):
        recipe = Recipe(epochs=1, distillation_weight=0.5, feature_weight=weight)
        task = TrainingTask(name="x", keep=KEEP, recipe=recipe, seed=3)
        content, _ = worker.train_epoch(weights, task, 0, None, weights)
        network = opened.pruned(dense(), KEEP, for_epochs=True)
        match = last_feature_match(network, dense(), problem.tracing, KEEP, *opened.inputs())
        assert match
        assert match[0].channels is not None  # the last map is pruned too
        images = opened.images("search_train")  # type: ignore[attr-defined]
        state = fine_tune(network, images, recipe, seed=3, teacher=dense(), matches=match)
        for name, tensor in state_from_bytes(content).network.items():
            assert torch.equal(tensor, state.network[name]), name


def test_a_worker_distils_on_the_calibration_images_alone() -> None:
    problem = problem_of(refit=False)
    task, dataset = problem.task, load_dataset("digits")
    worker, weights = PruningWorker(problem, 0), snapshot(problem)
    content, report = worker.distill(weights, distillation(20), weights)
    assert report is not None
    state = state_from_bytes(content)
    assert (state.epochs_done, state.momentum) == (0, {})
    rows = task.splits.search_train  # type: ignore[attr-defined]
    few = open_images(
        dataset.train, rows[np.random.default_rng(0).permutation(len(rows))[:150]], dataset
    )
    opened = task.open(problem.tracing, problem.settings, torch.device("cpu"), threads=1)
    network = opened.pruned(dense(), KEEP)
    unseen = list(open_images(dataset.test, None, dataset).batches(250))
    targets = answers(dense(), unseen)
    before = divergence(network, unseen, targets)
    distill_pruned(network, dense(), problem.tracing, KEEP, few, steps=20, seed=3)
    for name, tensor in network.state_dict().items():
        assert torch.equal(state.network[name], tensor), name
    assert divergence(network, unseen, targets) < 0.8 * before


def test_the_steps_of_a_score_by_divergence_are_a_distillation_without_labels() -> None:
    problem = problem_of(score_by="divergence", score_steps=12, score_images=100, refit=False)
    proposal = Proposal(proposal_id=0, generation=0, keep=KEEP, macs=0)
    without = problem_of(score_by="divergence", score_images=100, refit=False)
    found, plain = (
        PruningWorker(one, 0).score(snapshot(one), proposal).val_loss for one in (problem, without)
    )
    assert found is not None
    assert plain is not None
    assert found < 0.9 * plain
    opened = problem.task.open(problem.tracing, problem.settings, torch.device("cpu"), threads=1)
    candidate = opened.candidate(  # type: ignore[attr-defined]
        dense(), KEEP, seed=proposal.score_seed, split="search_val", compute=problem.compute
    )
    assert len(candidate.few_images) == 150
    for images in (candidate.few_images, candidate.search_train):
        images.labels.fill_(0)  # the divergence depends on none
    assert score(candidate).val_loss == found


def training_of(weights: SharedWeights, task: TrainingTask, start: bytes | None = None) -> Training:
    return Training(task=task, weights=weights, teacher=weights, start=start)


def test_a_distillation_is_recorded_once_and_fine_tuning_goes_on_from_it(tmp_path: Path) -> None:
    problem = problem_of()
    weights = share_weights(to_arrays(dense()), problem.compute)
    first, later = (
        distillation(4),
        TrainingTask(name="x", keep=KEEP, recipe=Recipe(epochs=2), seed=3),
    )
    begun: list[dict[str, Any]] = []

    class Noting(SimulatedTrainer):
        def train_epoch(self, weights: Any, task: Any, epoch: int, state: Any, teacher: Any) -> Any:
            if state is not None and epoch == 0:
                begun.append(state_from_bytes(state).network)
            return super().train_epoch(weights, task, epoch, state, teacher)

    started = started_of(problem, "simulated", {})
    with open_run(tmp_path, resume="auto", started=started) as run:
        for _ in range(2):  # the second time, all is there
            pool: Any = PoolHere(Noting(problem))
            states = train_side_by_side([training_of(weights, first)], pool, run)
            start = states[first.name]
            ended = train_side_by_side([training_of(weights, later, start)], pool, run)
        assert pool.names == []
        facts = [(fact.task, fact.epoch) for fact in run.all(EpochFinished)]
    assert facts == [("x-distilled", 0), ("x", 0), ("x", 1)]
    assert len(begun) == 1
    assert all(
        torch.equal(begun[0][name], tensor)
        for name, tensor in state_from_bytes(start).network.items()
    )
    assert state_from_bytes(ended["x"]).epochs_done == 2


def test_without_epochs_the_distilled_network_is_the_end(tmp_path: Path) -> None:
    problem = problem_of()
    weights = share_weights(to_arrays(dense()), problem.compute)
    last = TrainingTask(name="x", keep=KEEP, recipe=Recipe(epochs=0), seed=3)
    pool: Any = PoolHere(SimulatedTrainer(problem))
    with open_run(tmp_path, resume="auto", started=started_of(problem, "simulated", {})) as run:
        ended = train_side_by_side([training_of(weights, last, b"distilled")], pool, run)
    assert ended == {"x": b"distilled"}
    assert pool.names == []
