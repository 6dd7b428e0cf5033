"""What a worker's calibration of the dense network gives: the order of filters."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fppmo_ray import Recipe, SearchSettings, load_dataset
from fppmo_ray.pruning.calibration import calibrate, obs_order
from fppmo_ray.service.image_task import ImagesOnWorker, image_classification
from fppmo_ray.service.problem import Problem, build_problem
from fppmo_ray.service.worker import PruningWorker
from fppmo_ray.service.worker_protocol import WeightsSnapshot, digest, to_arrays
from fppmo_ray.training import build_network

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)


def network_of(seed: int = 0) -> nn.Module:
    return build_network("digits_cnn", 10, seed=seed).eval()


def problem_of(**changes: Any) -> Problem:
    settings = SearchSettings(
        **{"macs_cut": 0.5, "calibration_images": 120, "recipe": Recipe(epochs=0)} | changes
    )
    return build_problem(network_of(), image_classification(load_dataset("digits")), settings)


def opened(problem: Problem) -> ImagesOnWorker:
    return ImagesOnWorker(problem.task, problem.tracing, problem.settings, CPU, threads=1)


def snapshot(problem: Problem, network: nn.Module) -> WeightsSnapshot:
    arrays = to_arrays(network)
    return WeightsSnapshot(sha256=digest(arrays), arrays=arrays, compute=problem.compute)


def test_the_obs_order_comes_from_as_many_search_train_images_as_asked_for() -> None:
    problem = problem_of(importance="obs")
    worker = PruningWorker(problem, 0)
    found = worker.filter_order(snapshot(problem, network_of()), "obs", 0)
    images = opened(problem).images("search_train")
    drawn = np.random.default_rng(0).permutation(len(images))[:120]
    calibration = calibrate(
        network_of(), problem.tracing, images.batches(50, drawn), num_images=120
    )
    expected = obs_order(network_of(), problem.tracing, calibration)
    assert np.array_equal(found.importance, expected.importance)
    for curve, wanted in zip(found.error_curves, expected.error_curves, strict=True):
        assert np.array_equal(curve, wanted)


def test_other_weights_are_calibrated_anew_and_the_same_ones_alike() -> None:
    problem = problem_of(importance="obs")
    one, other = (snapshot(problem, network_of(seed)) for seed in (0, 1))
    worker, fresh = PruningWorker(problem, 0), PruningWorker(problem, 1)
    curves = [worker.filter_order(weights, "obs", 0).error_curves for weights in (one, other, one)]
    assert np.array_equal(curves[0][0], curves[2][0])
    assert not np.array_equal(curves[0][0], curves[1][0])
    assert np.array_equal(fresh.filter_order(other, "obs", 0).error_curves[0], curves[1][0])


def test_error_curves_are_measured_in_the_order_of_any_importance() -> None:
    problem = problem_of(importance="l1")
    worker, weights = PruningWorker(problem, 0), snapshot(problem, network_of())
    found = worker.filter_order(weights, "l1", 0)
    assert np.array_equal(found.importance, worker.importance(weights, "l1", 0))
    least = worker.filter_order(weights, "obs", 0)
    for curve, best in zip(found.error_curves, least.error_curves, strict=True):
        assert curve[-1] == best[-1] == 0
        assert curve[0] == pytest.approx(best[0], rel=1e-6)  # without any filter
        assert curve.sum() > best.sum()


def test_a_calibration_leaves_the_dense_network_alone() -> None:
    problem = problem_of()
    network = network_of()
    before = copy.deepcopy(network.state_dict())
    opened(problem).calibration(network)
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
