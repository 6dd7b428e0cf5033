"""How the loop scales: workers that only sleep, so all that is lost is the service's own time."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import ray
from rich.table import Table

from fppmo_ray.distribution import OptimizerSettings
from fppmo_ray.service.pool import WorkerPool
from fppmo_ray.service.pretend import (
    PRETEND_SPACE,
    Pace,
    PretendWorker,
    pretend_model,
    pretend_pool,
    pretend_run,
    search_with,
)
from fppmo_ray.service.record.facts import Scored
from fppmo_ray.service.resources import Demand
from fppmo_ray.service.work import Work

_PACE = Pace(mean_seconds=0.5, spread=0.2)
_POPULATION = 64
_FEW, _MANY = (1, 64), (32, 2048)  # workers and proposals
_GOAL = 0.93


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """Of a whole search, from the start of its first score to its last score."""

    workers: int
    proposals: int
    scores_per_second: float
    idle: float
    """Share of the workers' time in which they did not score."""
    driver: float
    """Share of a CPU that the driver used."""


def scaling_table() -> Table:
    """Measure, with the workers up before the first score."""
    few, many = (_measure(*size) for size in (_FEW, _MANY))
    ratio = many.scores_per_second / (many.workers * few.scores_per_second)
    load = ", ".join(f"{average:.1f}" for average in os.getloadavg())
    table = Table(
        *("workers", "proposals", "scores per second", "per worker", "idle", "driver's CPU"),
        title=f"scores of {_PACE.mean_seconds} s ± {_PACE.spread:.0%}, population {_POPULATION}, "
        f"{os.cpu_count()} cores, load {load}",
        caption=f"{many.workers} workers / {many.workers} times one: {ratio:.3f} (goal {_GOAL})",
    )
    for row in (few, many):
        table.add_row(
            str(row.workers),
            f"{row.proposals:,}",
            f"{row.scores_per_second:.2f}",
            f"{row.scores_per_second / row.workers:.3f}",
            f"{row.idle:.1%}",
            f"{row.driver:.0%}",
        )
    return table


def _measure(workers: int, proposals: int) -> Throughput:
    settings = OptimizerSettings(macs_cut=0.5, num_proposals=proposals, population_size=_POPULATION)
    with (
        _local_ray(num_cpus=workers),
        tempfile.TemporaryDirectory() as folder,
        pretend_run(Path(folder) / "run", settings) as run,
        pretend_model(settings) as model,
        pretend_pool(PretendWorker, _PACE, num_workers=workers, demand=Demand(cpus=1)) as pool,
    ):
        _wait_for_all(pool)
        cpu_seconds = time.process_time()
        search_with(run, model, pool, settings)
        cpu_seconds = time.process_time() - cpu_seconds
        scored = run.all(Scored)
    span = max(fact.at for fact in scored) - min(fact.at - fact.seconds for fact in scored)
    return Throughput(
        workers=workers,
        proposals=proposals,
        scores_per_second=proposals / span,
        idle=1 - sum(fact.seconds for fact in scored) / (workers * span),
        driver=cpu_seconds / span,
    )


@contextmanager
def _local_ray(num_cpus: int) -> Iterator[None]:
    ray.init(
        address="local",
        num_cpus=num_cpus,  # pretended, like the workers
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=False,
    )
    try:
        yield
    finally:
        ray.shutdown()


def _wait_for_all(pool: WorkerPool) -> None:
    """Let those that are up score something until all are."""
    keep = np.ones(PRETEND_SPACE.num_filters, dtype=np.bool_)
    work = Work(name="warm-up", method="score", arguments=(None, keep, (0, 0), "search_val"))
    while pool.num_ready < pool.num_workers:
        pool.run([work])
