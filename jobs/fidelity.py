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
from dataclasses import asdict
from pathlib import Path

from cells import Cell, Measured, Record, find, keep, measure_missing, worker_pool
from fidelity_cells import Study, Task, done, fixed_key, seconds_left, tasks
from fidelity_masks import CRITERIA, Mask, different_masks, masks_of_search, near_masks
from fidelity_table import Results, tables
from fidelity_worker import Depth, FidelityWorker
from rich.console import Console

from fppmo_ray import Placement, SearchSettings, load_dataset
from fppmo_ray.distribution import BoolArray, Budget
from fppmo_ray.job import require_lasting, run_job
from fppmo_ray.pruning import importance
from fppmo_ray.pruning.engine_trial import EngineTrial
from fppmo_ray.service.connection import connection
from fppmo_ray.service.engine_choice import choose_engine, ways_to_try
from fppmo_ray.service.pool import WorkerPool
from fppmo_ray.service.problem import Problem, state_problem
from fppmo_ray.service.weights import Arrays, digest, to_arrays
from fppmo_ray.service.work import Work
from fppmo_ray.training import Engine, build_network, load_weights, splits_from_files

logger = logging.getLogger(__name__)

_SAY_EVERY_S = 60.0


def main(
    data: Path,
    weights: Path,
    search_val_rows: Path,
    searches: tuple[str, ...],
    results: Path,
    settings: SearchSettings,
    placement: Placement,
    *,
    network: str = "resnet56",
    choose_val_rows: Path | None = None,
    adapted_weights: Path | None = None,
    masks: int = 24,
    steps: tuple[int, ...] = (0, 50, 150, 500),
    compensated_steps: tuple[int, ...] = (0, 50, 150),
    adapted_steps: tuple[int, ...] = (0, 50),
    score_seeds: int = 3,
    truth_seeds: int = 1,
) -> None:
    """Measure what is missing, then print what is there.

    Args:
        data: Folder with CIFAR-10 as parquet files or in torchvision's layout.
        weights: The network's trained weights.
        search_val_rows: .npy file of training rows that the weights have never seen.
        searches: Run directories of finished searches for the same cut: half of the masks are
            taken from there and from around.
        results: Folder that keeps every measurement in a file.
        settings: Budget, recipe, images and engine, as of a search; what is of its proposals, its
            rule, its finalists and its baseline plays no part, nor do --score-steps and
            --compensate but in the choice of the engine. --proposals says of how many scores the
            cost is told, --rank-by which figure of a score counts.
        placement: Where it runs.
        network: Which network is pruned: resnet20, 32, 44, 56 or 110 (``_b``: projection
            shortcuts), or vgg16_bn.
        choose_val_rows: .npy file of further such rows; by default 40 % of the search-val rows.
        adapted_weights: The network's weights fine-tuned under random masks. Scores that begin
            from them are measured too; the truth always begins from --weights.
        masks: How many are judged, half of them near the searches' optimum.
        steps: Fine-tuning steps of scores; 0 recalibrates only.
        compensated_steps: The same for scores with compensation.
        adapted_steps: The same for scores that begin from the adapted weights.
        score_seeds: Repeats of each score, which tell its noise.
        truth_seeds: Fine-tunings of each mask.
    """
    require_lasting(results)
    _require_counts(masks, score_seeds, truth_seeds, settings.recipe.epochs)
    problem = _problem(
        data, network, weights, search_val_rows, choose_val_rows, settings, placement
    )
    adapted = _arrays(problem, adapted_weights)
    chosen = _masks(problem, settings, searches, masks)
    depths = _depths(steps, compensated_steps, adapted_steps if adapted is not None else ())
    with (
        connection(placement),
        worker_pool(FidelityWorker, problem, adapted, placement=placement) as pool,
    ):
        study = Study(
            problem=problem,
            engine=_settled_engine(problem, settings, chosen[0].keep, results, pool),
            adapted_weights=None if adapted is None else digest(adapted),
            masks=chosen,
            depths=depths,
            seed=settings.seed,
            score_seeds=score_seeds,
            truth_seeds=truth_seeds,
            score_timeout=placement.score_timeout,
        )
        todo = tasks(study)
        _measure(study, todo, results, pool, placement.workers)
    console = Console(width=140)
    found = Results(tasks=todo, records=done(results, todo))
    console.print(*tables(found, rank_by=settings.rank_by, proposals=settings.proposals), sep="\n")


def _require_counts(masks: int, score_seeds: int, truth_seeds: int, epochs: int) -> None:
    for name, value, least in (
        ("--masks", masks, 2),
        ("--score-seeds", score_seeds, 1),
        ("--truth-seeds", truth_seeds, 1),
        ("--fine-tune-epochs", epochs, 1),
    ):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")


def _problem(
    data: Path,
    network: str,
    weights: Path,
    search_val: Path,
    choose_val: Path | None,
    settings: SearchSettings,
    placement: Placement,
) -> Problem:
    dataset = load_dataset("cifar10", data)
    dense = build_network(network, dataset.num_classes)
    load_weights(dense, weights)
    splits = splits_from_files(
        dataset.train.labels, search_val=search_val, choose_val=choose_val, seed=settings.seed
    )
    return state_problem(dense, dataset, settings, splits=splits, placement=placement)


def _arrays(problem: Problem, weights: Path | None) -> Arrays | None:
    if weights is None:
        return None
    network = copy.deepcopy(problem.network)
    load_weights(network, weights)
    return to_arrays(network)


def _masks(
    problem: Problem, settings: SearchSettings, searches: Sequence[str], num_masks: int
) -> list[Mask]:
    """Half of the masks very different, half near the optimum of the searches."""
    if not searches:
        raise ValueError("--searches must name at least one run directory of a finished search")
    space = problem.tracing.space
    budget = Budget.from_cut(space, settings.macs_cut)
    importances = {name: importance(problem.network, problem.tracing, name) for name in CRITERIA}
    found = [
        masks_of_search(run_dir, number, space, settings.macs_cut)
        for number, run_dir in enumerate(searches)
    ]
    num_near = num_masks // 2
    different = different_masks(budget, importances, num_masks - num_near, settings.seed)
    return different + near_masks(budget, found, num_near, settings.seed, taken=different)


def _depths(
    steps: Sequence[int], compensated: Sequence[int], adapted: Sequence[int]
) -> list[Depth]:
    return [
        *(Depth(steps=count) for count in steps),
        *(Depth(steps=count, compensate=True) for count in compensated),
        *(Depth(steps=count, weights="adapted") for count in adapted),
    ]


def _settled_engine(
    problem: Problem,
    settings: SearchSettings,
    mask: BoolArray,
    folder: Path,
    pool: WorkerPool,
) -> Engine:
    """The engine that the results were begun with, else the one a search would choose."""
    asked = {"dtype": settings.dtype, "engine": settings.engine, "threads": problem.threads}
    cell = Cell(name="engine", key={**fixed_key(problem), **asked})
    if (record := find(folder, cell)) is None:

        def measure(engine: Engine) -> EngineTrial:
            work = Work(name=f"trial of {engine}", method="try_engine", arguments=(engine, mask))
            trial: EngineTrial
            [trial] = pool.run([work])
            return trial

        begin = time.perf_counter()
        choice = choose_engine(problem.engine, ways_to_try(problem, settings), measure)
        seconds = time.perf_counter() - begin
        record = keep(folder, cell, Measured(figures=asdict(choice), seconds=seconds))
    logger.info("engine  %s", record.figures["why"])
    return Engine(**record.figures["engine"])


def _measure(
    study: Study, todo: Sequence[Task], folder: Path, pool: WorkerPool, workers: int
) -> None:
    records = done(folder, todo)
    say = _progress(study, todo, records, workers)
    say()

    def take(cell: Cell, record: Record) -> None:
        records[cell.name] = record
        say()

    measure_missing(folder, [(task.cell, task.work) for task in todo], pool, on_kept=take)


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
