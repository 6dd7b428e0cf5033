"""The engine of a search: asked for, or chosen by measurement at its start, and journaled."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from fppmo_ray.distribution import BoolArray
from fppmo_ray.distribution.logits import uniform_priority
from fppmo_ray.pruning.engine_trial import EngineTrial
from fppmo_ray.service.budgets import budgets_of
from fppmo_ray.service.pool.work import Work
from fppmo_ray.service.pool.worker_pool import WorkerPool
from fppmo_ray.service.problem import Problem, Prunable
from fppmo_ray.service.record.facts import EngineChosen
from fppmo_ray.service.record.run_directory import RunDirectory
from fppmo_ray.service.settings import SearchSettings
from fppmo_ray.training import Engine

logger = logging.getLogger(__name__)

_MARGIN = 0.05  # an engine must be faster by this share: less may be chance
_AGREEMENT = 0.1  # losses of engines that compute the same differ by less than this share
_LARGE_BATCH = 2500  # images per pass that keep a GPU busy


def settle_engine(
    problem: Prunable, settings: SearchSettings, run: RunDirectory, pool: WorkerPool
) -> Engine:
    """The journal's engine; else the fastest one, measured on a worker, or the one asked for.

    Args:
        problem: Its engine is where the measurements begin.
        settings: What is asked for. A task of the user's own computes its passes by itself.
        run: Where the choice is recorded.
        pool: With nothing unfinished, so that nothing else slows the worker down.

    Raises:
        RuntimeError: the network cannot be scored at all, or the user's own task fails at it.
    """
    if known := run.all(EngineChosen):
        return Engine(**known[0].engine)
    keep = _some_mask(problem, settings)
    if isinstance(problem, Problem):
        measure = trials_on(pool, keep)
        chosen = choose_engine(problem.engine, ways_to_try(problem, settings), measure)
    else:
        # What is wrong with a task is known after one score, not after all of a generation.
        pool.run([Work(name="first score of the task", method="try_score", arguments=(keep,))])
        why = "all passes are computed by the task's own functions"
        chosen = EngineChosen(engine=asdict(problem.engine), trials=[], why=why)
    run.record([chosen])
    logger.info("engine  %s", chosen.why)
    return Engine(**chosen.engine)


def trials_on(pool: WorkerPool, keep: BoolArray) -> Callable[[Engine], EngineTrial]:
    """Trials on whichever worker is free, each by its ``try_engine``.

    Args:
        pool: With nothing unfinished.
        keep: The mask that is scored.
    """

    def measure(engine: Engine) -> EngineTrial:
        work = Work(name=f"trial of {engine}", method="try_engine", arguments=(engine, keep))
        trial: EngineTrial
        [trial] = pool.run([work])
        return trial

    return measure


def choose_engine(
    engine: Engine,
    ways: list[list[Mapping[str, Any]]],
    measure: Callable[[Engine], EngineTrial],
) -> EngineChosen:
    """Change one thing after the other, and keep what is faster and gives the same score.

    Args:
        engine: The first, against which scores are checked.
        ways: For each thing, the changes to try.
        measure: Gives the trial of an engine.

    Raises:
        RuntimeError: the first engine does not run.
    """
    if not any(ways):
        return EngineChosen(engine=asdict(engine), trials=[], why=f"{engine}, as asked for")
    first = best = measure(engine)
    if first.seconds is None:
        raise RuntimeError(f"the network cannot be scored with {engine}: {first.error}")
    trials = [first]
    for changes in ways:
        tried = [measure(replace(best.engine, **change)) for change in changes]
        trials += tried
        best = min([best, *_better(tried, best, first)], key=_seconds)
    why = "; ".join(f"{item.engine}: {_seconds(item):.3g} s a score" for item in (best, first))
    return EngineChosen(
        engine=asdict(best.engine), trials=[asdict(trial) for trial in trials], why=why
    )


def ways_to_try(problem: Problem, settings: SearchSettings) -> list[list[Mapping[str, Any]]]:
    """What may be changed about the problem's engine; nothing where all is asked for."""
    dtypes: list[Mapping[str, Any]] = [{"dtype": "bfloat16"}] if settings.dtype == "auto" else []
    if settings.engine == "plain":
        return [dtypes]
    folding: list[Mapping[str, Any]] = [{"fold_batchnorm": True}]
    if problem.device_type == "cpu":
        # Layouts are not tried: on CPUs channels last was always faster, up to three times.
        return [dtypes, folding, [{"threads": count} for count in _fewer(problem.threads)]]
    graphs: list[Mapping[str, Any]] = [{"cuda_graphs": True}] if problem.fidelity.steps else []
    return [dtypes, [{"channels_last": False}], [{"scoring_batch": _LARGE_BATCH}], folding, graphs]


def _fewer(threads: int) -> Iterator[int]:
    while threads > 1:
        threads //= 2
        yield threads


def _better(tried: list[EngineTrial], best: EngineTrial, first: EngineTrial) -> list[EngineTrial]:
    """Those that are clearly faster than the best so far and agree with the first."""
    better = []
    for trial in tried:
        if trial.left_out is not None:
            logger.info("engine %s is not tried: %s", trial.engine, trial.left_out)
        elif trial.seconds is None:
            logger.warning("engine %s does not run here: %s", trial.engine, trial.error)
        elif not _agree(trial, first):
            logger.warning(
                "engine %s is not used: its loss is %s, that of %s is %s",
                *(trial.engine, trial.val_loss, first.engine, first.val_loss),
            )
        elif trial.seconds < (1 - _MARGIN) * _seconds(best):
            better.append(trial)
    return better


def _agree(trial: EngineTrial, first: EngineTrial) -> bool:
    assert trial.val_loss is not None  # both ran
    assert first.val_loss is not None
    return abs(trial.val_loss - first.val_loss) <= _AGREEMENT * abs(first.val_loss)


def _seconds(trial: EngineTrial) -> float:
    assert trial.seconds is not None  # only those that ran are compared
    return trial.seconds


def _some_mask(problem: Prunable, settings: SearchSettings) -> BoolArray:
    """A mask that meets the budget with equal rates: its widths are what costs time.

    How latency is measured depends on the engine, so that it is not limited yet.
    """
    space = problem.tracing.space
    order = uniform_priority(space, np.arange(1.0, space.num_filters + 1))
    return budgets_of(space, settings)[0].fill(order)
