"""Measure how long a score or a training epoch takes with a compute configuration.

A few steps are timed and the others extrapolated. The first steps cost more than later ones:
kernels are chosen, and a CUDA graph is captured. So the time of a step is the difference between a
run of some steps and a run of a few.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from torch import nn

from fppmo_ray.distribution import IntArray
from fppmo_ray.pruning.calibration.features import last_feature_match
from fppmo_ray.pruning.extract import extract
from fppmo_ray.pruning.score import Candidate, Fidelity, ScoreInRungs
from fppmo_ray.training import ComputeConfig, StepTraining, evaluate, recalibrate_batchnorm

_FEW_STEPS = 5  # the capture of a CUDA graph is among them
_MORE_STEPS = 15
_WARM_UP_IMAGES = 250
_BATCH = 250

Timed = Literal["score", "epoch"]
"""What a trial measures: a score, or an epoch of fine-tuning."""


@dataclass(frozen=True, kw_only=True)
class ComputeTrial:
    """The measured speed and loss of one compute configuration."""

    compute: ComputeConfig
    """The configuration that was tried."""
    seconds: float | None
    """Seconds for a whole score or epoch, extrapolated from some steps; None if it failed."""
    val_loss: float | None
    """Loss after those steps. Configurations that work differ by rounding only."""
    error: str | None = None
    """Message of the error that the configuration ended with."""


def try_compute(candidate: Candidate) -> ComputeTrial:
    """Time the score of a candidate with its compute configuration, on some fine-tuning steps.

    A first, short score warms up kernels and caches and is not counted.

    Args:
        candidate: The mask, images and fidelity of the score, with the configuration to try.
    """
    fidelity = candidate.fidelity
    return _trial(candidate.compute, lambda: _time_score(candidate, fidelity))


def try_training(candidate: Candidate) -> ComputeTrial:
    """Time an epoch of a candidate's recipe with its compute configuration, on some steps.

    The loss is that of a short training on the candidate's held-out images.

    Args:
        candidate: The mask, images and recipe, with the configuration to try. The dense network is
            the teacher where the recipe distils.
    """
    return _trial(candidate.compute, lambda: _time_epoch(candidate))


def _trial(compute: ComputeConfig, measure: Callable[[], tuple[float, float]]) -> ComputeTrial:
    try:
        seconds, loss = measure()
    except (RuntimeError, ValueError) as error:  # folding, graph capture or memory failed
        return ComputeTrial(compute=compute, seconds=None, val_loss=None, error=str(error))
    return ComputeTrial(compute=compute, seconds=seconds, val_loss=loss)


def _time_score(candidate: Candidate, fidelity: Fidelity) -> tuple[float, float]:
    """Return the seconds of a score and its loss after some steps."""
    _run_score(candidate, _shortest(fidelity))
    few, more = (
        _run_score(candidate, replace(fidelity, steps=min(steps, fidelity.steps)))
        for steps in (_FEW_STEPS, _MORE_STEPS)
    )
    return _extrapolated(few[0], more[0], fidelity.steps), more[1]


def _shortest(fidelity: Fidelity) -> Fidelity:
    return replace(
        fidelity,
        steps=min(1, fidelity.steps),
        recalibrate_images=min(_WARM_UP_IMAGES, fidelity.recalibrate_images),
        score_images=min(_WARM_UP_IMAGES, fidelity.score_images),
    )


def _run_score(candidate: Candidate, fidelity: Fidelity) -> tuple[float, float]:
    begin = time.perf_counter()
    metrics = ScoreInRungs(replace(candidate, fidelity=fidelity)).measure_at(fidelity.steps)
    return time.perf_counter() - begin, metrics.loss


def _time_epoch(candidate: Candidate) -> tuple[float, float]:
    """Return the seconds of an epoch and the loss after some of its steps."""
    _train(candidate, _FEW_STEPS)
    few, _ = _train(candidate, _FEW_STEPS)
    more, network = _train(candidate, _MORE_STEPS)
    images = candidate.search_train
    recalibrate_batchnorm(network, images.batches(_BATCH, _first_rows(len(images))))
    held_out = candidate.held_out
    metrics = evaluate(network, held_out.batches(_BATCH, _first_rows(len(held_out))))
    num_steps = images.num_training_batches(candidate.recipe.batch_size)
    return _extrapolated(few, more, num_steps), metrics.loss


def _first_rows(count: int) -> IntArray:
    return np.arange(min(count, 2 * _BATCH))


def _train(candidate: Candidate, steps: int) -> tuple[float, nn.Module]:
    network = extract(candidate.dense, candidate.tracing, candidate.keep)
    one, _ = next(iter(candidate.search_train.batches(1)))
    places = last_feature_match(network, candidate.dense, candidate.tracing, candidate.keep, one)
    begin = time.perf_counter()
    training = StepTraining(
        network,
        candidate.search_train,
        candidate.recipe,
        steps=steps,
        seed=candidate.seed,
        compute=candidate.compute,
        teacher=candidate.dense,
        matches=places,
    )
    training.run_to(steps)
    return time.perf_counter() - begin, network


def _extrapolated(few: float, more: float, steps: int) -> float:
    """Return the seconds of all steps from the seconds of a few and of more of them."""
    if steps <= _MORE_STEPS:
        return more if steps else min(few, more)
    return few + max(0.0, more - few) / (_MORE_STEPS - _FEW_STEPS) * (steps - _FEW_STEPS)
