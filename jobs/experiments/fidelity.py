"""Which score is right? Scores of every depth against long fine-tuning, mask by mask.

    python jobs/experiments/fidelity.py --data DIR --network resnet20 --weights FILE \
        --search-val-rows FILE --macs-cut 0.57 --searches runs/a runs/b --fine-tune-epochs 6 \
        --workers 2 --cells runs/fidelity/resnet20
    fppmo-ray submit jobs/experiments/fidelity.py ... --cells /absolute/path

Each score and each fine-tuning is a cell: a file in the work folder ``--cells``. The same command
continues a study that was stopped; the scores and epochs that are running at a stop are finished
first. At the end the tables of the cells are printed.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from agreement.masks import (
    CRITERIA,
    Mask,
    different_masks,
    masks_from_json,
    masks_of_search,
    masks_to_json,
    near_masks,
)
from agreement.study import Plan, Study, Task, done, seconds_left, tasks
from agreement.table import agreement_tables
from agreement.worker import FidelityWorker
from cells import (
    Cell,
    Measured,
    Record,
    find,
    folder_under_way,
    keep,
    measure_missing,
    stopped_by_signal,
)
from rich.console import Console
from trained import Trained, choose_compute, fixed_key, known_compute

from fppmo_ray import Resources, SearchSettings
from fppmo_ray.distribution import Budget
from fppmo_ray.job import require_lasting, run_job
from fppmo_ray.pruning import importance
from fppmo_ray.service.pool.worker_pool import worker_pool
from fppmo_ray.service.problem import Problem
from fppmo_ray.service.resources import connection

logger = logging.getLogger(__name__)

_SAY_EVERY_S = 60.0


def main(
    trained: Trained,
    settings: SearchSettings,
    resources: Resources,
    plan: Plan,
    *,
    searches: tuple[str, ...] = (),
    cells: Path,
    work_dir: Path | None = None,
) -> None:
    """Measure the cells that are missing, then print the tables.

    Args:
        trained: The network that is pruned, and its data.
        settings: Budget, recipe, images and compute configuration, as of a search. Settings of
            proposals, rule, finalists and baseline play no part. ``--proposals`` is the number of
            scores whose cost is printed; ``--rank-by`` is the figure of a score that is judged.
        resources: The workers.
        plan: How much is measured.
        searches: Run directories of finished searches for the same cut. Half of the masks are
            taken from these searches and from their neighbourhood. The cells keep the masks, so a
            study that has begun needs no searches.
        cells: Work folder with a file for each measurement.
        work_dir: Folder for the checkpoints of running fine-tunings, which all workers must see;
            by default ``under-way`` inside ``cells``.
    """
    for folder in (cells, work_dir or cells):
        require_lasting(folder)
    if settings.fine_tune.epochs < 1:
        raise ValueError("--fine-tune-epochs must be at least 1: the truth is a fine-tuned network")
    settings.only_macs_cut()  # refuses several
    problem = trained.problem(settings, resources)
    study = Study(
        problem=problem,
        compute=known_compute(problem, cells),
        masks=_masks(problem, searches, plan.masks, cells),
        plan=plan,
        seed=settings.seed,
        score_timeout=resources.score_timeout,
        work_dir=(work_dir or cells / "under-way").resolve(),
    )
    study = _measure_missing(study, resources, cells)
    shown = agreement_tables(
        list(done(cells, tasks(study)).values()),
        rank_by=settings.scoring.rank_by,
        proposals=settings.num_proposals,
        capacity_weight=settings.optimizer_settings().capacity_weight,
    )
    Console(width=140).print(*shown, sep="\n")


def _masks(problem: Problem, searches: Sequence[str], num_masks: int, folder: Path) -> list[Mask]:
    """The masks of the given searches, or those that the cells were begun with."""
    settings = problem.settings
    key = {"macs_cut": settings.only_macs_cut(), "seed": settings.seed, **fixed_key(problem)}
    cell = Cell(name="masks", key=key)
    record = find(folder, cell)
    known = [] if record is None else record.figures["masks"]
    if searches:
        masks = _masks_of(problem, searches, num_masks)
        new = masks_to_json(masks)
        if not all(item in new for item in known) and not all(item in known for item in new):
            raise ValueError(
                f"{folder} was begun with the masks of other searches; give it none to go on with "
                "those, or choose another --cells folder"
            )
        if len(new) > len(known):
            keep(folder, cell, Measured(figures={"masks": new}, seconds=0.0))
        return masks
    if not known:
        raise ValueError("--searches must name at least one run directory of a finished search")
    return masks_from_json(known, num_masks, problem.tracing.space.num_filters)


def _masks_of(problem: Problem, searches: Sequence[str], num_masks: int) -> list[Mask]:
    """Half of the masks very different, half near the optimum of the searches."""
    space, settings = problem.space, problem.settings
    budget = Budget.from_cut(space, settings.only_macs_cut())
    importances = {name: importance(problem.network, problem.tracing, name) for name in CRITERIA}
    found = [
        masks_of_search(run_dir, number, space, settings.only_macs_cut())
        for number, run_dir in enumerate(searches)
    ]
    num_near = num_masks // 2
    different = different_masks(budget, importances, num_masks - num_near, settings.seed)
    return different + near_masks(budget, found, num_near, settings.seed, taken=different)


def _measure_missing(study: Study, resources: Resources, folder: Path) -> Study:
    """Do what is missing; the study with the compute configuration that it was done with."""
    with (
        connection(resources),
        stopped_by_signal(folder) as stop,
        worker_pool(
            FidelityWorker,
            study.problem,
            num_workers=resources.workers,
            demand=resources.demand,
            stop=stop,
        ) as pool,
    ):
        if study.compute is None:
            mask = study.masks[0].keep
            compute = choose_compute(study.problem, folder, pool, mask)
            study = replace(study, compute=compute)
        todo = tasks(study)
        records = done(folder, todo)
        say = _progress(study, todo, records, resources.workers)
        say()

        def take(cell: Cell, record: Record) -> None:
            records[cell.name] = record
            shutil.rmtree(folder_under_way(study.work_dir, cell), ignore_errors=True)
            say()

        measure_missing(folder, [task.measurement for task in todo], pool, on_kept=take)
    return study


def _progress(
    study: Study, todo: Sequence[Task], records: dict[str, Record], workers: int
) -> Callable[[], None]:
    """Says from time to time what is left."""
    last = float("-inf")

    def say() -> None:
        nonlocal last
        seconds = seconds_left(study, todo, records)
        if seconds is None or time.monotonic() < last + _SAY_EVERY_S:
            return
        last = time.monotonic()
        left = len(todo) - len(records)
        logger.info("%d of %d cells left, about %.0f s", left, len(todo), seconds / workers)

    return say


if __name__ == "__main__":
    run_job(main)
