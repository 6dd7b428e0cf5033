"""Does a search that is disturbed end like one that is not? On a cluster of this machine's own.

    python jobs/experiments/chaos.py --seeds 20 --output runs/chaos.csv

Every seed is a search with simulated scores, done twice: undisturbed, and with kills at moments
that the seed draws. Equal means: the same facts in the journal but for workers and times, and the
same finalists.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import ray
from archive import flattened, write_rows
from disturbances import KINDS, Kill, Killer, MortalWorker, plan
from ray.cluster_utils import Cluster
from rich.console import Console
from rich.table import Table

from fppmo_ray.distribution import Finalist, OptimizerSettings
from fppmo_ray.job import run_job
from fppmo_ray.service.journal.fact_lines import fact_to_json
from fppmo_ray.service.journal.facts import pack_mask
from fppmo_ray.service.journal.run_directory import RunDirectory
from fppmo_ray.service.pool.cluster import Demand
from fppmo_ray.service.pool.worker_pool import worker_pool
from fppmo_ray.testing.simulated_search import (
    Pace,
    search_with,
    simulated_model,
    simulated_run,
)

_NODES, _WORKERS_PER_NODE = 3, 2
_SCORE_TIMEOUT_S = 8.0  # by which a suspended worker is noticed
_POPULATION = 16


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How a search ended."""

    facts: list[str]
    """Of the journal, sorted, without what may differ: workers and times."""
    finalists: list[tuple[str, str]]
    requeued: int
    seconds: float
    kills: int


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A seed's search, undisturbed and disturbed."""

    seed: int
    proposals: int
    kills: dict[str, int]
    requeued: int
    """Scores lost with their worker, or taken from it."""
    seconds_undisturbed: float
    seconds: float
    is_equal: bool

    def passed(self, num_kills: int) -> bool:
        """Whether so many kills were done before the last score, and did not matter."""
        return self.is_equal and sum(self.kills.values()) == num_kills


def main(
    seeds: int = 3,
    kills: int = 20,
    proposals: int = 200,
    score_seconds: float = 0.3,
    first_seed: int = 0,
    output: Path | None = None,
) -> None:
    """Disturb searches; end with 1 if one of them does not end like the undisturbed one.

    Args:
        seeds: Searches.
        kills: In each; one of every kind at least, if there are as many.
        proposals: In each.
        score_seconds: Mean duration of a score.
        first_seed: Seed of the first search; the others follow it.
        output: CSV file with a row for each search.
    """
    trials = []
    with _cluster() as cluster, tempfile.TemporaryDirectory() as folder:
        for seed in range(first_seed, first_seed + seeds):
            chaos = Chaos(
                folder=Path(folder) / str(seed),
                settings=OptimizerSettings(
                    macs_cut=0.5, num_proposals=proposals, population_size=_POPULATION, seed=seed
                ),
                pace=Pace(mean_seconds=score_seconds),
                cluster=cluster,
            )
            trials.append(chaos.trial(kills))
            Console(stderr=True).print(trials[-1])
    Console(width=120).print(trials_table(trials))
    if output is not None:
        write_rows(output, [flattened(asdict(trial)) for trial in trials])
    if not all(trial.passed(kills) for trial in trials):
        sys.exit("error: a search was changed by kills, or ended before all were done")


@contextmanager
def _cluster() -> Iterator[Cluster]:
    """A head without room for workers, where driver and model run, and the workers' nodes."""
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}
    )
    try:
        for _ in range(_NODES):
            cluster.add_node(num_cpus=_WORKERS_PER_NODE)
        ray.init(address=cluster.address, log_to_driver=False, configure_logging=False)
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()  # type: ignore[no-untyped-call]


@dataclass(frozen=True, kw_only=True)
class Chaos:
    """The searches of a seed."""

    folder: Path
    settings: OptimizerSettings
    pace: Pace
    cluster: Cluster

    def trial(self, num_kills: int) -> Trial:
        """Search undisturbed, then disturbed."""
        kills = plan(self.settings.seed, num_kills, self.settings.num_proposals)
        calm, wild = self.search("undisturbed", []), self.search("disturbed", kills)
        differences = sorted(set(calm.facts) ^ set(wild.facts))
        if differences:
            print(*differences, sep="\n", file=sys.stderr)
        return Trial(
            seed=self.settings.seed,
            proposals=self.settings.num_proposals,
            kills=dict(Counter(kill.kind for kill in kills[: wild.kills])),
            requeued=wild.requeued,
            seconds_undisturbed=round(calm.seconds, 1),
            seconds=round(wild.seconds, 1),
            is_equal=calm.facts == wild.facts and calm.finalists == wild.finalists,
        )

    def search(self, name: str, kills: Sequence[Kill]) -> Ending:
        """Run a whole search with kills in its course.

        Args:
            name: Name of its folder.
            kills: Kills in order.
        """
        begin = time.monotonic()
        warrants = self.folder / f"{name}-warrants"
        warrants.mkdir(parents=True)
        with (
            simulated_run(self.folder / name, self.settings) as run,
            simulated_model(self.settings) as model,
            worker_pool(
                MortalWorker,
                *(self.pace, warrants),
                num_workers=_NODES * _WORKERS_PER_NODE,
                demand=Demand(cpus=1),
            ) as pool,
        ):
            killer = Killer(self.settings.seed, self.cluster, run, model, warrants)

            def search() -> list[Finalist]:
                return search_with(run, model, pool, self.settings, timeout=_SCORE_TIMEOUT_S)

            with ThreadPoolExecutor(1) as thread:
                searching = thread.submit(search)
                killer.work_off(kills, searching)
            finalists = searching.result()
            return Ending(
                facts=_comparable(run),
                finalists=[(item.name, pack_mask(item.keep)) for item in finalists],
                requeued=pool.num_requeued,
                seconds=time.monotonic() - begin,
                kills=killer.num_done,
            )


def _comparable(run: RunDirectory) -> list[str]:
    may_differ = {"worker", "seconds", "at"}
    rows = [fact_to_json(fact) for fact in run.facts]
    return sorted(
        json.dumps({name: row[name] for name in row.keys() - may_differ}, sort_keys=True)
        for row in rows
    )


def trials_table(trials: Sequence[Trial]) -> Table:
    """Return a row for each search: its kills, and whether it ended like the undisturbed one."""
    columns = "seed", "proposals", *KINDS, "re-queued", "s undisturbed", "s disturbed", "equal"
    table = Table(*columns, title=f"searches on {_NODES} nodes")
    for trial in trials:
        table.add_row(
            str(trial.seed),
            str(trial.proposals),
            *(str(trial.kills.get(kind, 0)) for kind in KINDS),
            str(trial.requeued),
            f"{trial.seconds_undisturbed:.1f}",
            f"{trial.seconds:.1f}",
            "yes" if trial.is_equal else "NO",
        )
    return table


if __name__ == "__main__":
    run_job(main)
