"""Which way to search is best? Rules, steps, populations and images per score, on a real network.

    python jobs/experiments/searches.py --data DIR --network resnet20 --weights FILE \
        --search-val-rows FILE --macs-cut 0.57 --workers 2 --results jobs/results/searches/resnet20

Every search runs in a single process and is judged by the masks it ends with, before any
fine-tuning, on images that it has not seen. Each is a file in the folder of the results, so the
same command goes on where it was stopped (after the scores that were running).
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from cells import Cell, Record, find, folder_under_way, measure_missing, stopped_by_signal
from rich.console import Console
from search_table import searches_table
from search_variants import VARIANTS, Way, way_of
from search_worker import SearchTask, SearchWorker
from trained import Trained, choose_compute, fixed_key, known_compute

from fppmo_ray import Placement, SearchSettings
from fppmo_ray.distribution import Budget
from fppmo_ray.job import require_lasting, run_job
from fppmo_ray.service.connection import connection
from fppmo_ray.service.pool.work import Work
from fppmo_ray.service.pool.worker_pool import WorkerPool, worker_pool
from fppmo_ray.service.problem import Problem
from fppmo_ray.training import ComputeConfig

_OF_SEARCHES = (
    *("macs_cut", "min_keep", "width_multiple", "importance"),
    *("proposals", "population", "lag", "rank_by", "score_images", "score_recalibrate_images"),
    *("rescore_images", "rescore_seeds"),
)
"""The settings that a search of this job depends on; recalibrate_images is in every key."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is measured; more of each adds to what is there."""

    variants: tuple[str, ...] = VARIANTS
    """Searches by the settings in which they differ from that of the flags:
    ``population=8,filter-step=1``."""
    seeds: tuple[int, ...] = (0, 1)
    """Of the searches."""


def main(
    trained: Trained,
    settings: SearchSettings,
    placement: Placement,
    plan: Plan,
    *,
    results: Path,
    work_dir: Path | None = None,
    only_tables: bool = False,
) -> None:
    """Measure what is missing, then print what is there.

    Args:
        trained: Which network is pruned, and on what data.
        settings: The default search; what is of fine-tuning plays no part.
        placement: Where it runs.
        plan: What is measured.
        results: Folder that keeps every search in a file.
        work_dir: Folder for the scores of searches under way; all workers must see it. By default
            under-way in the results.
        only_tables: Print what is there and measure nothing; another process may be speed.
    """
    for folder in (results, work_dir or results):
        require_lasting(folder)
    if settings.score_steps or settings.adapt_epochs or settings.stages:
        raise ValueError("searches are compared at --score-steps 0, without adaptation and stages")
    settings.only_macs_cut()  # refuses several
    settings = settings.on(placement.device_type)
    ways = {variant: way_of(variant, settings) for variant in plan.variants}
    problem = trained.problem(settings, placement)
    if not only_tables:
        with (
            connection(placement),
            stopped_by_signal(results) as stop,
            worker_pool(
                SearchWorker,
                problem,
                num_workers=placement.workers,
                demand=placement.demand,
                stop=stop,
            ) as pool,
        ):
            compute = _compute(problem, settings, results, pool)
            folder = (work_dir or results / "under-way").resolve()

            def clear(cell: Cell, _: Record) -> None:
                shutil.rmtree(folder_under_way(folder, cell), ignore_errors=True)

            works = _works(problem, ways, plan, compute, folder)
            measure_missing(results, works, pool, on_kept=clear)
    _print_table(problem, settings, ways, plan, results)


def _compute(
    problem: Problem, settings: SearchSettings, results: Path, pool: WorkerPool
) -> ComputeConfig:
    """The compute configuration of the cells that are there; else chosen as a search would."""
    compute = known_compute(problem, settings, results)
    if compute is not None:
        return compute
    space = problem.tracing.space
    mask = Budget.from_cut(space, settings.only_macs_cut()).fill(np.zeros(space.num_filters))
    return choose_compute(problem, settings, results, pool, mask)


def _works(
    problem: Problem, ways: dict[str, Way], plan: Plan, compute: ComputeConfig, folder: Path
) -> Iterator[tuple[Cell, Work]]:
    """Every cell with its work, seed by seed."""
    fixed = {**fixed_key(problem), "engine": asdict(compute)}
    for seed in plan.seeds:
        for variant, way in ways.items():
            cell = Cell(name=f"{variant}-s{seed}", key={**fixed, **_key(variant, way, seed)})
            task = SearchTask(
                settings=replace(way.settings, seed=seed),
                rule=way.rule,
                compute=compute,
                folder=folder_under_way(folder, cell),
            )
            yield cell, Work(name=cell.name, method="measure", arguments=(task,))


def _key(variant: str, way: Way, seed: int) -> dict[str, Any]:
    weight = way.settings.optimizer_settings().capacity_weight  # 0: as before there was any
    return {
        "variant": variant,
        "rule": {"name": way.settings.rule, **asdict(way.rule)},  # type: ignore[call-overload]
        "search": {name: getattr(way.settings, name) for name in _OF_SEARCHES}
        | ({"capacity_weight": weight} if weight else {}),
        "seed": seed,
    }


def _print_table(
    problem: Problem, settings: SearchSettings, ways: dict[str, Way], plan: Plan, results: Path
) -> None:
    compute = known_compute(problem, settings, results)
    if compute is None:
        raise ValueError(f"{results} holds no results yet; measure some without --only-tables")
    found = (find(results, cell) for cell, _ in _works(problem, ways, plan, compute, results))
    Console(width=150).print(searches_table([record for record in found if record is not None]))


if __name__ == "__main__":
    run_job(main)
