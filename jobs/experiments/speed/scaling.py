"""How the loop scales: workers that only sleep, so all that is lost is the service's own time."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import ray
from rich.table import Table

from fppmo_ray.distribution import Feedback, OptimizerSettings, Proposal
from fppmo_ray.service.pool.call import Call
from fppmo_ray.service.pool.cluster import Demand
from fppmo_ray.service.pool.worker_group import WorkerInfo
from fppmo_ray.service.pool.worker_pool import WorkerPool, worker_pool
from fppmo_ray.testing.simulated_search import (
    SIMULATED_SPACE,
    Pace,
    SimulatedWorker,
    search_with,
    simulated_model,
    simulated_run,
)

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
    """A simulated worker that measures its scores, since a sleep takes longer than asked for.

    Args:
        pace: Duration of the scores.
        slot: Number of the worker in its group.
    """

    def __init__(self, pace: Pace, slot: int) -> None:
        self._worker = SimulatedWorker(pace, slot)

    def ready(self) -> WorkerInfo:
        """Return where the worker runs."""
        return self._worker.ready()

    def score(self, proposal: Proposal) -> Feedback:
        """Return the simulated score with the time that it took."""
        begin = time.perf_counter()
        feedback = self._worker.score(proposal)
        return replace(feedback, seconds=time.perf_counter() - begin)


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
        simulated_run(Path(folder) / "run", settings) as run,
        simulated_model(settings) as model,
        worker_pool(TimedWorker, pace, num_workers=load.workers, demand=Demand(cpus=1)) as pool,
    ):
        _wait_for_all(pool)
        cpu_seconds = time.process_time()
        search_with(run, model, pool, settings)
        cpu_seconds = time.process_time() - cpu_seconds
        scores = [_span(item) for item in run.all(Feedback) if not item.failed]
    span = max(end for _, end in scores) - min(begin for begin, _ in scores)
    return Throughput(
        load=load,
        scores_per_second=load.proposals / span,
        busy=sum(end - begin for begin, end in scores) / (load.workers * span),
        driver=cpu_seconds / span,
    )


def _span(feedback: Feedback) -> tuple[float, float]:
    """Return the times at which a score began and ended, in seconds."""
    assert feedback.at is not None  # the driver notes it for every score
    assert feedback.seconds is not None  # the worker measures it
    return feedback.at - feedback.seconds, feedback.at


@contextmanager
def _local_ray(num_cpus: int) -> Iterator[None]:
    ray.init(
        address="local",
        num_cpus=num_cpus,  # more than there may be: simulated workers need none
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=False,
    )
    try:
        yield
    finally:
        ray.shutdown()


def _wait_for_all(pool: WorkerPool[TimedWorker]) -> None:
    """Let the workers that have started score something until all have."""
    keep = np.ones(SIMULATED_SPACE.num_filters, dtype=np.bool_)
    dense = Proposal(proposal_id=0, generation=0, keep=keep, macs=SIMULATED_SPACE.dense_macs)
    while pool.num_ready < pool.num_workers:
        pool.run([Call("warm-up", lambda worker: worker.score(dense))])
