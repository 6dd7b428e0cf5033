"""What a score would cost with an engine, measured on a part of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from torch import nn

from fppmo_ray.distribution import BoolArray
from fppmo_ray.pruning.score import Fidelity, ScoreInRungs
from fppmo_ray.pruning.trace import Tracing
from fppmo_ray.training import Engine, Images, Recipe

_STEPS = 4  # of fine-tuning that are timed
_FEW_IMAGES = 250


@dataclass(frozen=True, kw_only=True)
class EngineTrial:
    """How an engine did."""

    engine: Engine
    seconds: float | None
    """Of a whole score, extrapolated from some of its steps; None: it does not run."""
    val_loss: float | None
    """After those steps; engines that agree differ by rounding."""
    error: str | None = None


def try_engine(
    dense: nn.Module,
    tracing: Tracing,
    keep: BoolArray,
    *,
    search_train: Images,
    held_out: Images,
    fidelity: Fidelity,
    recipe: Recipe,
    engine: Engine,
) -> EngineTrial:
    """Time a score with few of its fine-tuning steps; the arguments are those of ``score``.

    What is made once in a process (kernels, caches) is not counted.
    """
    begin = partial(
        ScoreInRungs,
        *(dense, tracing, keep),
        search_train=search_train,
        held_out=held_out,
        recipe=recipe,
        seed=(0,),
        engine=engine,
    )
    try:
        begin(fidelity=_shortest(fidelity)).measure_at(min(1, fidelity.steps))
        return _timed(begin, fidelity, engine)
    except (RuntimeError, ValueError) as error:  # it cannot be folded, captured, or held in memory
        return EngineTrial(engine=engine, seconds=None, val_loss=None, error=str(error))


def _shortest(fidelity: Fidelity) -> Fidelity:
    return replace(
        fidelity,
        steps=min(1, fidelity.steps),
        recalibrate_images=min(_FEW_IMAGES, fidelity.recalibrate_images),
        score_images=min(_FEW_IMAGES, fidelity.score_images),
    )


def _timed(begin: Callable[..., ScoreInRungs], fidelity: Fidelity, engine: Engine) -> EngineTrial:
    steps = min(_STEPS, fidelity.steps)
    started = time.perf_counter()
    score = begin(fidelity=replace(fidelity, steps=steps))
    trained_from = time.perf_counter()
    score.train_to(steps)
    trained = time.perf_counter()
    score.recalibrate()
    metrics = score.look()
    untrained = (trained_from - started) + (time.perf_counter() - trained)
    training = (trained - trained_from) / max(1, steps) * fidelity.steps
    return EngineTrial(engine=engine, seconds=untrained + training, val_loss=metrics.loss)
