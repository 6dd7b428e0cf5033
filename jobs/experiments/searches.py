"""Which way to search is best? Rules, steps, populations and images per score, on a real network.

    python jobs/experiments/searches.py --data DIR --network resnet20 --weights FILE \
        --search-val-rows FILE --macs-cut 0.57 --workers 2 --cells runs/searches/resnet20

Each search runs in a single process. It is judged by the masks that it ends with, before any
fine-tuning, on images that it has not seen. Each search is a cell: a file in the work folder
``--cells``. The same command continues a study that was stopped; the scores that are running at a
stop are finished first.
"""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from cells import (
    Cell,
    Measurement,
    Record,
    find,
    folder_under_way,
    measure_missing,
    stopped_by_signal,
)
from intervals import paired_difference
from rich.console import Console
from rich.table import Table
from search_worker import SearchTask, SearchWorker
from trained import Trained, choose_compute, fixed_key, known_compute

from fppmo_ray import Resources, SearchSettings
from fppmo_ray.distribution import RULES, Budget, UpdateRule
from fppmo_ray.job import require_lasting, run_job
from fppmo_ray.service.pool.worker_pool import WorkerPool, worker_pool
from fppmo_ray.service.problem import Problem
from fppmo_ray.service.resources import connection
from fppmo_ray.training import ComputeConfig

DEFAULT = "default"
_KEYED = (
    *("macs_cut", "min_keep", "multiple", "importance", "proposals", "population", "lag"),
    *("rank_by", "score_images", "score_recalibrate_images", "rescore_images", "rescore_seeds"),
)
"""The settings that the result of a search depends on; recalibrate_images is in every key."""
VARIANTS = (
    DEFAULT,
    "proposals=320",
    "proposals=1280",
    "score-images=2000,score-recalibrate-images=1000,proposals=320",
    "population=8",
    "population=32",
    "lag=0",
    "importance=l1",
    "layer-step=0.35",
    "layer-step=1.4",
    "filter-step=0.25",
    "filter-step=1",
    "sigma=0.6:0.15",
    "temperatures=0.5:0.3",
    "rule=elite",
)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is measured; more of each adds to the cells that are there."""

    variants: tuple[str, ...] = VARIANTS
    """Searches, each written as the settings in which it differs from the search of the flags, such
    as ``population=8,filter-step=1``."""
    seeds: tuple[int, ...] = (0, 1)
    """Seeds of the searches."""


@dataclass(frozen=True, kw_only=True)
class Way:
    """The settings of a search and its update rule."""

    settings: SearchSettings
    rule: UpdateRule
    """The rule that the settings name, perhaps with other steps."""


def way_of(variant: str, default: SearchSettings) -> Way:
    """Return the search of a variant.

    Args:
        variant: ``default``, or changed settings of a search and steps of its rule, such as
            ``population=8,filter-step=1``. The two ends of a range have a colon between them.
        default: The search whose settings are changed.

    Raises:
        ValueError: the variant names no such setting, or a value that the setting cannot have.
    """
    changes = dict(map(_split, variant.split(","))) if variant != DEFAULT else {}
    given = default.flat()
    settings = default.changed(**_values(changes.keys() & given, changes, given))
    rule: Any = RULES[settings.sampler.rule or "layer_es"]
    of_rule = {field.name for field in fields(rule)}
    unknown = changes.keys() - given - of_rule
    if unknown:
        names = ", ".join(sorted(unknown)).replace("_", "-")
        steps = ", ".join(sorted(of_rule)).replace("_", "-")
        raise ValueError(
            f"expected settings of a search or steps of rule {settings.sampler.rule} ({steps}), "
            f"got {names}"
        )
    steps_of_rule = _values(changes.keys() & of_rule, changes, vars(rule))
    return Way(settings=settings, rule=replace(rule, **steps_of_rule))


def _split(part: str) -> tuple[str, str]:
    name, _, value = part.partition("=")
    if not value:
        raise ValueError(f"expected {DEFAULT} or SETTING=VALUE, got {part!r}")
    return name.replace("-", "_"), value


def _values(names: set[str], changes: dict[str, str], given: dict[str, Any]) -> dict[str, Any]:
    return {name: _value(name, changes[name], given[name]) for name in sorted(names)}


def _value(name: str, text: str, before: object) -> Any:
    """The text as a value of the type that the setting has."""
    if isinstance(before, str):
        return text
    try:
        if isinstance(before, tuple):
            return tuple(map(float, text.split(":")))
        return int(text) if isinstance(before, int) else float(text)
    except ValueError as error:
        raise ValueError(f"expected a number for {name}, got {text!r}") from error


def main(
    trained: Trained,
    settings: SearchSettings,
    resources: Resources,
    plan: Plan,
    *,
    cells: Path,
    work_dir: Path | None = None,
) -> None:
    """Measure the searches that are missing, then print the table.

    Args:
        trained: The network that is pruned, and its data.
        settings: The default search. Settings of fine-tuning play no part.
        resources: The workers.
        plan: What is measured.
        cells: Work folder with a file for each search.
        work_dir: Folder for the scores of running searches, which all workers must see; by default
            ``under-way`` inside ``cells``.
    """
    for folder in (cells, work_dir or cells):
        require_lasting(folder)
    if settings.scoring.score_steps or settings.gradual.stages:
        raise ValueError("searches are compared at --score-steps 0 and without --stages")
    settings.only_macs_cut()  # refuses several
    settings = settings.on(resources.device_type, has_images=False)
    ways = {variant: way_of(variant, settings) for variant in plan.variants}
    problem = trained.problem(settings, resources)
    folder = (work_dir or cells / "under-way").resolve()

    def clear(cell: Cell, _: Record) -> None:
        shutil.rmtree(folder_under_way(folder, cell), ignore_errors=True)

    with (
        connection(resources),
        stopped_by_signal(cells) as stop,
        worker_pool(
            SearchWorker,
            problem,
            num_workers=resources.workers,
            demand=resources.demand,
            stop=stop,
        ) as pool,
    ):
        compute = _compute(problem, cells, pool)
        measurements = list(_measurements(problem, ways, plan, compute, folder))
        measure_missing(cells, measurements, pool, on_kept=clear)
    found = (find(cells, item.cell) for item in measurements)
    Console(width=150).print(searches_table([record for record in found if record is not None]))


def _compute(problem: Problem, cells: Path, pool: WorkerPool[SearchWorker]) -> ComputeConfig:
    """The compute configuration of the cells that are there; else chosen as a search would."""
    compute = known_compute(problem, cells)
    if compute is not None:
        return compute
    space, macs_cut = problem.space, problem.settings.only_macs_cut()
    mask = Budget.from_cut(space, macs_cut).fill(np.zeros(space.num_filters))
    return choose_compute(problem, cells, pool, mask)


def _measurements(
    problem: Problem, ways: dict[str, Way], plan: Plan, compute: ComputeConfig, folder: Path
) -> Iterator[Measurement[SearchWorker]]:
    """The measurement of every cell, seed by seed."""
    fixed = {**fixed_key(problem), "compute": asdict(compute)}
    for seed in plan.seeds:
        for variant, way in ways.items():
            cell = Cell(name=f"{variant}-s{seed}", key={**fixed, **_key(variant, way, seed)})
            task = SearchTask(
                settings=replace(way.settings, seed=seed),
                rule=way.rule,
                compute=compute,
                folder=folder_under_way(folder, cell),
            )
            yield _measurement(cell, task)


def _measurement(cell: Cell, task: SearchTask) -> Measurement[SearchWorker]:
    return Measurement(cell=cell, ask=lambda worker: worker.measure(task))


def _key(variant: str, way: Way, seed: int) -> dict[str, Any]:
    settings = way.settings
    search = {name: settings.flat()[name] for name in _KEYED}
    weight = settings.optimizer_settings().capacity_weight
    return {
        "variant": variant,
        "rule": {"name": settings.sampler.rule, **asdict(way.rule)},  # type: ignore[call-overload]
        "search": {**search, "capacity_weight": weight},
        "seed": seed,
    }


_MODE = "mode"


def searches_table(records: Sequence[Record]) -> Table:
    """How good the masks are that each way to search ends with, the best way first.

    Args:
        records: Of one job; there may be more to come.
    """
    rows: dict[str, dict[int, Record]] = defaultdict(dict)
    for record in records:
        rows[record.key["variant"]][record.key["seed"]] = record
    table = Table(title="masks that searches end with, not fine-tuned, on choose-val; best first")
    table.add_column("search", no_wrap=True)
    columns = ("seeds", "scores", "loss of the mode", "minus the default's [95 %]", "accuracy, %")
    for column in (*columns, "averaged mode", "importance-only", "core seconds"):
        table.add_column(column, justify="right", no_wrap="[95 %]" in column)
    for variant in sorted(rows, key=lambda variant: _mean(rows[variant], _MODE, "loss")):
        of_seed = rows[variant]
        table.add_row(
            variant.replace(",", ",\n"),  # a line for each setting, or the figures have no room
            str(len(of_seed)),
            f"{fmean(record.figures['scores'] for record in of_seed.values()):.0f}",
            f"{_mean(of_seed, _MODE, 'loss'):.3f}",
            "" if variant == DEFAULT else _difference(of_seed, rows.get(DEFAULT, {})),
            f"{100 * _mean(of_seed, _MODE, 'accuracy'):.2f}",
            f"{_mean(of_seed, 'averaged mode', 'loss'):.3f}",
            f"{_mean(of_seed, 'importance-only', 'loss'):.3f}",
            f"{fmean(record.seconds for record in of_seed.values()):.0f}",
        )
    return table


def _mean(of_seed: dict[int, Record], finalist: str, measure: str) -> float:
    return fmean(_read(record, finalist, measure) for record in of_seed.values())


def _read(record: Record, finalist: str, measure: str) -> float:
    """Of a finalist; modes that equal another finalist are named by that one."""
    found = record.figures["found"]
    same = found.get(finalist) or found.get(_MODE) or found["importance-only"]
    return float(same[measure])


def _difference(of_seed: dict[int, Record], others: dict[int, Record]) -> str:
    """Of the mode's loss, over the seeds that both have."""
    both = sorted(of_seed.keys() & others.keys())
    if not both:
        return ""
    pair = ([_read(rows[seed], _MODE, "loss") for seed in both] for rows in (of_seed, others))
    return str(paired_difference(*pair))


if __name__ == "__main__":
    run_job(main)
