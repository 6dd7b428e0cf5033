"""Compute configurations: the same score from all of them, and what each would cost."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fppmo_ray.pruning import Candidate, Fidelity, score, trace
from fppmo_ray.pruning.compute_trial import try_compute, try_training
from fppmo_ray.training import (
    PLAIN_COMPUTE,
    ComputeConfig,
    Recipe,
    StepTraining,
    build_network,
    example_batch,
    load_dataset,
    open_images,
    train_steps,
)

RECIPE = Recipe(batch_size=64, distillation_weight=0.0)
FLOAT32_CONFIGS = [
    ComputeConfig(fold_batchnorm=True),
    ComputeConfig(channels_last=False),
    ComputeConfig(scoring_batch=64),
]
BFLOAT16_CONFIGS = [
    ComputeConfig(dtype="bfloat16"),
    ComputeConfig(dtype="bfloat16", fold_batchnorm=True),
]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def trained() -> Candidate:
    """A trained network, a mask and images."""
    digits = load_dataset("digits")
    dense = build_network("digits_cnn", 10)
    train = open_images(digits.train, np.arange(900), digits)
    train_steps(dense, train, RECIPE, steps=60, seed=0)
    tracing = trace(dense.eval(), example_batch(digits))
    return Candidate(
        dense=dense,
        tracing=tracing,
        keep=np.arange(tracing.space.num_filters) % 2 == 0,
        search_train=train,
        held_out=open_images(digits.train, np.arange(900, 1400), digits),
        fidelity=Fidelity(steps=50),
        recipe=RECIPE,
    )


@pytest.mark.parametrize("steps", [0, 10])
def test_all_compute_configurations_give_the_same_score_within_a_third_of_its_noise(
    trained: Candidate, steps: int
) -> None:
    fidelity = Fidelity(steps=steps, recalibrate_images=500, score_images=400)

    def loss(compute: ComputeConfig, seed: int = 0) -> float:
        candidate = replace(trained, fidelity=fidelity, seed=(0, seed), compute=compute)
        return score(candidate).val_loss

    plain = loss(PLAIN_COMPUTE)
    noise = statistics.stdev(loss(PLAIN_COMPUTE, seed) for seed in range(6))
    for compute in FLOAT32_CONFIGS:
        assert loss(compute) == pytest.approx(plain, rel=1e-5), str(compute)
    for compute in BFLOAT16_CONFIGS:
        assert abs(loss(compute) - plain) < noise / 3, str(compute)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """A clock that only training steps move: by 1 s each, and by 100 s at the first of a run."""
    clock = {"now": 0.0}
    run_to = StepTraining.run_to

    def timed(training: StepTraining, step: int) -> None:
        run_to(training, 0)
        clock["now"] += 100 * (step > 0) + step

    monkeypatch.setattr(StepTraining, "run_to", timed)
    monkeypatch.setattr(time, "perf_counter", lambda: clock["now"])
    return clock


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize("steps", [0, 4, 15, 4000])
def test_a_trial_of_a_score_counts_the_start_once_and_every_step(
    trained: Candidate, steps: int
) -> None:
    trial = try_compute(replace(trained, fidelity=Fidelity(steps=steps)))
    assert trial.seconds == pytest.approx(100 * (steps > 0) + steps)


@pytest.mark.usefixtures("clock")
def test_a_trial_of_an_epoch_counts_the_start_once_and_every_step(trained: Candidate) -> None:
    trial = try_training(replace(trained, recipe=Recipe(batch_size=20)))
    assert trial.seconds == pytest.approx(100 + 900 // 20)


def test_a_trial_of_an_epoch_trains_with_the_teacher(trained: Candidate) -> None:
    losses = {
        weight: try_training(
            replace(trained, recipe=Recipe(batch_size=64, distillation_weight=weight))
        ).val_loss
        for weight in (0.0, 0.5)
    }
    assert losses[0.0] != losses[0.5]
    assert all(loss is not None and 0 < loss < 3 for loss in losses.values())


class Undecided(nn.Module):
    """Looks at the numbers to decide what to do, which torch.fx cannot follow."""

    def __init__(self) -> None:
        super().__init__()
        self.network = build_network("digits_cnn", 10)

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.network(image)
        return logits if logits.sum() < 1e9 else -logits


def test_a_compute_configuration_that_does_not_fit_the_network_says_why(trained: Candidate) -> None:
    dense = Undecided().eval()
    tracing = trace(dense, torch.zeros(1, 1, 8, 8))
    candidate = replace(
        trained,
        dense=dense,
        tracing=tracing,
        keep=np.ones(tracing.space.num_filters) > 0,
        fidelity=Fidelity(steps=0),
        compute=ComputeConfig(fold_batchnorm=True),
    )
    trial = try_compute(candidate)
    assert trial.seconds is None
    assert "torch.fx cannot follow" in str(trial.error)
