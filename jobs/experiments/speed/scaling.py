"""How the loop scales: workers that only sleep, so all that is lost is the service's own time."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
from rich.table import Table

from fppmo_ray.distribution import OptimizerSettings
from fppmo_ray.service.pool.cluster import Demand
from fppmo_ray.service.pool.work import Work
from fppmo_ray.service.pool.worker_group import WorkerInfo
from fppmo_ray.service.pool.worker_pool import WorkerPool, worker_pool
from fppmo_ray.service.pretend import (
    PRETEND_SPACE,
    Pace,
    PretendScore,
    PretendWorker,
    pretend_model,
    pretend_run,
    search_with,
)
from fppmo_ray.service.journal.facts import Scored

_SPREAD = 0.2
_POPULATION = 64
_GOAL_MANY, _GOAL_BUSY = 0.93, 0.95


@dataclass(frozen=True, kw_only=True)
class Load:
    """A search to measure."""

    seconds: float
    """Of a score, in the mean."""
    workers: int
    proposals: int


_FEW = Load(seconds=0.5, workers=1, proposals=64)
_MANY = Load(seconds=0.5, workers=32, proposals=2048)
_FAST = [  # a fast configuration on a GPU
    Load(seconds=0.05, workers=workers, proposals=256 * workers) for workers in (1, 2, 4)
]


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """Of a whole search, from the start of its first score to its last score."""

    load: Load
    scores_per_second: float
    busy: float
    """Share of the workers' time in which they scored."""
    driver: float
    """Share of a CPU that the driver used."""

    @property
    def per_worker(self) -> float:
        """Scores per second of one worker."""
        return self.scores_per_second / self.load.workers


class TimedWorker:
    """A simulated worker that returns the real time of its score, since sleeps last too long.

    Args:
        pace: How long scores take.
        slot: Number of the worker in the pool.
    """

    def __init__(self, pace: Pace, slot: int) -> None:
        self._worker = PretendWorker(pace, slot)

    def ready(self) -> WorkerInfo:
        """Where the worker runs."""
        return self._worker.ready()

    def score(self, *arguments: Any) -> PretendScore:
        """The pretended score."""
        begin = time.perf_counter()
        score = self._worker.score(*arguments)
        return replace(score, seconds=time.perf_counter() - begin)


def scaling_table() -> Table:
    """Measure, with the workers up before the first score."""
    few, many = _measure(_FEW), _measure(_MANY)
    fast = [_measure(load) for load in _FAST]
    table = Table(
        *("score", "workers", "proposals", "scores per second", "per worker", "busy"),
        "driver's CPU",
        title=f"scores of so long ± {_SPREAD:.0%}, population {_POPULATION}, "
        f"{os.cpu_count()} cores, load {', '.join(f'{item:.1f}' for item in os.getloadavg())}",
        caption=f"{_MANY.workers} workers / {_MANY.workers} times one: "
        f"{many.per_worker / few.per_worker:.3f} (goal {_GOAL_MANY})\n"
        f"busy with scores of {_FAST[0].seconds} s: {min(row.busy for row in fast):.1%} "
        f"(goal {_GOAL_BUSY:.0%})",
    )
    for row in (few, many, *fast):
        table.add_row(
            f"{row.load.seconds} s",
            str(row.load.workers),
            f"{row.load.proposals:,}",
            f"{row.scores_per_second:.2f}",
            f"{row.per_worker:.3f}",
            f"{row.busy:.1%}",
            f"{row.driver:.0%}",
        )
    return table


def _measure(load: Load) -> Throughput:
    pace = Pace(mean_seconds=load.seconds, spread=_SPREAD)
    settings = OptimizerSettings(
        macs_cut=0.5, num_proposals=load.proposals, population_size=_POPULATION
    )
    with (
        _local_ray(num_cpus=load.workers),
        tempfile.TemporaryDirectory() as folder,
        pretend_run(Path(folder) / "run", settings) as run,
        pretend_model(settings) as model,
        worker_pool(TimedWorker, pace, num_workers=load.workers, demand=Demand(cpus=1)) as pool,
    ):
        _wait_for_all(pool)
        cpu_seconds = time.process_time()
        search_with(run, model, pool, settings)
        cpu_seconds = time.process_time() - cpu_seconds
        scored = run.all(Scored)
    span = max(fact.at for fact in scored) - min(fact.at - fact.seconds for fact in scored)
    return Throughput(
        load=load,
        scores_per_second=load.proposals / span,
        busy=sum(fact.seconds for fact in scored) / (load.workers * span),
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
