"""Measure large searches: many simulated workers at once, and journals of many proposals.

    python jobs/experiments/load.py --output jobs/experiments/results/load.csv

Workers only sleep, so all that is lost is the service's own time. Sixty-four of them share a
process. Journals are written without Ray, then read by a process for each measurement, each for a
second time: the first one compiles the package's sources.
"""

from __future__ import annotations

import asyncio
import csv
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray

from fppmo_ray.distribution import Feedback, OptimizerSettings, Proposal
from fppmo_ray.job import run_job
from fppmo_ray.service.journal.facts import Fact, Started
from fppmo_ray.service.journal.journal import JOURNAL, to_lines
from fppmo_ray.service.journal.run_directory import read_journal
from fppmo_ray.service.pool.worker_group import WorkerInfo, worker_info
from fppmo_ray.service.pool.worker_pool import WorkerPool
from fppmo_ray.service.search_loop import ProbabilityModel
from fppmo_ray.testing.simulated_search import (
    SIMULATED_SPACE,
    Pace,
    ScoresProposals,
    SimulatedWorker,
    search_with,
    simulated_model,
    simulated_run,
)

_SEATS = 64  # workers that share a process
_SPREAD = 0.2
_RECORDED_TOGETHER = 64
_NO_BYTECODE = "PYTHONDONTWRITEBYTECODE"
_STATUS = "from fppmo_ray.cli import main; main()"
_REPORT = """
import sys
from pathlib import Path
from fppmo_ray.report import write_report
write_report(sys.argv[1], Path(sys.argv[2]))
"""


@dataclass(frozen=True, kw_only=True)
class Load:
    """What is measured."""

    workers: int = 512
    """Simulated workers."""
    score_seconds: float = 10.0
    """Mean duration of a score; the standard deviation is a fifth of it."""
    rounds: int = 12
    """Scores per worker."""
    proposals: int = 100_000
    """Proposals of the long journal."""

    @property
    def population(self) -> int:
        """Proposals per generation."""
        return 4 * self.workers


class Seats:
    """Simulated workers that share a process; runs as an asynchronous Ray actor.

    Args:
        score_seconds: Mean duration of a score.
    """

    def __init__(self, score_seconds: float) -> None:
        self._mean = score_seconds
        self._scores = SimulatedWorker(Pace(mean_seconds=0.0, spread=0.0), 0)
        self._locks: defaultdict[int, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def ready(self, slot: int) -> WorkerInfo:
        """Return where the worker of a slot runs."""
        return worker_info(slot)

    async def score(self, slot: int, proposal: Proposal) -> Feedback:
        """Return the simulated score, after a sleep that depends on the proposal alone.

        A worker computes one score after the other, while those of others go on.
        """
        async with self._locks[slot]:
            begin = time.perf_counter()
            feedback = self._scores.score(proposal)
            deviation = np.random.default_rng([1, proposal.proposal_id]).uniform(-1, 1)
            await asyncio.sleep(self._mean * (1 + math.sqrt(3) * _SPREAD * deviation))
            return replace(feedback, seconds=time.perf_counter() - begin)


class Seat:
    """Looks like the actor of one worker.

    Args:
        process: The actor that the worker shares with others.
        slot: Slot of the worker.
    """

    def __init__(self, process: Any, slot: int) -> None:
        self._process = process
        self._slot = slot

    def __getattr__(self, method: str) -> Any:
        shared = getattr(self._process, method)
        return shared if method.startswith("_") else _Method(shared, self._slot)


class _Method:
    """A method of one worker."""

    def __init__(self, method: Any, slot: int) -> None:
        self._method = method
        self._slot = slot

    def options(self, **named: Any) -> _Method:
        return _Method(self._method.options(**named), self._slot)

    def remote(self, *arguments: Any) -> Any:
        return self._method.remote(self._slot, *arguments)


def main(output: Path, load: Load) -> None:
    """Measure, and write one row per figure.

    Args:
        output: CSV file.
        load: What is measured.
    """
    with tempfile.TemporaryDirectory() as folder:
        figures = {
            **_measure_workers(load, Path(folder) / "busy"),
            **_measure_journal(load, Path(folder) / "long"),
        }
    with output.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["figure", "value"])
        writer.writerows((name, f"{value:.4g}") for name, value in figures.items())
    print(output.read_text(), end="")


def _measure_workers(load: Load, run_dir: Path) -> dict[str, float]:
    """Measure a search on many workers, from its first score to its last."""
    settings = OptimizerSettings(
        macs_cut=0.5,
        num_proposals=load.workers * load.rounds,
        population_size=load.population,
    )
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=False,
    )
    remote: Any = ray.remote
    actor = remote(num_cpus=0, max_concurrency=2 * _SEATS)(Seats)
    processes = [actor.remote(load.score_seconds) for _ in range(-(-load.workers // _SEATS))]
    ray.get([process.__ray_ready__.remote() for process in processes])
    with simulated_run(run_dir, settings) as run, simulated_model(settings) as model:
        pool: WorkerPool[ScoresProposals] = WorkerPool(
            lambda slot: Seat(processes[slot // _SEATS], slot), load.workers
        )
        cpu_seconds = time.process_time()
        search_with(run, model, pool, settings)
        cpu_seconds = time.process_time() - cpu_seconds
        spans = [(item.at or 0.0, item.seconds or 0.0) for item in run.all(Feedback)]
    ray.shutdown()
    first, last = min(at - seconds for at, seconds in spans), max(at for at, _ in spans)
    tail = 1.5 * load.score_seconds  # at the end there are fewer scores left than workers
    busy = sum(max(0.0, min(at, last - tail) - (at - seconds)) for at, seconds in spans)
    return {
        "workers": load.workers,
        "score seconds": load.score_seconds,
        "scores": len(spans),
        "busy": busy / (load.workers * (last - tail - first)),
        "driver CPUs": cpu_seconds / (last - first),
        "driver MB": _peak_mb(),
    }


def _measure_journal(load: Load, run_dir: Path) -> dict[str, float]:
    """Write a journal of many proposals; measure resume, status and report."""
    settings = OptimizerSettings(
        macs_cut=0.5, num_proposals=load.proposals, population_size=load.population
    )
    write_journal(run_dir, settings, load)
    resume = f"from load import resume; resume({str(run_dir)!r}, {load.proposals}, "
    resume += f"{load.population})"
    page = run_dir / "page.html"
    weighted = run_dir.with_name("weighted")
    write_weighted_journal(run_dir, weighted)
    figures = {
        **_timed("resume", [resume]),
        **_timed("status", [_STATUS, "status", str(run_dir)]),
        **_timed("status with a capacity_weight", [_STATUS, "status", str(weighted)]),
        **_timed("report", [_REPORT, str(run_dir), str(page)]),
    }
    return {
        "proposals": load.proposals,
        "journal MB": (run_dir / "journal.jsonl").stat().st_size / 1e6,
        **figures,
        "page MB": page.stat().st_size / 1e6,
    }


def write_journal(run_dir: Path, settings: OptimizerSettings, load: Load) -> None:
    """Write the journal of a whole search without Ray, as fast as its masks can be sampled.

    Args:
        run_dir: Where to write it.
        settings: The search.
        load: The workers whose names and times the journal tells.
    """
    model = _model(settings)
    scores = SimulatedWorker(Pace(mean_seconds=0.0, spread=0.0), 0)
    with simulated_run(run_dir, settings) as run:
        waiting = list(model.step([]).proposals)
        run.record(waiting)
        while waiting:
            now, waiting = waiting[:_RECORDED_TOGETHER], waiting[_RECORDED_TOGETHER:]
            feedback = [_dated(scores.score(proposal), load) for proposal in now]
            run.record(feedback)
            step = model.step(feedback)
            run.record([*step.updates, *step.proposals])
            waiting += step.proposals


def write_weighted_journal(run_dir: Path, weighted: Path) -> None:
    """Write a journal again, with parameters of masks and a ``capacity_weight``.

    Args:
        run_dir: Of a search without them.
        weighted: Folder of the new journal.
    """
    weighted.mkdir()
    lines = to_lines(_weighted(fact) for fact in read_journal(run_dir))
    (weighted / JOURNAL).write_bytes(lines)


def _weighted(fact: Fact) -> Fact:
    if isinstance(fact, Started):
        scoring = {"rank_by": "val_loss", "capacity_weight": 0.5}
        settings = fact.identity["settings"] | {"scoring": scoring}
        identity = fact.identity | {"settings": settings}
        return replace(fact, identity=identity, dense_parameters=SIMULATED_SPACE.num_filters)
    if isinstance(fact, Proposal):
        return Proposal(
            proposal_id=fact.proposal_id,
            generation=fact.generation,
            keep=fact.packed,
            macs=fact.macs,
            parameters=int(fact.keep.sum()),
            score_seed=fact.score_seed,
        )
    return fact


def resume(run_dir: str, proposals: int, population: int) -> None:
    """Do what a driver that resumes does before its first score, with the model in this process.

    Args:
        run_dir: The search.
        proposals: Its number of proposals.
        population: Its proposals per generation.
    """
    settings = OptimizerSettings(macs_cut=0.5, num_proposals=proposals, population_size=population)
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=False,
    )
    with simulated_run(run_dir, settings, resume=True) as run, simulated_model(settings) as model:
        pool: Any = WorkerPool(lambda _: None, 0)
        assert search_with(run, model, pool, settings)
    print(json.dumps({"resume MB": _peak_mb()}))


def _model(settings: OptimizerSettings) -> ProbabilityModel:
    return ProbabilityModel(
        SIMULATED_SPACE, np.linspace(1.0, 2.0, SIMULATED_SPACE.num_filters), settings
    )


def _dated(feedback: Feedback, load: Load) -> Feedback:
    """Return feedback as if all workers had scored in step."""
    turn, slot = divmod(feedback.proposal_id, load.workers)
    at = 1.8e9 + (turn + 1) * load.score_seconds
    return replace(feedback, worker=f"{slot}@host:1", at=at, seconds=load.score_seconds)


def _peak_mb() -> float:
    """Return the most memory that this process has held; getrusage counts its parent's as well."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def _timed(name: str, command: list[str]) -> dict[str, float]:
    """Return the seconds of a Python command, and the figures that it prints as JSON."""
    _run(command)
    begin = time.perf_counter()
    done = _run(command)
    seconds = time.perf_counter() - begin
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return {f"{name} seconds": seconds, **(json.loads(lines[-1]) if lines else {})}


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a Python command that keeps the bytecode of what it imports, as usual."""
    return subprocess.run(
        [sys.executable, "-c", *command],
        cwd=Path(__file__).parent,
        env={name: value for name, value in os.environ.items() if name != _NO_BYTECODE},
        capture_output=True,
        text=True,
        check=True,
    )


if __name__ == "__main__":
    run_job(main)
