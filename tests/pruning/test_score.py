"""The score of a mask, computed at once and measured after fewer steps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

from fppmo_ray.distribution import BoolArray
from fppmo_ray.pruning import Candidate, Fidelity, ScoreInRungs, Tracing, score, trace
from fppmo_ray.training import (
    Images,
    Recipe,
    build_network,
    example_batch,
    load_dataset,
    open_images,
    train_steps,
)

RECIPE = Recipe(batch_size=32, distillation_weight=0.0)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclass(frozen=True)
class Setting:
    dense: nn.Module
    tracing: Tracing
    keep: BoolArray
    train: Images
    held_out: Images

    def candidate(self, fidelity: Fidelity, seed: tuple[int, ...] = (0, 3)) -> Candidate:
        return Candidate(
            dense=self.dense,
            tracing=self.tracing,
            keep=self.keep,
            search_train=self.train,
            held_out=self.held_out,
            fidelity=fidelity,
            recipe=RECIPE,
            seed=seed,
        )


@pytest.fixture(scope="module")
def setting() -> Setting:
    digits = load_dataset("digits")
    dense = build_network("digits_cnn", 10)
    train = open_images(digits.train, np.arange(600), digits)
    train_steps(dense, train, RECIPE, steps=60, seed=0)
    tracing = trace(dense.eval(), example_batch(digits))
    keep = np.arange(tracing.space.num_filters) % 3 != 2
    return Setting(
        dense, tracing, keep, train, open_images(digits.train, np.arange(600, 900), digits)
    )


def test_the_last_rung_is_the_score_to_the_bit(setting: Setting) -> None:
    fidelity = Fidelity(steps=12, recalibrate_images=200, score_images=250)
    candidate = setting.candidate(fidelity)
    at_once = score(candidate)
    first = ScoreInRungs(candidate)
    losses = [first.measure_at(rung).loss for rung in (0, 5)]
    moved = ScoreInRungs(candidate)
    moved.restore(first.state())
    last = moved.measure_at(12)
    assert (last.loss, last.accuracy) == (at_once.val_loss, at_once.val_accuracy)
    assert first.measure_at(12) == last
    assert len({*losses, last.loss}) == 3


def test_the_first_rung_is_the_score_without_steps(setting: Setting) -> None:
    few = {"recalibrate_images": 200, "score_images": 250}
    rungs = ScoreInRungs(setting.candidate(Fidelity(steps=12, **few)))
    without = score(setting.candidate(Fidelity(steps=0, **few)))
    assert rungs.measure_at(0).loss == without.val_loss


def test_another_seed_scores_on_other_images(setting: Setting) -> None:
    fidelity = Fidelity(steps=0, recalibrate_images=200, score_images=150)
    losses = {score(setting.candidate(fidelity, seed=(0, g))).val_loss for g in (0, 0, 1)}
    assert len(losses) == 2


def test_scoring_leaves_the_dense_network_alone(setting: Setting) -> None:
    before = {name: value.clone() for name, value in setting.dense.state_dict().items()}
    score(setting.candidate(Fidelity(steps=2, recalibrate_images=100, score_images=100)))
    after = setting.dense.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
