"""Scores of different depths on one worker, in this process."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from fppmo_ray.service.workers.assignments import Basis
from fppmo_ray.service.workers.scoring_worker import ScoringWorker
from torch import Tensor

from fppmo_ray import ImageArrays, Placement, Recipe, SearchSettings, load_dataset
from fppmo_ray.pruning import Candidate, Fidelity, score
from fppmo_ray.service.problem import open_split, pruned_network, state_problem
from fppmo_ray.service.worker_protocol import to_arrays
from fppmo_ray.training import build_network


def test_a_score_of_any_depth_begins_anew_and_that_of_a_finalist_has_images_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    settings = SearchSettings(
        macs_cut=0.5,
        score_steps=6,
        screen_steps=2,
        score_recalibrate_images=200,
        score_images=100,
        recalibrate_images=300,
        rescore_images=130,
        recipe=Recipe(epochs=0),
    )
    network, dataset = build_network("digits_cnn", 10, seed=0), load_dataset("digits")
    problem = state_problem(network, dataset, settings, placement=Placement())
    keep = np.arange(problem.tracing.space.num_filters) % 2 == 0
    basis = Basis(round=0, arrays=to_arrays(network), compute=problem.compute)
    worker, device = ScoringWorker(problem, 0), torch.device("cpu")

    for split, steps, recalibrated, scored_on in (
        ("search_val", 2, 200, 100),
        ("search_val", 6, 200, 100),
        ("choose_val", 6, 300, 130),
    ):
        fidelity = Fidelity(steps=steps, recalibrate_images=recalibrated, score_images=scored_on)
        candidate = Candidate(
            dense=network.eval(),
            tracing=problem.tracing,
            keep=keep,
            search_train=open_split(problem, "search_train", device),
            held_out=open_split(problem, split, device),
            fidelity=fidelity,
            recipe=settings.recipe,
            seed=(0, 3),
            compute=problem.compute,
        )
        expected = score(candidate)
        scored = worker.score(basis, keep, (0, 3), split, steps)
        assert (scored.val_loss, scored.val_accuracy) == (expected.val_loss, expected.val_accuracy)


def test_what_is_fine_tuned_is_recalibrated_on_all_classes_though_images_come_class_by_class(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = load_dataset("digits")
    order = np.argsort(data.train.labels, kind="stable")  # as folders are listed
    assert isinstance(data.train, ImageArrays)
    by_class = ImageArrays(data.train.images[order], data.train.labels[order])
    settings = SearchSettings(macs_cut=0.5, recalibrate_images=100, recipe=Recipe(epochs=0))
    network = build_network("digits_cnn", 10, seed=0)
    problem = state_problem(network, replace(data, train=by_class), settings)
    seen: list[Tensor] = []
    monkeypatch.setattr(
        "fppmo_ray.service.problem.recalibrate_batchnorm",
        lambda network, batches: seen.append(torch.cat([labels for _, labels in batches])),
    )
    images = open_split(problem, "search_train", torch.device("cpu"))
    keep = np.ones(problem.tracing.space.num_filters, dtype=bool)
    for _ in range(2):
        pruned_network(problem, network, keep, images)
    first, second = seen
    assert torch.equal(first, second)
    assert len(first) == 100
    assert torch.bincount(first, minlength=10).min() >= 3
