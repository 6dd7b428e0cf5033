"""Which recipe is best for fine-tuning a pruned network? Recipes against each other, mask by mask.

python jobs/experiments/recipes.py --data DIR --network resnet20 --weights FILE \
        --search-val-rows FILE --macs-cut 0.57 --searches runs/a --fine-tune-epochs 6 --workers 2 \
        --results jobs/results/recipes/resnet20
fppmo-ray submit jobs/experiments/recipes.py ... --results /absolute/path --address http://HEAD:8265

Every fine-tuning is a file in the folder of the results, so the same command goes on where it was
stopped (after the epochs that were running). The images held out decide; the test images are read
once, in the end, and decide nothing.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from agreement.masks import Mask, chosen_mask, different_masks
from both_weights import look_at_both_weights
from cells import (
    Cell,
    Record,
    find,
    folder_under_way,
    measure_missing,
    stopped_by_signal,
)
from fine_tuning import TuningTask, TuningWorker
from recipe_table import recipe_tables
from recipe_variants import VARIANTS, recipe_of
from rich.console import Console
from trained import Trained, choose_compute, fixed_key, known_compute

from fppmo_ray import Placement, SearchSettings
from fppmo_ray.distribution import Budget, pack_mask
from fppmo_ray.job import require_lasting, run_job
from fppmo_ray.pruning import importance
from fppmo_ray.service.connection import connection
from fppmo_ray.service.pool.work import Work
from fppmo_ray.service.pool.worker_pool import worker_pool
from fppmo_ray.service.problem import Problem
from fppmo_ray.service.stopping import StopRequest
from fppmo_ray.service.workers.scoring_worker import ScoringWorker
from fppmo_ray.training import ComputeConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is measured; more of each adds to what is there."""

    variants: tuple[str, ...] = VARIANTS
    """Recipes by the settings in which they differ from that of the flags:
    ``learning-rate=0.1,distillation-weight=0.5``. All average their weights (by 0.99 where they do
    not say), and are read with and without."""
    seeds: tuple[int, ...] = (0,)
    """Of the fine-tunings."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Selection:
    """What recipes are selected on, and where their cells are kept."""

    problem: Problem
    settings: SearchSettings
    masks: Sequence[Mask]
    plan: Plan
    results: Path
    work_dir: Path
    """Absolute."""


def main(
    trained: Trained,
    settings: SearchSettings,
    placement: Placement,
    plan: Plan,
    *,
    results: Path,
    searches: tuple[str, ...] = (),
    work_dir: Path | None = None,
    only_tables: bool = False,
) -> None:
    """Measure what is missing, then print what is there.

    Args:
        trained: Which network is pruned, and on what data.
        settings: Budget, recipe and compute, as of a search; what is of scores and proposals plays
            no part but in the choice of the compute configuration.
        placement: Where it runs.
        plan: What is measured.
        results: Folder that keeps every fine-tuning in a file.
        searches: Run directories of finished searches for the same cut; the mask that each chose
            is fine-tuned beside that of uniform L1, from the same --weights.
        work_dir: Folder for the checkpoints of fine-tunings; all workers must see it. By default
            under-way in the results.
        only_tables: Print what is there and measure nothing; another process may be speed.
    """
    for folder in (results, work_dir or results):
        require_lasting(folder)
    if settings.recipe.epochs < 1:
        raise ValueError("--fine-tune-epochs must be at least 1: recipes are told by what they do")
    for variant in plan.variants:
        recipe_of(variant, settings.recipe)  # refuses what is none
    problem = trained.problem(settings, placement)
    selection = Selection(
        problem=problem,
        settings=settings,
        masks=_masks(problem, settings, searches),
        plan=plan,
        results=results,
        work_dir=(work_dir or results / "under-way").resolve(),
    )
    if not only_tables:
        with connection(placement), stopped_by_signal(results) as stop:
            _measure_missing(selection, placement, stop)
    _print_tables(selection)


def _masks(problem: Problem, settings: SearchSettings, searches: Sequence[str]) -> list[Mask]:
    space, macs_cut = problem.tracing.space, settings.only_macs_cut()
    l1 = importance(problem.network, problem.tracing, "l1")
    uniform = different_masks(Budget.from_cut(space, macs_cut), {"l1": l1}, 1, settings.seed)
    found = [chosen_mask(run_dir, i, space, macs_cut) for i, run_dir in enumerate(searches)]
    return uniform + found


def _measure_missing(selection: Selection, placement: Placement, stop: StopRequest) -> None:
    compute = _compute(selection, placement, stop)

    def clear(cell: Cell, _: Record) -> None:
        shutil.rmtree(folder_under_way(selection.work_dir, cell), ignore_errors=True)

    with worker_pool(
        TuningWorker,
        selection.problem,
        num_workers=placement.workers,
        demand=placement.demand,
        stop=stop,
    ) as pool:
        measure_missing(selection.results, _works(selection, compute), pool, on_kept=clear)


def _compute(selection: Selection, placement: Placement, stop: StopRequest) -> ComputeConfig:
    """The compute configuration of the cells that are there; else chosen as a search would."""
    problem, settings, results = selection.problem, selection.settings, selection.results
    compute = known_compute(problem, settings, results)
    if compute is not None:
        return compute
    with worker_pool(
        ScoringWorker, problem, num_workers=1, demand=placement.demand, stop=stop
    ) as pool:
        return choose_compute(problem, settings, results, pool, selection.masks[0].keep)


def _works(selection: Selection, compute: ComputeConfig) -> Iterator[tuple[Cell, Work]]:
    """Every cell with its work, in an order in which an early stop leaves the most."""
    plan, fixed = selection.plan, fixed_key(selection.problem)
    for seed in plan.seeds:
        for variant in plan.variants:
            recipe = recipe_of(variant, selection.settings.recipe)
            for number, mask in enumerate(selection.masks):
                key = {
                    **fixed,
                    "engine": asdict(compute),
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
                yield (
                    cell,
                    Work(name=cell.name, method="measure", arguments=(task, look_at_both_weights)),
                )


def _print_tables(selection: Selection) -> None:
    settings, results = selection.settings, selection.results
    compute = known_compute(selection.problem, settings, results)
    if compute is None:
        raise ValueError(f"{results} holds no results yet; measure some without --only-tables")
    found = [find(results, cell) for cell, _ in _works(selection, compute)]
    records = [record for record in found if record is not None]
    tables = recipe_tables(records, default_ema_decay=settings.recipe.ema_decay)
    Console(width=150).print(*tables, sep="\n")


if __name__ == "__main__":
    run_job(main)
