"""What a worker's calibration of the dense network gives: the order of filters, refits, scores."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fppmo_ray import Recipe, SearchSettings, load_dataset
from fppmo_ray.distribution import BoolArray, Proposal
from fppmo_ray.pruning import Candidate, ScoreInRungs, extract, score
from fppmo_ray.pruning.calibration import Refit, calibrate, layer_targets, obs_order, reconstruct
from fppmo_ray.pruning.calibration.divergence import answers, divergence
from fppmo_ray.service.image_task import ImagesOnWorker, image_classification
from fppmo_ray.service.problem import Problem, build_problem
from fppmo_ray.service.worker import PruningWorker
from fppmo_ray.service.worker_protocol import WeightsSnapshot, digest, to_arrays
from fppmo_ray.training import build_network, recalibrate_batchnorm

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    monkeypatch.setattr("fppmo_ray.service.worker.worker_info", lambda _: None)  # asks Ray


def network_of(seed: int = 0) -> nn.Module:
    return build_network("digits_cnn", 10, seed=seed).eval()


def problem_of(**changes: Any) -> Problem:
    settings = SearchSettings(macs_cut=0.5).changed(
        **{"calibration_images": 120, "fine_tune": Recipe(epochs=0)} | changes
    )
    return build_problem(network_of(), image_classification(load_dataset("digits")), settings)


def opened(problem: Problem) -> ImagesOnWorker:
    return problem.task.open(problem.tracing, problem.settings, CPU, threads=1)


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


def every_second(problem: Problem) -> BoolArray:
    return np.arange(problem.space.num_filters) % 2 == 0


def test_scores_and_handed_out_networks_are_refitted_and_reconstructed_if_so_set() -> None:
    problem = problem_of(
        refit=True,
        score_images=200,
        recalibrate_images=150,
        calibration_images=120,
        score_reconstruct_images=60,
        score_by="labels",
    )
    network, keep = network_of(), every_second(problem)
    images = opened(problem)
    refit = Refit(network, problem.tracing, images.calibration(network))
    candidate = Candidate(
        dense=network,
        tracing=problem.tracing,
        keep=keep,
        search_train=images.images("search_train"),
        held_out=images.images("search_val"),
        fidelity=problem.settings.fidelity(),
        recipe=problem.settings.fine_tune,
        seed=(0, 3),
        compute=problem.compute,
    )
    first = np.random.default_rng(0).permutation(len(candidate.search_train))[:120]
    inputs = torch.cat([part for part, _ in candidate.search_train.batches(50, first)])
    few, every = (layer_targets(network, problem.tracing, [t]) for t in (inputs[:60], inputs))
    correct = partial(reconstruct, tracing=problem.tracing)
    expected = score(
        replace(
            candidate,
            refit=refit,
            reconstruct=lambda pruned, keep: correct(pruned, keep=keep, targets=few),
        )
    )
    assert expected.val_loss != score(replace(candidate, refit=refit)).val_loss
    assert expected.val_loss != score(candidate).val_loss
    worker, weights = PruningWorker(problem, 0), snapshot(problem, network)
    proposal = Proposal(proposal_id=0, generation=3, keep=keep, macs=0, score_seed=(0, 3))
    assert worker.score(weights, proposal).val_loss == expected.val_loss
    by_hand = extract(network, problem.tracing, keep)
    refit(by_hand, keep)
    drawn = np.random.default_rng(0).permutation(len(candidate.search_train))[:150]
    recalibrate_batchnorm(by_hand, candidate.search_train.batches(250, drawn))
    correct(by_hand, keep=keep, targets=every)
    handed_out = opened(problem).pruned(network, keep).state_dict()
    assert all(torch.equal(handed_out[name], value) for name, value in by_hand.state_dict().items())


def test_a_refitted_score_depends_on_nothing_that_a_worker_did_before() -> None:
    problem = problem_of(refit=True)
    keep = every_second(problem)
    one, other = (snapshot(problem, network_of(seed)) for seed in (0, 1))
    proposal = Proposal(proposal_id=0, generation=0, keep=keep, macs=0)
    worker, fresh = PruningWorker(problem, 0), PruningWorker(problem, 1)
    fresh.ready()  # calibrates before the first score
    losses = [worker.score(weights, proposal).val_loss for weights in (one, other, one)]
    assert losses[0] == losses[2] == fresh.score(one, proposal).val_loss
    assert losses[1] == fresh.score(other, proposal).val_loss != losses[0]


def test_a_worker_calibrates_once_for_all_scores_and_before_the_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    problem, calibrated = problem_of(refit=True), []

    def noted(*arguments: Any, **named: Any) -> Any:
        calibrated.append(arguments[0])
        return calibrate(*arguments, **named)

    monkeypatch.setattr("fppmo_ray.pruning.calibration.dense_calibration.calibrate", noted)
    worker, weights = PruningWorker(problem, 0), snapshot(problem, network_of())
    worker.ready()
    assert len(calibrated) == 1
    for number in range(3):
        keep = np.arange(problem.space.num_filters) % 3 != number
        worker.score(weights, Proposal(proposal_id=number, generation=0, keep=keep, macs=0))
    assert len(calibrated) == 1


def test_a_score_by_divergence_compares_with_the_dense_network_on_the_same_images() -> None:
    problem = problem_of(score_by="divergence", score_images=50)
    network, keep = network_of(), every_second(problem)
    worker, weights = PruningWorker(problem, 0), snapshot(problem, network)
    by_labels = PruningWorker(problem_of(score_images=50), 0)
    proposal = Proposal(proposal_id=0, generation=2, keep=keep, macs=0, score_seed=(0, 2))
    found = worker.score(weights, proposal)
    images = opened(problem)
    scored = ScoreInRungs(
        images.candidate(network, keep, seed=(0, 2), split="search_val", compute=problem.compute)
    )
    scored.measure_at(0)
    held_out = images.images("search_val")
    rng = np.random.default_rng((0, 2))
    rng.permutation(len(images.images("search_train")))
    drawn = np.sort(rng.permutation(len(held_out))[:50])
    batches = list(held_out.batches(500, drawn))
    expected = divergence(scored.network, batches, answers(network, batches))
    assert found.val_loss == pytest.approx(expected, rel=1e-5)
    assert found.val_accuracy == by_labels.score(weights, proposal).val_accuracy


def test_a_score_by_divergence_depends_on_nothing_that_a_worker_did_before() -> None:
    problem = problem_of(score_by="divergence", score_images=40)
    weights = [snapshot(problem, network_of(seed)) for seed in (0, 1)]
    keep = every_second(problem)

    def loss(worker: PruningWorker, number: int, generation: int) -> float | None:
        seed = (0, generation)
        proposal = Proposal(
            proposal_id=0, generation=generation, keep=keep, macs=0, score_seed=seed
        )
        return worker.score(weights[number], proposal).val_loss

    used, fresh = PruningWorker(problem, 0), PruningWorker(problem, 1)
    many = [loss(used, number, generation) for number in (0, 1) for generation in range(6)]
    assert loss(used, 0, 0) == many[0] == loss(fresh, 0, 0)
    assert many[7] == loss(fresh, 1, 1)
    assert len(set(many)) == 12
