"""A user's own task with unlabelled images: what they order, refit and score."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from fppmo_ray import (
    Calibration,
    FunctionTask,
    Resources,
    Sampler,
    SearchSettings,
    recalibrate_batchnorm,
    run_search,
)
from fppmo_ray.distribution import BoolArray, Proposal
from fppmo_ray.pruning import extract
from fppmo_ray.pruning.calibration import Refit, calibrate, layer_targets, obs_order, reconstruct
from fppmo_ray.pruning.calibration.divergence import answers, divergence
from fppmo_ray.report import print_result
from fppmo_ray.service.problem import Problem, build_problem
from fppmo_ray.service.worker import PruningWorker
from fppmo_ray.service.worker_protocol import WeightsSnapshot, digest, to_arrays

SETTINGS = SearchSettings(
    macs_cut=0.4,
    proposals=0,
    sampler=Sampler(importance="obs", start="allocation"),
    calibration=Calibration(refit=True),
)
NOISE = torch.randn(120, 1, 6, 6, generator=torch.Generator().manual_seed(4))


@pytest.fixture(autouse=True)
def _threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)


class Sharpener(nn.Module):
    """Half of the first layer's filters copy the other half, with a little noise."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm = nn.Conv2d(1, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.last = nn.Conv2d(12, 1, 3, padding=1)
        with torch.no_grad():
            for tensor in (self.first.weight, self.first.bias):
                tensor[6:] = tensor[:6] + 0.02 * torch.randn(tensor[6:].shape)
        recalibrate_batchnorm(self, [NOISE])

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.last(torch.relu(self.norm(self.first(images))))
        return out


def batches() -> Iterator[tuple[Tensor, str]]:
    return ((part, "and whatever else a batch holds") for part in NOISE.split(50))


def task(**changed: Any) -> FunctionTask:
    given: dict[str, Any] = {"example_inputs": NOISE[:1], "images": batches}
    return FunctionTask(**(given | changed))


def problem_of(own: FunctionTask | None = None, **changes: Any) -> Problem:
    return build_problem(Sharpener(), own or task(), SETTINGS.changed(**changes))


def snapshot(problem: Problem, network: nn.Module) -> WeightsSnapshot:
    arrays = to_arrays(network)
    return WeightsSnapshot(sha256=digest(arrays), arrays=arrays, compute=problem.compute)


def proposal_of(keep: BoolArray) -> Proposal:
    return Proposal(proposal_id=0, generation=2, keep=keep, macs=0, score_seed=(0, 2))


def test_a_score_is_the_divergence_on_images_that_no_other_step_looks_at() -> None:
    problem, dense = problem_of(), Sharpener().eval()
    keep = np.arange(12) % 3 != 1
    worker, weights = PruningWorker(problem, 0), snapshot(problem, dense)
    found = worker.score(weights, proposal_of(keep))
    rescored = worker.rescore(weights, keep, (0, 0, 1), "choose_val")
    order = torch.from_numpy(np.random.default_rng(0).permutation(120))
    search_val, choose_val, few = NOISE[order[:18]], NOISE[order[18:36]], NOISE[order[36:]]
    calibration = calibrate(dense, problem.tracing, few.split(50), num_images=84)
    network = extract(dense, problem.tracing, keep)
    Refit(dense, problem.tracing, calibration)(network, keep)
    recalibrate_batchnorm(network, [few])  # all of them, in whatever order
    reconstruct(network, problem.tracing, keep, layer_targets(dense, problem.tracing, [few]))
    for images, loss in ((search_val, found.val_loss), (choose_val, rescored.val_loss)):
        expected = divergence(network, [images], answers(dense, [images]))
        assert loss == pytest.approx(expected, rel=1e-4)
    assert found.val_accuracy is None


def test_a_score_of_the_tasks_own_wins_and_leaves_all_images_to_the_calibration() -> None:
    own = task(score=lambda network, seed: 7.5)
    problem = problem_of(own, score_by="divergence", calibration_images=90)
    worker, dense = PruningWorker(problem, 0), Sharpener().eval()
    weights = snapshot(problem, dense)
    assert worker.score(weights, proposal_of(np.ones(12, dtype=bool))).val_loss == -7.5
    found = worker.filter_order(weights, "obs", 0)
    few = NOISE[np.random.default_rng(0).permutation(120)[:90]]
    calibration = calibrate(dense, problem.tracing, few.split(50), num_images=90)
    expected = obs_order(dense, problem.tracing, calibration)
    assert np.array_equal(found.importance, expected.importance)
    assert problem.settings.scoring.capacity_weight == 0
    assert problem_of().settings.scoring.capacity_weight == 0  # nothing is fine-tuned


def test_the_images_are_asked_for_once_and_a_refit_makes_up_for_what_was_removed() -> None:
    calls = []

    def counted() -> Iterator[tuple[Tensor, str]]:
        calls.append(1)
        return batches()

    keep = np.arange(12) < 6  # what is removed copies what is left
    losses = []
    for refit in (False, True):
        problem = problem_of(task(images=counted), refit=refit)
        worker, weights = PruningWorker(problem, 0), snapshot(problem, Sharpener())
        losses += [worker.score(weights, proposal_of(keep)).val_loss for _ in range(2)]
    assert len(calls) == 2
    assert losses[0] == losses[1]
    assert losses[2] == losses[3] < 0.1 * losses[0]


def test_a_score_may_be_a_short_distillation() -> None:
    keep = np.arange(12) % 2 == 0
    losses = []
    for steps in (0, 30, 30):
        problem = problem_of(score_steps=steps, refit=False)
        worker, weights = PruningWorker(problem, 0), snapshot(problem, Sharpener())
        losses.append(worker.score(weights, proposal_of(keep)).val_loss)
    assert losses[1] == losses[2] < 0.8 * losses[0]


class Sum(nn.Module):
    """Takes two images."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(1, 8, 3), nn.Conv2d(1, 8, 3)
        self.last = nn.Conv2d(8, 1, 3)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        out: Tensor = self.last(torch.relu(self.first(left) + self.second(right)))
        return out


def test_a_network_of_two_inputs_is_calibrated_and_compared_on_both() -> None:
    two = FunctionTask(example_inputs=(NOISE[:1],) * 2, images=lambda: [(NOISE, NOISE.flip(0))])
    problem = build_problem(Sum(), two, SETTINGS)
    worker, weights = PruningWorker(problem, 0), snapshot(problem, Sum())
    order = worker.filter_order(weights, "obs", 0)
    best = order.importance >= np.sort(order.importance)[4]
    losses = [worker.score(weights, proposal_of(keep)).val_loss for keep in (best, ~best)]
    assert 0 < losses[0] < losses[1]


def test_too_few_images_to_hold_some_out_are_refused() -> None:
    problem = problem_of(task(images=lambda: [NOISE[:2]]))
    worker, weights = PruningWorker(problem, 0), snapshot(problem, Sharpener())
    with pytest.raises(ValueError, match="images that calibrate and score must be at least 3"):
        worker.score(weights, proposal_of(np.ones(12, dtype=bool)))


def test_widths_are_found_without_any_score(ray_here: None, tmp_path: Path) -> None:
    one = Resources(workers=1)
    settings = SETTINGS.changed(distill_steps=40)
    result = run_search(Sharpener(), task(), settings, run_dir=tmp_path / "run", resources=one)
    best, dense = result.best, result.figures["variants"][0]
    assert best.finalist == "allocation"
    assert dense["after"]["test"]["score"] == 0.0
    assert -0.5 < best.test_score_before < best.test_score < 0
    assert best.test_score_distilled == best.test_score  # without fine_tune, it is the end
    console = Console(record=True, width=160)
    print_result(result.run_dir, console)
    assert "minus divergence on test" in console.export_text()
