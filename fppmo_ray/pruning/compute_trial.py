"""What a score would cost with a compute configuration, measured on a part of it."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

from fppmo_ray.pruning.score import Candidate, Fidelity, ScoreInRungs
from fppmo_ray.training import ComputeConfig, slow_bfloat16

_STEPS = 4  # of fine-tuning that are timed
_FEW_IMAGES = 250


@dataclass(frozen=True, kw_only=True)
class ComputeTrial:
    """How a compute configuration did."""

    compute: ComputeConfig
    seconds: float | None
    """Of a whole score, extrapolated from some of its steps; None: there is no measurement."""
    val_loss: float | None
    """After those steps; compute configurations that agree differ by rounding."""
    error: str | None = None
    """Why it does not run."""
    left_out: str | None = None
    """Why it was not even tried: it would be slower for sure."""


def try_compute(candidate: Candidate, given: ComputeConfig) -> ComputeTrial:
    """Time the score of a candidate, with few of its fine-tuning steps.

    What is made once in a process (kernels, caches) is not counted.

    Args:
        candidate: With the compute configuration to try.
        given: The compute configuration to begin with, which may not be left out, however slow.
    """
    compute = candidate.compute
    device = candidate.held_out.labels.device
    if compute.dtype != given.dtype and (why := slow_bfloat16(compute, device)):
        return ComputeTrial(compute=compute, seconds=None, val_loss=None, left_out=why)
    first = replace(candidate, fidelity=_shortest(candidate.fidelity))
    try:
        ScoreInRungs(first).measure_at(first.fidelity.steps)
        return _timed(candidate)
    except (RuntimeError, ValueError) as error:  # it cannot be folded, captured, or held in memory
        return ComputeTrial(compute=compute, seconds=None, val_loss=None, error=str(error))


def _shortest(fidelity: Fidelity) -> Fidelity:
    return replace(
        fidelity,
        steps=min(1, fidelity.steps),
        recalibrate_images=min(_FEW_IMAGES, fidelity.recalibrate_images),
        score_images=min(_FEW_IMAGES, fidelity.score_images),
    )


def _timed(candidate: Candidate) -> ComputeTrial:
    fidelity = candidate.fidelity
    steps = min(_STEPS, fidelity.steps)
    started = time.perf_counter()
    score = ScoreInRungs(replace(candidate, fidelity=replace(fidelity, steps=steps)))
    trained_from = time.perf_counter()
    score.train_to(steps)
    trained = time.perf_counter()
    score.recalibrate()
    metrics = score.look()
    untrained = (trained_from - started) + (time.perf_counter() - trained)
    training = (trained - trained_from) / max(1, steps) * fidelity.steps
    return ComputeTrial(
        compute=candidate.compute, seconds=untrained + training, val_loss=metrics.loss
    )
