"""The compute configuration of a search: asked for or measured at its start, and journaled."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from fppmo_ray.distribution import BoolArray
from fppmo_ray.distribution.logits import uniform_priority
from fppmo_ray.pruning.compute_trial import ComputeTrial
from fppmo_ray.service.budgets import budgets_of
from fppmo_ray.service.pool.work import Work
from fppmo_ray.service.pool.worker_pool import WorkerPool
from fppmo_ray.service.problem import Problem, Prunable
from fppmo_ray.service.record.facts import ComputeChosen
from fppmo_ray.service.record.run_directory import RunDirectory
from fppmo_ray.service.settings import SearchSettings
from fppmo_ray.training import ComputeConfig

logger = logging.getLogger(__name__)

_MARGIN = 0.05  # a compute configuration must be faster by this share: less may be chance
_AGREEMENT = (
    0.1  # losses of compute configurations that compute the same differ by less than this share
)
_LARGE_BATCH = 2500  # images per pass that keep a GPU busy


def choose_compute(
    problem: Prunable, settings: SearchSettings, run: RunDirectory, pool: WorkerPool
) -> ComputeConfig:
    """The journal's compute; else the fastest one, measured on a worker, or the one asked for.

    Args:
        problem: Its compute configuration is where the measurements begin.
        settings: What is asked for. A task of the user's own computes its passes by itself.
        run: Where the choice is recorded.
        pool: With nothing unfinished, so that nothing else slows the worker down.

    Raises:
        RuntimeError: the network cannot be scored at all, or the user's own task fails at it.
    """
    if known := run.all(ComputeChosen):
        return ComputeConfig(**known[0].compute)
    keep = _some_mask(problem, settings)
    if isinstance(problem, Problem):
        measure = trials_on(pool, keep)
        chosen = choose_fastest(problem.compute, ways_to_try(problem, settings), measure)
    else:
        # What is wrong with a task is known after one score, not after all of a generation.
        pool.run([Work(name="first score of the task", method="try_score", arguments=(keep,))])
        why = "all passes are computed by the task's own functions"
        chosen = ComputeChosen(compute=asdict(problem.compute), trials=[], why=why)
    run.record([chosen])
    logger.info("compute  %s", chosen.why)
    return ComputeConfig(**chosen.compute)


def trials_on(pool: WorkerPool, keep: BoolArray) -> Callable[[ComputeConfig], ComputeTrial]:
    """Trials on whichever worker is free, each by its ``try_compute``.

    Args:
        pool: With nothing unfinished.
        keep: The mask that is scored.
    """

    def measure(compute: ComputeConfig) -> ComputeTrial:
        work = Work(name=f"trial of {compute}", method="try_compute", arguments=(compute, keep))
        trial: ComputeTrial
        [trial] = pool.run([work])
        return trial

    return measure


def choose_fastest(
    compute: ComputeConfig,
    ways: list[list[Mapping[str, Any]]],
    measure: Callable[[ComputeConfig], ComputeTrial],
) -> ComputeChosen:
    """Change one thing after the other, and keep what is faster and gives the same score.

    Args:
        compute: The first, against which scores are checked.
        ways: For each thing, the changes to try.
        measure: Gives the trial of a compute configuration.

    Raises:
        RuntimeError: the first compute configuration does not run.
    """
    if not any(ways):
        return ComputeChosen(compute=asdict(compute), trials=[], why=f"{compute}, as asked for")
    first = best = measure(compute)
    if first.seconds is None:
        raise RuntimeError(f"the network cannot be scored with {compute}: {first.error}")
    trials = [first]
    for changes in ways:
        tried = [measure(replace(best.compute, **change)) for change in changes]
        trials += tried
        best = min([best, *_better(tried, best, first)], key=_seconds)
    why = "; ".join(f"{item.compute}: {_seconds(item):.3g} s a score" for item in (best, first))
    return ComputeChosen(
        compute=asdict(best.compute), trials=[asdict(trial) for trial in trials], why=why
    )


def ways_to_try(problem: Problem, settings: SearchSettings) -> list[list[Mapping[str, Any]]]:
    """What may be changed about the problem's compute; nothing where all is asked for."""
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


def _better(
    tried: list[ComputeTrial], best: ComputeTrial, first: ComputeTrial
) -> list[ComputeTrial]:
    """Those that are clearly faster than the best so far and agree with the first."""
    better = []
    for trial in tried:
        if trial.left_out is not None:
            logger.info("compute %s is not tried: %s", trial.compute, trial.left_out)
        elif trial.seconds is None:
            logger.warning("compute %s does not run here: %s", trial.compute, trial.error)
        elif not _agree(trial, first):
            logger.warning(
                "compute %s is not used: its loss is %s, that of %s is %s",
                *(trial.compute, trial.val_loss, first.compute, first.val_loss),
            )
        elif trial.seconds < (1 - _MARGIN) * _seconds(best):
            better.append(trial)
    return better


def _agree(trial: ComputeTrial, first: ComputeTrial) -> bool:
    assert trial.val_loss is not None  # both ran
    assert first.val_loss is not None
    return abs(trial.val_loss - first.val_loss) <= _AGREEMENT * abs(first.val_loss)


def _seconds(trial: ComputeTrial) -> float:
    assert trial.seconds is not None  # only those that ran are compared
    return trial.seconds


def _some_mask(problem: Prunable, settings: SearchSettings) -> BoolArray:
    """A mask that meets the budget with equal rates: its widths are what costs time.

    How latency is measured depends on the compute configuration, so that it is not limited yet.
    """
    space = problem.tracing.space
    order = uniform_priority(space, np.arange(1.0, space.num_filters + 1))
    return budgets_of(space, settings)[0].fill(order)
