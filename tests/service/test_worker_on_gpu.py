"""Every call of a worker on a pretended GPU: the CPU's results, few waits, no pageable copies."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fppmo_ray import Recipe, Resources, SearchSettings, load_dataset
from fppmo_ray.distribution import Proposal
from fppmo_ray.pruning import extract
from fppmo_ray.pruning.files import load_network, save_network
from fppmo_ray.service.image_task import image_classification
from fppmo_ray.service.problem import Problem, build_problem
from fppmo_ray.service.worker import PruningWorker
from fppmo_ray.service.worker_protocol import (
    TrainingTask,
    WeightsSnapshot,
    digest,
    to_arrays,
)
from fppmo_ray.testing.pretended_gpu import PretendedGpu
from fppmo_ray.training import ComputeConfig, build_network, state_from_bytes

RECIPE = Recipe(epochs=2, batch_size=128)
NETWORK = build_network("digits_cnn", 10)


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    yield
    monkeypatch.undo()
    torch.set_num_threads(threads)


def problem_of(**changes: Any) -> Problem:
    return _problem_of(tuple(changes.items()))


@cache  # tracing takes as long as a test
def _problem_of(changes: tuple[tuple[str, Any], ...]) -> Problem:
    settings = SearchSettings(macs_cut=0.5).changed(
        **{"calibration_images": 120, "fine_tune": RECIPE, "refit": False, "score_by": "labels"}
        | dict(changes)
    )
    return build_problem(NETWORK, image_classification(load_dataset("digits")), settings)


class Pair:
    """A worker on the CPU and one on the GPU, for the same problem."""

    def __init__(self, problem: Problem, compute: ComputeConfig | None = None) -> None:
        on_gpu = replace(problem, device_type="cuda", gpu_share=0.5)
        self.cpu, self.gpu = PruningWorker(problem, 0), PruningWorker(on_gpu, 0)
        for worker in (self.cpu, self.gpu):
            worker._task.load()
        arrays = to_arrays(NETWORK)
        self.weights = WeightsSnapshot(
            sha256=digest(arrays), arrays=arrays, compute=compute or problem.compute
        )
        self.keep = np.arange(problem.space.num_filters) % 2 == 0
        self.task = TrainingTask(name="fppmo", keep=self.keep, recipe=RECIPE, seed=0)

    def both(self, method: str, *arguments: Any) -> tuple[Any, Any]:
        on_cpu = getattr(self.cpu, method)(*arguments)
        return on_cpu, getattr(self.gpu, method)(*arguments)


def proposal(keep: np.ndarray, number: int = 0) -> Proposal:
    return Proposal(proposal_id=number, generation=0, keep=keep, macs=0)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"score_steps": 6},
        {"refit": True},
        {"score_by": "divergence"},
        {"dtype": "bfloat16", "score_steps": 6},
    ],
    ids=str,
)
def test_scores_are_the_cpus_with_few_waits_and_no_pageable_copies(
    gpu: PretendedGpu, changes: dict[str, Any]
) -> None:
    pair = Pair(problem_of(**changes))
    on_cpu, first = pair.both("score", pair.weights, proposal(pair.keep))
    assert first.val_loss == pytest.approx(on_cpu.val_loss, rel=1e-4)
    assert first.val_accuracy == on_cpu.val_accuracy
    gpu.reset_counts()
    before = gpu.memory_allocated()
    again = pair.gpu.score(pair.weights, proposal(~pair.keep, 0))
    assert again.val_loss != first.val_loss
    # A training and an evaluation are read; of each of four layers that are refitted, whether it
    # could be; of each of five that are reconstructed, whether it is nearer to the dense one.
    refits = 4 + 5 if "refit" in changes else 0
    assert gpu.waits.total() == 1 + 2 * ("score_steps" in changes) + refits
    assert gpu.pageable_copies.total() == 0
    if "refit" not in changes:  # solutions are kept, up to a limit
        assert gpu.memory_allocated() == before


def test_scores_with_graphs_equal_scores_without(gpu: PretendedGpu) -> None:
    problem = problem_of(score_steps=8)
    pair = Pair(problem)
    graphs = replace(pair.weights, compute=replace(problem.compute, cuda_graphs=True))
    for number, keep in enumerate((pair.keep, ~pair.keep)):
        launched = pair.gpu.score(pair.weights, proposal(keep, number))
        replayed = pair.gpu.score(graphs, proposal(keep, number))
        assert replayed.val_loss == launched.val_loss
    assert gpu.replays == 2 * 5


def test_whole_trainings_and_evaluations_are_the_cpus(gpu: PretendedGpu) -> None:
    problem = problem_of()
    pair = Pair(problem)
    graphs = replace(pair.task, compute=replace(problem.compute, cuda_graphs=True))
    states: list[bytes] = []
    for worker, task in ((pair.cpu, pair.task), (pair.gpu, graphs)):
        state = None
        for epoch in range(RECIPE.epochs):
            state, report = worker.train_epoch(pair.weights, task, epoch, state, pair.weights)
            assert report is not None
        assert state is not None
        states.append(state)
    assert gpu.replays > 10
    on_cpu, on_gpu = (state_from_bytes(state).network for state in states)
    for name, weights in on_cpu.items():
        assert on_gpu[name].device.type == "cpu"
        assert torch.allclose(on_gpu[name], weights, rtol=1e-3, atol=1e-4), name
    expected, found = pair.both("evaluate", pair.weights, pair.keep, states[0])
    assert found.test["loss"] == pytest.approx(expected.test["loss"], rel=1e-5)
    assert (found.parameters, found.file_bytes) == (expected.parameters, expected.file_bytes)
    before, untrained = (
        state_from_bytes(state).network
        for state, _ in pair.both("untrained", pair.weights, pair.task)
    )
    assert all(torch.allclose(untrained[name], before[name], rtol=1e-5) for name in before)


@pytest.mark.parametrize("criterion", ["l1", "fpgm", "bn_scale", "taylor"])
def test_importance_is_the_cpus(gpu: PretendedGpu, criterion: str) -> None:
    pair = Pair(problem_of())
    on_cpu, on_gpu = pair.both("importance", pair.weights, criterion, 0)
    assert on_gpu == pytest.approx(on_cpu, rel=1e-3)


def test_calibration_and_its_order_are_the_cpus(gpu: PretendedGpu) -> None:
    pair = Pair(problem_of(importance="obs"))
    on_cpu, on_gpu = pair.both("filter_order", pair.weights, "obs", 0)
    assert on_gpu.importance == pytest.approx(on_cpu.importance, rel=1e-6)
    for found, expected in zip(on_gpu.error_curves, on_cpu.error_curves, strict=True):
        assert found == pytest.approx(expected, rel=1e-6)


def test_finalists_are_rescored_and_compute_is_tried(gpu: PretendedGpu) -> None:
    pair = Pair(problem_of(score_steps=4))
    on_cpu, on_gpu = pair.both("rescore", pair.weights, pair.keep, (0, 1), "choose_val")
    assert on_gpu.val_loss == pytest.approx(on_cpu.val_loss, rel=1e-4)
    assert pair.gpu.native_dtype() == "bfloat16"
    trial = pair.gpu.try_compute(ComputeConfig(cuda_graphs=True), pair.keep)
    assert trial.error is None
    before = gpu.replays
    trial = pair.gpu.try_training(ComputeConfig(cuda_graphs=True), pair.keep)
    assert trial.error is None
    assert gpu.replays - before == (5 - 3) + (5 - 3) + (15 - 3)


@pytest.fixture
def one_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time everything once, since times mean nothing here."""
    monkeypatch.setattr("fppmo_ray.pruning.latency.timing._TURNS", 1)
    monkeypatch.setattr("fppmo_ray.pruning.latency.timing._SAMPLES", 1)


def calls_of(pair: Pair) -> dict[str, tuple[Any, ...]]:
    """The arguments of a call of every method of a worker."""
    weights, keep, compute = pair.weights, pair.keep, ComputeConfig()
    distilled = replace(pair.task, distill_steps=2)
    return {
        "ready": (),
        "score": (weights, proposal(keep)),
        "score_dense": (weights,),
        "rescore": (weights, keep, (0, 1), "choose_val"),
        "native_dtype": (),
        "try_compute": (compute, keep),
        "try_training": (compute, keep),
        "importance": (weights, "taylor", 0),
        "filter_order": (weights, "obs", 0),
        "untrained": (weights, pair.task),
        "train_epoch": (weights, pair.task, 0, None, weights),
        "distill": (weights, distilled, weights),
        "evaluate": (weights, keep, None),
        "latencies": (weights, [None, keep]),
        "measure_latency_table": (compute, 1, 0),
        "time_masks": (compute, [keep], 1),
    }


@pytest.mark.usefixtures("one_turn", "ray_here")
def test_every_call_of_a_worker_works_on_a_gpu_and_copies_nothing_the_slow_way(
    gpu: PretendedGpu,
) -> None:
    pair = Pair(problem_of(refit=True, calibration_images=60))
    calls = calls_of(pair)
    assert calls.keys() == {name for name in vars(PruningWorker) if not name.startswith("_")}
    for split in ("choose_val", "test", "calibration"):  # else the first calls would open them
        pair.gpu._task.images(split)
    copies = {}
    for name, arguments in calls.items():
        gpu.reset_counts()
        getattr(pair.gpu, name)(*arguments)
        copies[name] = gpu.pageable_copies.total()
    teacher = {"train_epoch": len(pair.weights.arrays)}  # its weights are copied once
    assert copies == dict.fromkeys(calls, 0) | teacher


def test_the_dense_network_scores_and_teaches_what_it_does_on_the_cpu(gpu: PretendedGpu) -> None:
    pair = Pair(problem_of())
    on_cpu, on_gpu = pair.both("score_dense", pair.weights)
    assert on_gpu == on_cpu
    distilled = replace(pair.task, distill_steps=3)
    expected, found = (
        state_from_bytes(state).network
        for state, _ in pair.both("distill", pair.weights, distilled, pair.weights)
    )
    for name, weights in expected.items():
        assert torch.allclose(found[name], weights, rtol=1e-3, atol=1e-4), name


@pytest.mark.usefixtures("one_turn")
def test_latency_is_measured_by_the_gpus_own_clock(gpu: PretendedGpu) -> None:
    worker = Pair(problem_of())
    [dense, pruned] = worker.gpu.latencies(worker.weights, [None, worker.keep])
    assert all(latency.milliseconds > 0 for latency in (*dense, *pruned))
    assert len(worker.gpu.time_masks(ComputeConfig(), [worker.keep], 1)) == 1


def test_a_network_on_the_gpu_is_saved_and_loaded_on_the_cpu(
    gpu: PretendedGpu, tmp_path: Path
) -> None:
    pair = Pair(problem_of())
    tracing = pair.gpu._problem.tracing
    pruned = extract(pair.gpu._dense, tracing, pair.keep)
    saved = save_network(pruned, tmp_path / "net", tracing=tracing, keep=pair.keep)
    loaded = load_network(saved, lambda: build_network("digits_cnn", 10))
    for name, weights in extract(NETWORK, tracing, pair.keep).state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weights)


def test_a_worker_is_held_to_its_share_of_the_memory(gpu: PretendedGpu) -> None:
    Pair(problem_of())
    assert gpu.memory.limit == gpu.get_device_properties().total_memory // 2
    assert Resources(gpus=0.5).device_type == "cuda"


def test_a_score_that_runs_out_of_memory_is_tried_once_with_smaller_batches(
    gpu: PretendedGpu, caplog: pytest.LogCaptureFixture
) -> None:
    pair = Pair(problem_of(score_images=500))
    gpu.reset_peak_memory_stats()
    before = gpu.memory_allocated()
    expected = pair.gpu.score(pair.weights, proposal(pair.keep))
    needed = gpu.max_memory_allocated() - before
    base, gpu.memory.limit = gpu.memory_allocated(), gpu.memory_allocated() + needed // 2
    found = pair.gpu.score(pair.weights, proposal(pair.keep))
    assert found.val_loss == pytest.approx(expected.val_loss, rel=0.1)  # of other statistics
    [message] = caplog.messages
    assert "a score is tried again, float32, channels last, scored by 62" in message
    assert gpu.memory_allocated() == base
    gpu.memory.limit = base + needed // 50
    with pytest.raises(RuntimeError, match="a score needs more memory than the GPU has, even"):
        pair.gpu.score(pair.weights, proposal(pair.keep))
    gpu.memory.limit = 2**40
    assert pair.gpu.score(pair.weights, proposal(pair.keep)).val_loss == expected.val_loss
