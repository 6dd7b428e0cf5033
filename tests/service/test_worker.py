"""The worker's calls, in this process."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fppmo_ray import Calibration, ImageArrays, Recipe, Scoring, SearchSettings, load_dataset
from fppmo_ray.distribution import Feedback, Proposal
from fppmo_ray.pruning import Candidate, Fidelity, Score, score
from fppmo_ray.service.image_task import image_classification
from fppmo_ray.service.problem import build_problem
from fppmo_ray.service.worker import PruningWorker, feedback_of
from fppmo_ray.service.worker_protocol import WeightsSnapshot, digest, to_arrays
from fppmo_ray.training import ComputeConfig, build_network


@pytest.fixture(autouse=True)
def _threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)


def snapshot(network: nn.Module, compute: ComputeConfig) -> WeightsSnapshot:
    arrays = to_arrays(network)
    return WeightsSnapshot(sha256=digest(arrays), arrays=arrays, compute=compute)


def test_a_score_begins_anew_and_that_of_a_finalist_has_images_of_its_own() -> None:
    settings = SearchSettings(
        macs_cut=0.5,
        fine_tune=Recipe(epochs=0),
        calibration=Calibration(refit=False),
        scoring=Scoring(
            score_by="labels",
            score_steps=6,
            score_recalibrate_images=200,
            score_images=100,
            recalibrate_images=300,
            rescore_images=130,
        ),
    )
    network = build_network("digits_cnn", 10, seed=0)
    task = image_classification(load_dataset("digits"))
    problem = build_problem(network, task, settings)
    keep = np.arange(problem.space.num_filters) % 2 == 0
    weights = snapshot(network, problem.compute)
    worker, cpu = PruningWorker(problem, 0), torch.device("cpu")
    images = task.open(problem.tracing, problem.settings, cpu, threads=1)

    def expected(split: str, recalibrated: int, scored_on: int) -> Score:
        fidelity = Fidelity(steps=6, recalibrate_images=recalibrated, score_images=scored_on)
        candidate = Candidate(
            dense=network.eval(),
            tracing=problem.tracing,
            keep=keep,
            search_train=images.images("search_train"),
            held_out=images.images(split),
            fidelity=fidelity,
            recipe=settings.fine_tune,
            seed=(0, 3),
            compute=problem.compute,
        )
        return score(candidate)

    in_search, in_choice = expected("search_val", 200, 100), expected("choose_val", 300, 130)
    assert in_search.val_loss != in_choice.val_loss
    proposal = Proposal(proposal_id=7, generation=3, keep=keep, macs=0, score_seed=(0, 3))
    for _ in range(2):
        found = worker.score(weights, proposal)
        assert (found.proposal_id, found.steps, found.error) == (7, 6, None)
        figures = (found.val_loss, found.val_accuracy)
        assert figures == (in_search.val_loss, in_search.val_accuracy)
        assert found.seconds is not None
        again = worker.rescore(weights, keep, (0, 3), "search_val")
        assert again.val_loss == in_search.val_loss
        chosen = worker.rescore(weights, keep, (0, 3), "choose_val")
        assert (chosen.val_loss, chosen.val_accuracy) == (
            in_choice.val_loss,
            in_choice.val_accuracy,
        )


def test_a_worker_scores_on_the_weights_that_it_is_given() -> None:
    settings = SearchSettings(macs_cut=0.5, fine_tune=Recipe(epochs=0))
    networks = [build_network("digits_cnn", 10, seed=seed) for seed in (0, 1)]
    task = image_classification(load_dataset("digits"))
    problems = [build_problem(network, task, settings) for network in networks]
    keep = np.arange(problems[0].space.num_filters) % 2 == 0
    proposal = Proposal(proposal_id=0, generation=0, keep=keep, macs=0)
    one, other = (snapshot(network, problems[0].compute) for network in networks)
    worker, fresh = PruningWorker(problems[0], 0), PruningWorker(problems[1], 0)
    losses = [worker.score(weights, proposal).val_loss for weights in (one, other, one)]
    assert losses[0] == losses[2] != losses[1]
    assert losses[1] == fresh.score(other, proposal).val_loss


@pytest.mark.parametrize(
    ("found", "error"),
    [
        (
            Score(val_loss=math.nan, val_accuracy=0.5, seconds=1.0),
            "the score is not finite: loss nan, accuracy 0.5",
        ),
        (
            Score(val_loss=-math.inf, val_accuracy=None, seconds=1.0),
            "the score is not finite: inf",
        ),
    ],
)
def test_a_score_that_is_not_finite_is_a_failure(found: Score, error: str) -> None:
    assert feedback_of(3, found, steps=2) == Feedback(proposal_id=3, error=error, steps=2)


def test_what_is_fine_tuned_is_recalibrated_on_all_classes_though_images_come_class_by_class(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = load_dataset("digits")
    order = np.argsort(data.train.labels, kind="stable")  # as folders are listed
    assert isinstance(data.train, ImageArrays)
    by_class = ImageArrays(data.train.images[order], data.train.labels[order])
    settings = SearchSettings(
        macs_cut=0.5, fine_tune=Recipe(epochs=0), scoring=Scoring(recalibrate_images=100)
    )
    network = build_network("digits_cnn", 10, seed=0)
    task = image_classification(replace(data, train=by_class))
    problem = build_problem(network, task, settings)
    seen: list[Tensor] = []
    monkeypatch.setattr(
        "fppmo_ray.service.images_on_worker.recalibrate_batchnorm",
        lambda network, batches: seen.append(torch.cat([labels for _, labels in batches])),
    )
    on_worker = task.open(
        problem.tracing, problem.settings, torch.device("cpu"), threads=problem.threads
    )
    keep = np.ones(problem.space.num_filters, dtype=bool)
    for _ in range(2):
        on_worker.pruned(network, keep)
    first, second = seen
    assert torch.equal(first, second)
    assert len(first) == 100
    assert torch.bincount(first, minlength=10).min() >= 3
