"""Measure how long a score takes with a compute configuration, from a part of the score."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

from fppmo_ray.pruning.score import Candidate, Fidelity, ScoreInRungs
from fppmo_ray.training import ComputeConfig

_TIMED_STEPS = 4
_WARM_UP_IMAGES = 250


@dataclass(frozen=True, kw_only=True)
class ComputeTrial:
    """The measured speed and loss of one compute configuration."""

    compute: ComputeConfig
    """The configuration that was tried."""
    seconds: float | None
    """Seconds for a whole score, extrapolated from a few of its steps; None if it failed."""
    val_loss: float | None
    """Loss after those steps. Configurations that work differ by rounding only."""
    error: str | None = None
    """Message of the error that the configuration ended with."""


def try_compute(candidate: Candidate) -> ComputeTrial:
    """Time the score of a candidate with its compute configuration, on a few fine-tuning steps.

    A first, short score warms up kernels and caches and is not counted.

    Args:
        candidate: The mask, images and fidelity of the score, with the configuration to try.
    """
    warm_up = replace(candidate, fidelity=_shortest(candidate.fidelity))
    try:
        ScoreInRungs(warm_up).measure_at(warm_up.fidelity.steps)
        return _timed(candidate)
    except (RuntimeError, ValueError) as error:  # folding, graph capture or memory failed
        return ComputeTrial(
            compute=candidate.compute, seconds=None, val_loss=None, error=str(error)
        )


def _shortest(fidelity: Fidelity) -> Fidelity:
    return replace(
        fidelity,
        steps=min(1, fidelity.steps),
        recalibrate_images=min(_WARM_UP_IMAGES, fidelity.recalibrate_images),
        score_images=min(_WARM_UP_IMAGES, fidelity.score_images),
    )


def _timed(candidate: Candidate) -> ComputeTrial:
    fidelity = candidate.fidelity
    steps = min(_TIMED_STEPS, fidelity.steps)
    started = time.perf_counter()
    score = ScoreInRungs(replace(candidate, fidelity=replace(fidelity, steps=steps)))
    trained_from = time.perf_counter()
    score.train_to(steps)
    trained = time.perf_counter()
    score.recalibrate()
    metrics = score.look()
    untrained = (trained_from - started) + (time.perf_counter() - trained)
    # Only the training grows with the number of steps.
    training = (trained - trained_from) / max(1, steps) * fidelity.steps
    return ComputeTrial(
        compute=candidate.compute, seconds=untrained + training, val_loss=metrics.loss
    )
