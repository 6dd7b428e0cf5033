"""Where latency is limited: its table, measured once per search, journaled, and read again."""

from __future__ import annotations

import json
import logging
import warnings
from dataclasses import asdict, replace
from typing import Any

from fppmo_ray.distribution.latency_table import LatencyTable
from fppmo_ray.pruning.latency import MeasuredLatency
from fppmo_ray.service.budgets import budgets_of
from fppmo_ray.service.pool.work import Work
from fppmo_ray.service.pool.worker_pool import WorkerPool
from fppmo_ray.service.problem import Problem
from fppmo_ray.service.record.facts import LatencyMeasured
from fppmo_ray.service.record.run_directory import RunDirectory
from fppmo_ray.service.settings import SearchSettings
from fppmo_ray.service.task_problem import TaskProblem
from fppmo_ray.training import ComputeConfig

logger = logging.getLogger(__name__)

ARTIFACT = "latency.json"
_DOUBTFUL = 0.15  # a median error of the table above this is warned of


def with_latency(
    problem: Problem | TaskProblem,
    settings: SearchSettings,
    run: RunDirectory,
    pool: WorkerPool,
    compute: ComputeConfig,
) -> Problem | TaskProblem:
    """The problem with a space that tells latencies, where the settings limit them.

    The table decides masks, so it is measured once: whoever resumes, elsewhere too, reads it again.

    Args:
        problem: Of the search.
        settings: What is limited, and for which batch.
        run: Where the table is kept.
        pool: With nothing unfinished, so that nothing else slows the worker down.
        compute: Whose threads the network is timed with.

    Raises:
        ValueError: the cut is out of reach on this device, or the table is not the journal's.
    """
    if settings.latency_cut is None:
        return problem
    known = run.all(LatencyMeasured)
    fact = known[0] if known else _measure(settings, run, pool, compute)
    content = json.loads(run.read_artifact(fact.artifact, fact.sha256))
    table = LatencyTable.from_json(content["table"])
    space = replace(problem.tracing.space, latency=table)
    budgets_of(space, settings)  # refuses what is out of reach on this device
    return replace(problem, tracing=replace(problem.tracing, space=space))


def _measure(
    settings: SearchSettings, run: RunDirectory, pool: WorkerPool, compute: ComputeConfig
) -> LatencyMeasured:
    work = Work(
        name="latency table",
        method="measure_latency_table",
        arguments=(compute, settings.latency_batch, settings.seed),
    )
    measured: MeasuredLatency
    [measured] = pool.run([work])
    content = json.dumps(_to_json(measured, settings, compute)).encode()
    fact = LatencyMeasured(
        artifact=ARTIFACT,
        sha256=run.write_artifact(ARTIFACT, content),
        batch=settings.latency_batch,
        dense_ms=measured.table.dense_ns / 1e6,
        median_error=measured.median_error,
        device=measured.device,
    )
    run.record([fact])
    logger.info("latency  %s", fact)
    if fact.median_error > _DOUBTFUL:
        warnings.warn(
            f"the latency table is off by {100 * fact.median_error:.0f} % (median of "
            f"{len(measured.checks)} masks), so cuts of latency are as doubtful; measure on a "
            "worker with nothing else to do, or with a larger latency_batch",
            stacklevel=2,
        )
    return fact


def _to_json(
    measured: MeasuredLatency, settings: SearchSettings, compute: ComputeConfig
) -> dict[str, Any]:
    return {
        "device": measured.device,
        "threads": compute.threads,
        "batch": settings.latency_batch,
        "checks": [asdict(check) for check in measured.checks],
        "table": measured.table.to_json(),
    }
