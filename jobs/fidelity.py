"""Which score is right? Scores of every depth against long fine-tuning, mask by mask.

python jobs/fidelity.py --data DIR --network resnet20 --weights FILE --search-val-rows FILE \
        --macs-cut 0.57 --searches runs/a runs/b --fine-tune-epochs 6 --workers 2 \
        --results jobs/results/fidelity/resnet20
ray job submit --working-dir . -- python jobs/fidelity.py ... --results /absolute/path

Every score and every fine-tuning is a file in the folder of the results, so the same command goes
on where it was stopped. In the end it prints the tables of what is there.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from cells import Cell, Measured, Record, find, keep, measure_missing
from judging.masks import CRITERIA, Mask, different_masks, masks_of_search, near_masks
from judging.study import Plan, Study, Task, done, fixed_key, seconds_left, tasks
from judging.table import Results, tables
from judging.worker import FidelityWorker
from rich.console import Console
from torch import nn

from fppmo_ray import Placement, SearchSettings, load_dataset
from fppmo_ray.distribution import Budget
from fppmo_ray.job import require_lasting, run_job
from fppmo_ray.pruning import importance
from fppmo_ray.service.connection import connection
from fppmo_ray.service.engine_choice import choose_engine, trials_on, ways_to_try
from fppmo_ray.service.pool import WorkerPool, worker_pool
from fppmo_ray.service.problem import Problem, state_problem
from fppmo_ray.service.weights import Arrays, digest, to_arrays
from fppmo_ray.training import Engine, build_network, load_weights, splits_from_files

logger = logging.getLogger(__name__)

_SAY_EVERY_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A trained network and its data."""

    data: Path
    """Folder with CIFAR-10 as parquet files or in torchvision's layout."""
    weights: Path
    """The network's trained weights."""
    search_val_rows: Path
    """.npy file of training rows that the weights have never seen."""
    choose_val_rows: Path | None = None
    """.npy file of further such rows; by default 40 % of the search-val rows."""
    network: str = "resnet56"
    """Which network is pruned: resnet20, 32, 44, 56 or 110 (``_b``: projection shortcuts), or
    vgg16_bn."""
    adapted_weights: Path | None = None
    """The network's weights fine-tuned under random masks. Scores that begin from them are
    measured too; the truth always begins from --weights."""

    def problem(self, settings: SearchSettings, placement: Placement) -> Problem:
        """What workers are given."""
        dataset = load_dataset("cifar10", self.data)
        dense = build_network(self.network, dataset.num_classes)
        load_weights(dense, self.weights)
        splits = splits_from_files(
            dataset.train.labels,
            search_val=self.search_val_rows,
            choose_val=self.choose_val_rows,
            seed=settings.seed,
        )
        return state_problem(dense, dataset, settings, splits=splits, placement=placement)

    def adapted(self, network: nn.Module) -> Arrays | None:
        """The adapted weights of the network, which is left as it is."""
        if self.adapted_weights is None:
            return None
        network = copy.deepcopy(network)
        load_weights(network, self.adapted_weights)
        return to_arrays(network)


def main(
    trained: Trained,
    settings: SearchSettings,
    placement: Placement,
    plan: Plan,
    *,
    searches: tuple[str, ...],
    results: Path,
    only_tables: bool = False,
) -> None:
    """Measure what is missing, then print what is there.

    Args:
        trained: Which network is pruned, and on what data.
        settings: Budget, recipe, images and engine, as of a search; what is of its proposals, its
            rule, its finalists and its baseline plays no part, nor do --score-steps and
            --compensate but in the choice of the engine. --proposals says of how many scores the
            cost is told, --rank-by which figure of a score counts.
        placement: Where it runs.
        plan: How much is measured.
        searches: Run directories of finished searches for the same cut: half of the masks are
            taken from there and from around.
        results: Folder that keeps every measurement in a file.
        only_tables: Print what is there and measure nothing; another process may be measuring.
    """
    require_lasting(results)
    if settings.recipe.epochs < 1:
        raise ValueError("--fine-tune-epochs must be at least 1: the truth is a fine-tuned network")
    settings.only_macs_cut()  # refuses several
    problem = trained.problem(settings, placement)
    adapted = trained.adapted(problem.network)
    study = Study(
        problem=problem,
        engine=_known_engine(problem, settings, results),
        adapted_weights=None if adapted is None else digest(adapted),
        masks=_masks(problem, settings, searches, plan.masks),
        plan=plan,
        seed=settings.seed,
        score_timeout=placement.score_timeout,
    )
    if not only_tables:
        study = _measure_missing(study, adapted, settings, placement, results)
    _print_tables(study, settings, results)


def _masks(
    problem: Problem, settings: SearchSettings, searches: Sequence[str], num_masks: int
) -> list[Mask]:
    """Half of the masks very different, half near the optimum of the searches."""
    if not searches:
        raise ValueError("--searches must name at least one run directory of a finished search")
    space = problem.tracing.space
    budget = Budget.from_cut(space, settings.only_macs_cut())
    importances = {name: importance(problem.network, problem.tracing, name) for name in CRITERIA}
    found = [
        masks_of_search(run_dir, number, space, settings.only_macs_cut())
        for number, run_dir in enumerate(searches)
    ]
    num_near = num_masks // 2
    different = different_masks(budget, importances, num_masks - num_near, settings.seed)
    return different + near_masks(budget, found, num_near, settings.seed, taken=different)


def _engine_cell(problem: Problem, settings: SearchSettings) -> Cell:
    asked = {"dtype": settings.dtype, "engine": settings.engine, "threads": problem.threads}
    return Cell(name="engine", key={**fixed_key(problem), **asked})


def _known_engine(problem: Problem, settings: SearchSettings, folder: Path) -> Engine | None:
    """The engine that the results were begun with."""
    record = find(folder, _engine_cell(problem, settings))
    return None if record is None else Engine(**record.figures["engine"])


def _choose_engine(
    study: Study, settings: SearchSettings, folder: Path, pool: WorkerPool
) -> Engine:
    """The engine that a search would choose, kept for all that follows."""
    problem, measure = study.problem, trials_on(pool, study.masks[0].keep)
    begin = time.perf_counter()
    choice = choose_engine(problem.engine, ways_to_try(problem, settings), measure)
    measured = Measured(figures=asdict(choice), seconds=time.perf_counter() - begin)
    keep(folder, _engine_cell(problem, settings), measured)
    logger.info("engine  %s", choice.why)
    return Engine(**choice.engine)


def _measure_missing(
    study: Study,
    adapted: Arrays | None,
    settings: SearchSettings,
    placement: Placement,
    folder: Path,
) -> Study:
    """Do what is missing; the study with the engine that it was done with."""
    with (
        connection(placement),
        worker_pool(
            FidelityWorker,
            study.problem,
            adapted,
            num_workers=placement.workers,
            demand=placement.demand,
        ) as pool,
    ):
        if study.engine is None:
            study = replace(study, engine=_choose_engine(study, settings, folder, pool))
        todo = tasks(study)
        records = done(folder, todo)
        say = _progress(study, todo, records, placement.workers)
        say()

        def take(cell: Cell, record: Record) -> None:
            records[cell.name] = record
            say()

        measure_missing(folder, [(task.cell, task.work) for task in todo], pool, on_kept=take)
    return study


def _print_tables(study: Study, settings: SearchSettings, folder: Path) -> None:
    if study.engine is None:
        raise ValueError(f"{folder} holds no results yet; measure some without --only-tables")
    todo = tasks(study)
    found = Results(tasks=todo, records=done(folder, todo))
    shown = tables(found, rank_by=settings.rank_by, proposals=settings.proposals)
    Console(width=140).print(*shown, sep="\n")


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
