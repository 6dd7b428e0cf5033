"""Latencies of widths on the search's device: measured or read once, and journaled."""

from __future__ import annotations

import json
import logging
import warnings
from dataclasses import asdict, replace
from typing import Any

from fppmo_ray.distribution import BoolArray
from fppmo_ray.distribution.latency_table import LatencyTable
from fppmo_ray.pruning.latency import (
    Clock,
    MeasuredLatency,
    Read,
    num_readings,
    read_clock,
    table_by_clock,
)
from fppmo_ray.service.journal.facts import ClockRead, LatencyMeasured
from fppmo_ray.service.journal.run_directory import RunDirectory
from fppmo_ray.service.pool.call import Call
from fppmo_ray.service.pool.worker_pool import WorkerPool
from fppmo_ray.service.problem import Problem, budgets_of
from fppmo_ray.service.worker_protocol import Worker
from fppmo_ray.training import ComputeConfig

logger = logging.getLogger(__name__)

ARTIFACT = "latency.json"
_DOUBTFUL = 0.15  # a median error of the table above this is warned of


def journaled_clock(clock: Clock | None, problem: Problem, run: RunDirectory) -> Read | None:
    """Return a function that reads the user's clock once for every mask, and journals what it says.

    Args:
        clock: The clock; None: there is none.
        problem: The network and its tracing.
        run: The record of the search.
    """
    if clock is None:
        return None
    known = {fact.keep.tobytes(): fact.milliseconds for fact in run.all(ClockRead)}

    def read(keep: BoolArray) -> float:
        mask = keep.tobytes()
        if mask not in known:
            milliseconds = read_clock(clock, problem.network, problem.tracing, keep)
            run.record([ClockRead(keep=keep, milliseconds=milliseconds)])
            known[mask] = milliseconds
        return known[mask]

    return read


def with_latency(
    problem: Problem,
    run: RunDirectory,
    pool: WorkerPool[Worker],
    compute: ComputeConfig,
    read: Read | None = None,
) -> Problem:
    """Return the problem with a space that knows latencies, if the settings limit them.

    The table decides masks, so it is measured once: a driver that resumes reads it again.

    Args:
        problem: Its settings say what is limited, and for which batch.
        run: Where the table is kept.
        pool: Idle workers, so that no other work slows the measurements down.
        compute: Says how many threads the network is timed with.
        read: Reads the user's clock; None: a worker measures.

    Raises:
        ValueError: the cut is out of reach on this device, or the table is not the journal's.
    """
    if problem.settings.latency_cut is None:
        return problem
    known = run.all(LatencyMeasured)
    fact = known[0] if known else _measure(problem, run, pool, compute, read)
    try:
        content = json.loads(run.read_artifact(fact.artifact, fact.sha256))
    except ValueError as error:
        raise ValueError(
            f"{error}; times are never measured alike twice, so put the file back, or begin again "
            "in another run directory"
        ) from error
    table = LatencyTable.from_json(content["table"])
    space = replace(problem.space, latency=table)
    budgets_of(space, problem.settings)  # refuses what is out of reach on this device
    return replace(problem, tracing=replace(problem.tracing, space=space))


def table_figures(run: RunDirectory) -> dict[str, Any]:
    """Return the latency table's entry of result.json; nothing where no latency is limited."""
    measured = run.all(LatencyMeasured)
    if not measured:
        return {}
    names = ("batch", "dense_ms", "median_error", "device")
    return {"latency_table": {name: getattr(measured[0], name) for name in names}}


def _measure(
    problem: Problem,
    run: RunDirectory,
    pool: WorkerPool[Worker],
    compute: ComputeConfig,
    read: Read | None,
) -> LatencyMeasured:
    settings, space = problem.settings, problem.space
    batch, seed = settings.latency_batch, settings.seed
    if read is None:
        call: Call[Worker, MeasuredLatency] = Call(
            "latency table", lambda worker: worker.measure_latency_table(compute, batch, seed)
        )
        [measured] = pool.run([call])
    else:
        assert problem.clock is not None  # there is a clock to read
        count, batch = num_readings(space), 0
        logger.info("latency  %s times %d networks, one after the other", problem.clock, count)
        measured = table_by_clock(read, space, seed=seed, name=problem.clock)
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
            f"{len(measured.checks)} masks), so cuts of latency are as doubtful; measure "
            + (
                "on a worker with nothing else to do, or with a larger latency_batch"
                if read is None
                else "with nothing else running, and return the median of several passes"
            ),
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
