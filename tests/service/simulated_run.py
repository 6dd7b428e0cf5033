"""A search in this process, without Ray: simulated scores and trainings, real everything else."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from simulated_training import PoolHere, SimulatedTrainer, TinyCNN

from fppmo_ray import Resources, SearchSettings, load_dataset
from fppmo_ray.service import mask_search, progress, worker_protocol
from fppmo_ray.service.choices import Found
from fppmo_ray.service.dense_network import Context
from fppmo_ray.service.image_task import image_classification
from fppmo_ray.service.journal.fact_lines import fact_to_json
from fppmo_ray.service.journal.facts import Fact
from fppmo_ray.service.journal.run_directory import RunDirectory, open_run, read_journal
from fppmo_ray.service.mask_search import find_mask, find_mask_in_stages
from fppmo_ray.service.problem import Problem, build_problem, started_of
from fppmo_ray.service.search_loop import ProbabilityModel


def problem_of(settings: SearchSettings) -> Problem:
    """The problem of pruning a tiny network of fixed weights."""
    torch.manual_seed(0)
    return build_problem(TinyCNN(), image_classification(load_dataset("digits")), settings)


@dataclass
class Pools:
    """The pools of a search, the whole search's first, and the problem of each."""

    seed: int
    num_workers: int
    all: list[PoolHere] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    stops: list[Any] = field(default_factory=list)
    warm_starts: list[Any] = field(default_factory=list)

    def make(self, problem: Problem, stop: Any = None) -> PoolHere:
        assert all(pool.is_away for pool in self.all[:1])
        pool = PoolHere(SimulatedTrainer(problem), self.seed, self.num_workers)
        self.all.append(pool)
        self.problems.append(problem)
        self.stops.append(stop)
        return pool

    @property
    def names(self) -> list[list[str]]:
        """The names of each pool's calls, in the order in which they ended."""
        return [pool.names for pool in self.all]


def go_on(
    run_dir: Path, settings: SearchSettings, *, seed: int = 0, num_workers: int = 2
) -> tuple[Found, Pools]:
    """Begin a search, or go on with it, up to its conclusion.

    Args:
        run_dir: Folder of the search.
        settings: What to search for; in stages if it has any.
        seed: Seed of the order in which calls end.
        num_workers: Number of calls that end together at most.
    """
    problem, pools = problem_of(settings), Pools(seed, num_workers)
    started = started_of(problem, "simulated", {})
    with _without_ray(pools), open_run(run_dir, resume="auto", started=started) as run:
        pool: Any = pools.make(problem)
        pool.stop = "the stop of the search"
        context = Context(problem=problem, run=run, pool=pool, compute=problem.compute)
        if settings.gradual.stages:
            return find_mask_in_stages(context, run_dir, Resources(), ()), pools
        return find_mask(context, listeners=()), pools


@contextmanager
def _without_ray(pools: Pools) -> Iterator[None]:
    """Weights stay here, and so do the probability model and the workers of stages."""

    @contextmanager
    def pool_here(kind: Any, problem: Problem, *, stop: Any, **_: Any) -> Iterator[Any]:
        yield pools.make(problem, stop)

    @contextmanager
    def model_here(
        space: Any, importance: Any, settings: Any, warm_start: Any, allocations: Any
    ) -> Iterator[Any]:
        pools.warm_starts.append(warm_start)
        yield ProbabilityModel(space, importance, settings, warm_start, allocations)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker_protocol.ray, "put", lambda value: value)
        patch.setattr(mask_search, "running_model", model_here)
        patch.setattr(mask_search, "worker_pool", pool_here)
        patch.setattr(progress, "metrics_of", lambda search_id: lambda seen: None)
        yield


class Killed(Exception):
    """The driver is gone."""


@contextmanager
def killed_after(num_records: int) -> Iterator[None]:
    """Kill the driver once it has recorded facts so many times, in whatever run directory."""
    record, left = RunDirectory.record, num_records

    def record_or_die(self: RunDirectory, facts: Iterable[Fact]) -> None:
        nonlocal left
        new = list(facts)
        record(self, new)
        left -= bool(new)
        if not left:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunDirectory, "record", record_or_die)
        yield


def told(run_dir: Path) -> list[str]:
    """All that a journal says, whatever the time, the worker, the order and the repetitions."""
    said = set()
    for fact in read_journal(run_dir):
        entries = fact_to_json(fact)
        for name in ("seconds", "at", "worker"):
            entries.pop(name, None)
        said.add(repr(sorted(entries.items())))
    return sorted(said)


def all_of(run_dir: Path, kind: type[Fact]) -> Sequence[Any]:
    """The facts of a kind, in order."""
    return [fact for fact in read_journal(run_dir) if isinstance(fact, kind)]
