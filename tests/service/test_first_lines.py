"""A search says at once what the data is, how the dense network does on it, and what is wrong."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from simulated_run import all_of, go_on
from torch import nn

from fppmo_ray import Baseline, Recipe, Sampler, SearchSettings, load_dataset
from fppmo_ray.distribution import Feedback
from fppmo_ray.service.dense_network import score_dense
from fppmo_ray.service.finalize import _half, _warn_if_missed
from fppmo_ray.service.image_task import image_classification
from fppmo_ray.service.images_on_worker import dense_scored
from fppmo_ray.service.journal.facts import DenseScored, EpochFinished
from fppmo_ray.service.observation import Generation, Observation
from fppmo_ray.service.progress import spread_warning


def messages(caplog: pytest.LogCaptureFixture, level: int) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == level]


def test_the_interval_is_wilsons_and_chance_the_most_frequent_class() -> None:
    labels = np.array([0] * 60 + [1] * 40)
    score = dense_scored(np.where(np.arange(100) < 90, labels, 1 - labels), labels, 2)
    assert (score.accuracy, score.num_images, score.chance) == (0.9, 100, 0.6)
    assert score.half_interval == pytest.approx(0.0596, abs=1e-4)  # 0.8256 to 0.9448
    assert str(score) == "90.0 % ± 6.0 on 100 held-out images, chance 60.0 %"
    assert not score.is_chance
    three = dense_scored(np.arange(3), np.arange(3), 3)  # all right, and still next to nothing
    assert str(three) == "100.0 % ± 28.1 on 3 held-out images, chance 33.3 %"


def test_accuracy_within_its_interval_of_chance_is_chance() -> None:
    labels = np.arange(1000) % 4
    right = np.arange(1000) < 270
    assert dense_scored(np.where(right, labels, (labels + 1) % 4), labels, 4).is_chance
    right = np.arange(1000) < 290
    assert not dense_scored(np.where(right, labels, (labels + 1) % 4), labels, 4).is_chance


def test_outputs_in_another_order_than_the_labels_are_recognised() -> None:
    labels = np.arange(1000) % 10
    shuffled = np.array([3, 7, 1, 0, 9, 8, 2, 4, 6, 5])[labels]
    predicted = np.where(np.arange(1000) < 950, shuffled, labels)
    score = dense_scored(predicted, labels, 10)
    assert score.reordered_accuracy == pytest.approx(0.95, abs=0.02)
    assert score.accuracy < 0.2
    guesses = np.random.default_rng(0).integers(0, 10, 1000)
    assert dense_scored(guesses, labels, 10).reordered_accuracy < 0.3


def test_a_dense_network_that_answers_with_nan_is_refused() -> None:
    class Broken(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            means = images.mean((1, 2, 3), keepdim=True).flatten(1)
            return (means / torch.zeros(())).expand(-1, 10)

    settings = SearchSettings(macs_cut=0.5)
    task = image_classification(load_dataset("digits"))
    on_worker = task.open(cast(Any, None), settings, torch.device("cpu"), threads=1)
    with pytest.raises(RuntimeError, match="answers with NaN or infinity; check its weights and"):
        on_worker.score_dense(Broken())


def context(score: DenseScored, losses: Sequence[float] = ()) -> Any:
    """A search whose journal holds these facts."""
    facts: dict[type, list[Any]] = {
        DenseScored: [score],
        EpochFinished: [
            EpochFinished(
                **{"task": "baseline", "epoch": epoch, "train_loss": loss, "seconds": 1.0},
                **{"artifact": "", "sha256": ""},
            )
            for epoch, loss in enumerate(losses)
        ],
    }
    settings = SearchSettings(macs_cut=0.5, baseline=Baseline(baseline_epochs=len(losses)))
    return SimpleNamespace(run=SimpleNamespace(all=facts.__getitem__), settings=settings)


@pytest.mark.parametrize(
    ("predicted", "labels", "losses", "warnings"),
    [
        (np.arange(400) % 4, np.arange(400) % 4, [], []),
        (
            *(np.arange(29) % 2, np.arange(29) % 2, []),
            ["masks are ranked on 29 held-out images, where one image is 3.4 points of accuracy"],
        ),
        (
            *(np.zeros(400, int), np.arange(400) % 4, []),
            ["the dense network is no better than chance, and no mask will be: check mean, std"],
        ),
        (
            *(np.zeros(400, int), np.arange(400) % 4, [1.9, 1.386]),
            [
                "the dense network is no better than chance",
                "training ended at a loss of 1.386, where guessing has ln 4 = 1.386: it diverged",
            ],
        ),
        (
            *((np.arange(400) + 1) % 4, np.arange(400) % 4, []),
            ["in another order than the labels: reordered, it would have 100.0 %"],
        ),
    ],
)
def test_bad_signs_are_warnings_before_anything_is_scored(
    predicted: np.ndarray,
    labels: np.ndarray,
    losses: list[float],
    warnings: list[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    score = dense_scored(predicted, labels, 4)
    with caplog.at_level(logging.INFO):
        score_dense(context(score, losses), cast(Any, None))
    state = f"after {len(losses)} epochs of training" if losses else "as given"
    assert messages(caplog, logging.INFO) == [f"dense network {state}: {score}"]
    found = messages(caplog, logging.WARNING)
    assert len(found) == len(warnings)
    assert all(wanted in got for wanted, got in zip(warnings, found, strict=True))


def test_a_search_begins_with_its_data_and_the_dense_networks_accuracy(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = SearchSettings(
        macs_cut=0.5, proposals=8, sampler=Sampler(population=4), fine_tune=Recipe(epochs=1)
    )
    with caplog.at_level(logging.INFO, logger="fppmo_ray.service.dense_network"):
        go_on(tmp_path, settings)
    assert messages(caplog, logging.INFO) == [
        "digits: 1,294 images to train on, 86 to score on, 58 to choose on, 359 to test on",
        "images: grey centre 8 x 8 bilinear, mean 0.3055, std 0.3759; training: crops after "
        "padding with 1, never mirrored",
        "10 classes, in the order of the network's outputs: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9",
        "dense network as given: 90.0 % ± 3.4 on 300 held-out images, chance 20.0 %",
    ]
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="fppmo_ray.service.dense_network"):
        _, pools = go_on(tmp_path, settings)
    assert "score of the dense network" not in pools.names[0]  # the journal knows it
    assert len(all_of(tmp_path, DenseScored)) == 1
    assert "dense network as given: 90.0 %" in messages(caplog, logging.INFO)[3]


def generation(index: int, losses: Sequence[float]) -> Observation:
    feedback = tuple(
        Feedback(proposal_id=number, val_loss=loss, val_accuracy=0.25)
        for number, loss in enumerate(losses)
    )
    touched = Generation(
        **{"index": index, "is_complete": True, "num_ended": len(losses), "num_failed": 0},
        **{"by_budget": (feedback,), "rank": list},
    )
    return SimpleNamespace(touched=(touched,))  # type: ignore[return-value]


def test_scores_without_spread_are_a_warning_once(caplog: pytest.LogCaptureFixture) -> None:
    listen = spread_warning()
    listen(generation(0, [1.2, 1.3, 1.4]))
    assert not messages(caplog, logging.WARNING)
    for index in (1, 2):
        listen(generation(index, [1.386294, 1.386294, 1.386295]))
    [warning] = messages(caplog, logging.WARNING)
    assert warning.startswith("all 3 masks of generation 1 have the same score")


def test_a_result_that_misses_its_importance_only_mask_is_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def rows(ours: float, theirs: float, budget: float) -> list[dict[str, Any]]:
        return [
            {"name": name, "budget": budget, "after": {"test": {"accuracy": accuracy}}}
            for name, accuracy in (("importance-only", theirs), ("fppmo", ours))
        ]

    _warn_if_missed([*rows(0.9, 0.8, 0.4), *rows(0.7, 0.75, 0.6)])
    [warning] = messages(caplog, logging.WARNING)
    assert "test accuracy of 0.7000 misses that of the importance-only mask, 0.7500" in warning


def test_the_interval_of_a_difference_counts_only_images_on_which_two_networks_differ() -> None:
    own, other = np.ones(998, dtype=bool), np.ones(998, dtype=bool)
    assert _half(own, other) == pytest.approx(1.96 / 1000)  # sqrt(0.5 + 0.5) images of 1,000
    own[:20], other[20:30] = False, False  # 10 gained, 20 lost: sqrt(31 - 0.1) images
    assert _half(own, other) == pytest.approx(1.96 * 30.9**0.5 / 1000)
    assert _half(own, other) == _half(other, own)
