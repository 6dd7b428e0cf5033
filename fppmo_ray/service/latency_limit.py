"""A limit on latency: its table is measured once per search, journaled, and read again."""

from __future__ import annotations

import json
import logging
import warnings
from dataclasses import asdict, replace
from typing import Any

from fppmo_ray.distribution.latency_table import LatencyTable
from fppmo_ray.pruning.latency import MeasuredLatency
from fppmo_ray.service.journal.facts import LatencyMeasured
from fppmo_ray.service.journal.run_directory import RunDirectory
from fppmo_ray.service.pool.call import Call
from fppmo_ray.service.pool.worker_pool import WorkerPool
from fppmo_ray.service.problem import Problem, budgets_of
from fppmo_ray.service.settings import SearchSettings
from fppmo_ray.service.worker_protocol import Worker
from fppmo_ray.training import ComputeConfig

logger = logging.getLogger(__name__)

ARTIFACT = "latency.json"
_DOUBTFUL = 0.15  # a median error of the table above this is warned of


def with_latency(
    problem: Problem, run: RunDirectory, pool: WorkerPool[Worker], compute: ComputeConfig
) -> Problem:
    """Return the problem with a space that knows latencies, if the settings limit them.

    The table decides masks, so it is measured once: a driver that resumes reads it again.

    Args:
        problem: Its settings say what is limited, and for which batch.
        run: Where the table is kept.
        pool: Idle workers, so that no other work slows the measurements down.
        compute: Says how many threads the network is timed with.

    Raises:
        ValueError: the cut is out of reach on this device, or the table is not the journal's.
    """
    if problem.settings.latency_cut is None:
        return problem
    known = run.all(LatencyMeasured)
    fact = known[0] if known else _measure(problem.settings, run, pool, compute)
    content = json.loads(run.read_artifact(fact.artifact, fact.sha256))
    table = LatencyTable.from_json(content["table"])
    space = replace(problem.space, latency=table)
    budgets_of(space, problem.settings)  # refuses what is out of reach on this device
    return replace(problem, tracing=replace(problem.tracing, space=space))


def _measure(
    settings: SearchSettings,
    run: RunDirectory,
    pool: WorkerPool[Worker],
    compute: ComputeConfig,
) -> LatencyMeasured:
    batch, seed = settings.latency_batch, settings.seed
    call: Call[Worker, MeasuredLatency] = Call(
        "latency table", lambda worker: worker.measure_latency_table(compute, batch, seed)
    )
    [measured] = pool.run([call])
    content = json.dumps(_to_json(measured, batch, compute)).encode()
    fact = LatencyMeasured(
        artifact=ARTIFACT,
        sha256=run.write_artifact(ARTIFACT, content),
        batch=batch,
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


def _to_json(measured: MeasuredLatency, batch: int, compute: ComputeConfig) -> dict[str, Any]:
    return {
        "device": measured.device,
        "threads": compute.threads,
        "batch": batch,
        "checks": [asdict(check) for check in measured.checks],
        "table": measured.table.to_json(),
    }
