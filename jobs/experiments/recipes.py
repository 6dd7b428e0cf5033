"""Which recipe is best for fine-tuning a pruned network? Recipes against each other, mask by mask.

    python jobs/experiments/recipes.py --data DIR --network resnet20 --weights FILE \
        --search-val-rows FILE --macs-cut 0.57 --searches runs/a --fine-tune-epochs 6 --workers 2 \
        --cells runs/recipes/resnet20
    fppmo-ray submit jobs/experiments/recipes.py ... --cells /absolute/path

Each fine-tuning is a cell: a file in the work folder ``--cells``. The same command continues a
study that was stopped; the epochs that are running at a stop are finished first. The held-out
images decide which recipe is best; the test images are read once, at the end, and decide nothing.
"""

from __future__ import annotations

import logging
import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

from agreement.masks import Mask, chosen_mask, different_masks
from cells import (
    Cell,
    Measurement,
    Record,
    find,
    folder_under_way,
    measure_missing,
    stopped_by_signal,
)
from fine_tuning import Tuned, Tuner, TuningTask, TuningWorker
from intervals import paired_difference
from rich.console import Console
from rich.table import Table
from trained import Trained, choose_compute, fixed_key, known_compute

from fppmo_ray import Resources, SearchSettings
from fppmo_ray.distribution import Budget
from fppmo_ray.job import require_lasting, run_job
from fppmo_ray.pruning import importance
from fppmo_ray.service.journal.facts import pack_mask
from fppmo_ray.service.pool.worker_pool import worker_pool
from fppmo_ray.service.problem import Problem
from fppmo_ray.service.resources import connection
from fppmo_ray.service.stopping import StopRequest
from fppmo_ray.service.worker import PruningWorker
from fppmo_ray.training import ComputeConfig, Recipe

logger = logging.getLogger(__name__)


DEFAULT = "default"
VARIANTS = (
    DEFAULT,
    "learning-rate=0.02",
    "learning-rate=0.1",
    "distillation-weight=0",
    "distillation-weight=0.9",
    "distillation-temperature=2",
    "distillation-weight=0.9,distillation-temperature=2",
    "schedule=one_cycle",
    "label-smoothing=0.1",
)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is measured; more of each adds to what is there."""

    variants: tuple[str, ...] = VARIANTS
    """Recipes, each written as the settings in which it differs from the recipe of the flags, such
    as ``learning-rate=0.1,distillation-weight=0.5``."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of the fine-tunings."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Selection:
    """What recipes are selected on, and where their cells are kept."""

    problem: Problem
    masks: Sequence[Mask]
    plan: Plan
    cells: Path
    work_dir: Path
    """Absolute."""


def recipe_of(variant: str, default: Recipe) -> Recipe:
    """Return the recipe of a variant.

    Args:
        variant: ``default``, or changed settings such as ``learning-rate=0.1,batch-size=64``.
        default: The recipe whose settings are changed.

    Raises:
        ValueError: the variant names no setting of recipes, or a value that it cannot have.
    """
    parts = [] if variant == DEFAULT else variant.split(",")
    return replace(default, **dict(_change(part, default) for part in parts))


def _change(part: str, default: Recipe) -> tuple[str, Any]:
    """The name and the new value of a setting written as ``SETTING=VALUE``."""
    name, _, value = part.partition("=")
    name = name.replace("-", "_")
    known = [field.name for field in fields(Recipe)]
    if name not in known or not value:
        names = ", ".join(known).replace("_", "-")
        raise ValueError(f"expected {DEFAULT} or SETTING=VALUE of {names}, got {part!r}")
    before = getattr(default, name)
    if isinstance(before, str):
        return name, value
    try:
        return name, int(value) if isinstance(before, int) else float(value)
    except ValueError as error:
        raise ValueError(f"expected a number for {name}, got {value!r}") from error


def look(tuner: Tuner, tuned: Tuned) -> Mapping[str, Any]:
    """Return the figures of a fine-tuned network on held-out and test images, and its epochs.

    Args:
        tuner: The tuner that holds the images.
        tuned: The network after its last epoch.
    """
    held_out = tuner.look_at_held_out(tuned.network)
    return {**held_out, "test": tuner.look(tuned.network, "test"), "epochs": tuned.epochs}


def main(
    trained: Trained,
    settings: SearchSettings,
    resources: Resources,
    plan: Plan,
    *,
    cells: Path,
    searches: tuple[str, ...] = (),
    work_dir: Path | None = None,
) -> None:
    """Measure the cells that are missing, then print the tables.

    Args:
        trained: The network that is pruned, and its data.
        settings: Budget, recipe and compute configuration, as of a search. Settings of scores and
            proposals only play a part in the choice of the compute configuration.
        resources: The workers.
        plan: What is measured.
        cells: Work folder with a file for each fine-tuning.
        searches: Run directories of finished searches for the same cut. The mask that each chose
            is fine-tuned beside the mask of uniform L1, both from ``--weights``.
        work_dir: Folder for the checkpoints of running fine-tunings, which all workers must see;
            by default ``under-way`` inside ``cells``.
    """
    for folder in (cells, work_dir or cells):
        require_lasting(folder)
    if settings.fine_tune.epochs < 1:
        raise ValueError("--fine-tune-epochs must be at least 1: recipes fine-tune")
    for variant in plan.variants:
        recipe_of(variant, settings.fine_tune)  # raises if it is none
    problem = trained.problem(settings, resources)
    selection = Selection(
        problem=problem,
        masks=_masks(problem, searches),
        plan=plan,
        cells=cells,
        work_dir=(work_dir or cells / "under-way").resolve(),
    )
    with connection(resources), stopped_by_signal(cells) as stop:
        compute = _measure_missing(selection, resources, stop)
    found = [find(cells, item.cell) for item in _measurements(selection, compute)]
    tables = recipe_tables([record for record in found if record is not None])
    Console(width=150).print(*tables, sep="\n")


def _masks(problem: Problem, searches: Sequence[str]) -> list[Mask]:
    space, macs_cut = problem.space, problem.settings.only_macs_cut()
    l1, seed = importance(problem.network, problem.tracing, "l1"), problem.settings.seed
    uniform = different_masks(Budget.from_cut(space, macs_cut), {"l1": l1}, 1, seed)
    found = [chosen_mask(run_dir, i, space, macs_cut) for i, run_dir in enumerate(searches)]
    return uniform + found


def _measure_missing(
    selection: Selection, resources: Resources, stop: StopRequest
) -> ComputeConfig:
    """Measure what is missing; return the compute configuration of all cells."""
    compute = _compute(selection, resources, stop)

    def clear(cell: Cell, _: Record) -> None:
        shutil.rmtree(folder_under_way(selection.work_dir, cell), ignore_errors=True)

    with worker_pool(
        TuningWorker,
        selection.problem,
        num_workers=resources.workers,
        demand=resources.demand,
        stop=stop,
    ) as pool:
        measurements = _measurements(selection, compute)
        measure_missing(selection.cells, measurements, pool, on_kept=clear)
    return compute


def _compute(selection: Selection, resources: Resources, stop: StopRequest) -> ComputeConfig:
    """The compute configuration of the cells that are there; else chosen as a search would."""
    problem, cells = selection.problem, selection.cells
    compute = known_compute(problem, cells)
    if compute is not None:
        return compute
    with worker_pool(
        PruningWorker, problem, num_workers=1, demand=resources.demand, stop=stop
    ) as pool:
        return choose_compute(problem, cells, pool, selection.masks[0].keep)


def _measurements(
    selection: Selection, compute: ComputeConfig
) -> Iterator[Measurement[TuningWorker]]:
    """The measurement of every cell, in an order in which an early stop leaves the most."""
    plan, fixed = selection.plan, fixed_key(selection.problem)
    for seed in plan.seeds:
        for variant in plan.variants:
            recipe = recipe_of(variant, selection.problem.settings.fine_tune)
            for number, mask in enumerate(selection.masks):
                key = {
                    **fixed,
                    "compute": asdict(compute),
                    "variant": variant,
                    "recipe": asdict(recipe),
                    "mask": mask.name,
                    "keep": pack_mask(mask.keep),
                    "seed": seed,
                }
                cell = Cell(name=f"{variant}-mask{number}-s{seed}", key=key)
                task = TuningTask(
                    keep=mask.keep,
                    recipe=recipe,
                    seed=seed,
                    compute=compute,
                    folder=folder_under_way(selection.work_dir, cell),
                )
                yield _measurement(cell, task)


def _measurement(cell: Cell, task: TuningTask) -> Measurement[TuningWorker]:
    return Measurement(cell=cell, ask=lambda worker: worker.measure(task, look))


Case = tuple[str, int]
"""A mask's name and a seed."""


LAST_WEIGHTS = "last"


@dataclass(frozen=True, kw_only=True)
class Way:
    """A recipe, and which weights its fine-tuning ends with."""

    variant: str
    """``default``, or the settings in which the recipe differs."""
    weights: str
    """``last``; averaged weights were measured once and are still in the archive."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """The figures of a fine-tuned network."""

    figures: Mapping[str, Any]
    epoch_seconds: Sequence[float]

    @property
    def accuracy(self) -> float:
        """On all held-out images, in %."""
        return 100 * float(self.figures["held_out"]["accuracy"])


Readings = dict[Way, dict[Case, Reading]]


def recipe_tables(records: Sequence[Record]) -> list[Table]:
    """Return one table over all masks and one for each of several masks, the best recipe first.

    Args:
        records: Cells of one study, which need not be complete.
    """
    readings: Readings = defaultdict(dict)
    for record in records:
        way = Way(variant=record.key["variant"], weights=record.key.get("weights", LAST_WEIGHTS))
        readings[way][record.key["mask"], record.key["seed"]] = Reading(
            figures=record.figures,
            epoch_seconds=[epoch["seconds"] for epoch in record.figures["epochs"]],
        )
    masks = list(dict.fromkeys(record.key["mask"] for record in records))
    tables = [_table("all masks", readings)]
    if len(masks) > 1:
        tables += [_table(mask, _of_mask(readings, mask)) for mask in masks]
    return tables


def _of_mask(readings: Readings, mask: str) -> Readings:
    return {
        way: {case: reading for case, reading in of_case.items() if case[0] == mask}
        for way, of_case in readings.items()
    }


def _table(title: str, readings: Readings) -> Table:
    default = Way(variant=DEFAULT, weights=LAST_WEIGHTS)
    table = Table(title=f"{title}: fine-tuned networks on images held out, best first")
    table.add_column("recipe", no_wrap=True)
    table.add_column("weights", no_wrap=True)
    columns = ("n", "accuracy, %", "minus the default [95 %]", "loss", "test accuracy, %")
    for column in (*columns, "s an epoch"):
        table.add_column(column, justify="right", no_wrap="[95 %]" in column)
    there = {way: of_case for way, of_case in readings.items() if of_case}
    means = {way: _mean_accuracy(of_case) for way, of_case in there.items()}
    for way in sorted(there, key=lambda way: -means[way]):
        of_case = there[way]
        seconds = [value for reading in of_case.values() for value in reading.epoch_seconds]
        table.add_row(
            *(way.variant, way.weights, str(len(of_case)), f"{means[way]:.2f}"),
            "" if way == default else _difference(of_case, there.get(default, {})),
            f"{fmean(r.figures['held_out']['loss'] for r in of_case.values()):.4f}",
            f"{100 * fmean(r.figures['test']['accuracy'] for r in of_case.values()):.2f}",
            f"{median(seconds):.1f}",
        )
    return table


def _mean_accuracy(of_case: Mapping[Case, Reading]) -> float:
    return fmean(reading.accuracy for reading in of_case.values())


def _difference(of_case: Mapping[Case, Reading], others: Mapping[Case, Reading]) -> str:
    """Over the masks and seeds that both have."""
    both = sorted(of_case.keys() & others.keys())
    if not both:
        return ""
    pair = ([rows[case].accuracy for case in both] for rows in (of_case, others))
    return str(paired_difference(*pair))


if __name__ == "__main__":
    run_job(main)
