"""How the passes of a search are computed: as asked for, or what was fastest on a worker."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from typing import Any, TypeVar

import numpy as np

from fppmo_ray.distribution import BoolArray
from fppmo_ray.distribution.logits import uniform_priority
from fppmo_ray.pruning.compute_trial import ComputeTrial, Timed
from fppmo_ray.service.journal.facts import ComputeChosen
from fppmo_ray.service.journal.run_directory import RunDirectory
from fppmo_ray.service.pool.call import Call
from fppmo_ray.service.pool.worker_pool import WorkerPool
from fppmo_ray.service.problem import Problem, budgets_of
from fppmo_ray.service.settings import SearchSettings
from fppmo_ray.service.worker_protocol import Worker
from fppmo_ray.training import ComputeConfig, DType

logger = logging.getLogger(__name__)

T = TypeVar("T")

_MARGIN = 0.05  # smallest share of time that a change must save: less may be chance
_AGREEMENT = 0.1  # largest relative difference of the losses of two configurations that work
_LARGE_BATCH = 2500  # images per pass that keep a GPU busy


def choose_compute(
    problem: Problem, run: RunDirectory, pool: WorkerPool[Worker]
) -> tuple[ComputeConfig, ComputeConfig]:
    """Return how scores and how whole trainings are computed, from the journal if it says so.

    Otherwise they are chosen and recorded.

    Args:
        problem: Its settings' ``dtype`` and ``autotune`` say how to choose.
        run: Run directory, where the choice is recorded.
        pool: Idle workers, so that no other work slows the measurements down.

    Raises:
        RuntimeError: the network cannot be scored at all, or the user's own task fails.
    """
    if known := run.all(ComputeChosen):
        return _configs(known[0])
    keep = _some_mask(problem)
    if problem.task.follows_compute:
        chosen = decide(problem, pool, keep)
        if problem.settings.numerics.autotune and problem.settings.fine_tune.epochs:
            chosen = _with_training(chosen, problem, pool, keep)
    else:
        _score_first(problem, pool, keep)
        why = "all passes are computed by the task's own functions"
        chosen = ComputeChosen(compute=asdict(problem.compute), trials=[], why=why)
    run.record([chosen])
    logger.info("compute  %s", chosen.why)
    return _configs(chosen)


def _score_first(problem: Problem, pool: WorkerPool[Worker], keep: BoolArray) -> None:
    """Show errors of a user's task by one score, before a whole generation fails by them.

    A mask that ends its workers' processes says nothing against the task, unless the dense network
    does so, too.

    Args:
        problem: The search.
        pool: Idle workers.
        keep: The mask to score, ``(num_filters,)``.

    Raises:
        RuntimeError: the task fails.
    """
    name = "first score of the task"

    def score(mask: BoolArray) -> Call[Worker, ComputeTrial]:
        return _run(pool, Call(name, lambda worker: worker.try_compute(problem.compute, mask)))

    first = score(keep)
    if first.error is not None and first.lost_on:
        logger.warning("%s failed: %s; the dense network is scored instead", name, first.error)
        first = score(np.ones_like(keep))
    _ = first.result  # raises if it failed


def _run(pool: WorkerPool[Worker], call: Call[Worker, T]) -> Call[Worker, T]:
    """Run a call that may fail, while no others are unfinished, and return it."""
    pool.submit(call)
    while not call.has_ended:
        pool.next_ended()
    return call


def _configs(chosen: ComputeChosen) -> tuple[ComputeConfig, ComputeConfig]:
    scores, trainings = chosen.compute, chosen.training
    return ComputeConfig(**scores), ComputeConfig(**(scores if trainings is None else trainings))


def is_settled(settings: SearchSettings) -> bool:
    """Return whether the settings alone fix the compute configuration."""
    return settings.numerics.dtype != "auto" and not settings.numerics.autotune


def decide(problem: Problem, pool: WorkerPool[Worker], keep: BoolArray) -> ComputeChosen:
    """Choose how scores are computed as the settings say.

    Args:
        problem: With ``autotune`` in its settings, configurations are timed on a worker. Without
            it, the worker's processor decides on the dtype where that is ``auto``, and nothing else
            changes.
        pool: Idle workers.
        keep: The mask that is scored in measurements, bool ``(num_filters,)``.

    Raises:
        RuntimeError: the network cannot be scored.
    """
    asked, settings = problem.compute, problem.settings
    if is_settled(settings):
        return ComputeChosen(compute=asdict(asked), trials=[], why=f"{asked}, as asked for")
    call: Call[Worker, DType] = Call("dtype of the worker", lambda worker: worker.native_dtype())
    [native] = pool.run([call])
    if settings.numerics.autotune:
        changes = changes_to_try(problem, native, of="score")
        return choose_fastest(asked, changes, _trials_on(pool, keep, "score"), of="score")
    compute = replace(asked, dtype=native)
    units = "units" if native == "bfloat16" else "no units"
    why = f"{compute}: the worker's processor has {units} for bfloat16"
    return ComputeChosen(compute=asdict(compute), trials=[], why=why)


def _with_training(
    scores: ComputeChosen, problem: Problem, pool: WorkerPool[Worker], keep: BoolArray
) -> ComputeChosen:
    """Choose how whole trainings are computed too, by trials of their own.

    Args:
        scores: The choice for scores.
        problem: The search.
        pool: Idle workers.
        keep: The mask of the network that is trained in measurements, bool ``(num_filters,)``.
    """
    tried = {trial["compute"]["dtype"] for trial in scores.trials}
    native: DType = "bfloat16" if "bfloat16" in tried else "float32"
    changes = changes_to_try(problem, native, of="epoch")
    found = choose_fastest(problem.compute, changes, _trials_on(pool, keep, "epoch"), of="epoch")
    return replace(
        scores,
        training=found.compute,
        trials=[*scores.trials, *found.trials],
        why=f"{scores.why}; {found.why}",
    )


def choose_fastest(
    compute: ComputeConfig,
    changes: list[list[Mapping[str, Any]]],
    measure: Callable[[ComputeConfig], ComputeTrial],
    *,
    of: Timed,
) -> ComputeChosen:
    """Change one field after the other; keep a change that is faster and gives the same loss.

    Args:
        compute: The first configuration, whose loss the others must agree with.
        changes: For each field, the changes of it to try.
        measure: Returns the trial of a configuration.
        of: What the trials measure.

    Raises:
        RuntimeError: the first configuration fails.
    """
    first = best = measure(compute)
    if first.seconds is None:
        done = "scored" if of == "score" else "trained"
        raise RuntimeError(f"the network cannot be {done} with {compute}: {first.error}")
    trials = [first]
    for alternatives in changes:
        tried = [measure(replace(best.compute, **change)) for change in alternatives]
        trials += tried
        best = min([best, *_better(tried, best, first)], key=_seconds)
    unit = "s a score" if of == "score" else "s an epoch"
    why = "; ".join(f"{item.compute}: {_seconds(item):.3g} {unit}" for item in (best, first))
    return ComputeChosen(
        compute=asdict(best.compute),
        trials=[{"of": of, **asdict(trial)} for trial in trials],
        why=why,
    )


def changes_to_try(problem: Problem, native: DType, *, of: Timed) -> list[list[Mapping[str, Any]]]:
    """Return, for each field of the configuration, the changes of it that may be faster.

    Args:
        problem: Its device type and score depth decide what can be faster; a dtype that was asked
            for is not changed.
        native: The fastest dtype that the worker's processor has units for.
        of: What becomes faster.
    """
    tries_bfloat16 = problem.settings.numerics.dtype == "auto" and native == "bfloat16"
    dtypes: list[Mapping[str, Any]] = [{"dtype": "bfloat16"}] if tries_bfloat16 else []
    folding: list[Mapping[str, Any]] = [{"fold_batchnorm": True}]
    large: list[Mapping[str, Any]] = [{"scoring_batch": _LARGE_BATCH}]
    if of == "epoch":
        large = folding = []
    if problem.device_type == "cpu":
        # Layouts are not tried: on CPUs channels last was always faster, up to three times.
        return [dtypes, folding, [{"threads": count} for count in _halves(problem.threads)]]
    has_steps = bool(problem.settings.scoring.score_steps)
    replays = has_steps if of == "score" else problem.fine_tune_workers == 1
    graphs: list[Mapping[str, Any]] = [{"cuda_graphs": True}] if replays else []
    return [dtypes, [{"channels_last": False}], large, folding, graphs]


def _trials_on(
    pool: WorkerPool[Worker], keep: BoolArray, of: Timed
) -> Callable[[ComputeConfig], ComputeTrial]:
    def measure(compute: ComputeConfig) -> ComputeTrial:
        def ask(worker: Worker) -> ComputeTrial:
            if of == "score":
                return worker.try_compute(compute, keep)
            return worker.try_training(compute, keep)

        call = _run(pool, Call(f"trial of {compute}", ask))
        if call.error is not None:  # the configuration ends the worker's process, or hangs
            return ComputeTrial(compute=compute, seconds=None, val_loss=None, error=call.error)
        return call.value

    return measure


def _halves(threads: int) -> Iterator[int]:
    while threads > 1:
        threads //= 2
        yield threads


def _better(
    tried: list[ComputeTrial], best: ComputeTrial, first: ComputeTrial
) -> list[ComputeTrial]:
    """Return the trials that are clearly faster than the best so far and agree with the first."""
    better = []
    for trial in tried:
        if trial.seconds is None:
            logger.warning("compute configuration %s fails: %s", trial.compute, trial.error)
        elif not _agree(trial, first):
            logger.warning(
                "compute configuration %s is not used: its loss is %s, that of %s is %s",
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
    assert trial.seconds is not None  # only trials that ran are compared
    return trial.seconds


def _some_mask(problem: Problem) -> BoolArray:
    """Return a mask that meets the first budget with the same share of every layer.

    The time of a score depends on the widths, so that trials have to use those of a proposal.
    Latency is not limited, because it is measured with the compute configuration.
    """
    space = problem.space
    order = uniform_priority(space, np.arange(1.0, space.num_filters + 1))
    return budgets_of(space, problem.settings)[0].fill(order)
