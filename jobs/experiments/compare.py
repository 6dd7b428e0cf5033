"""FPPMO against its rivals: same MACs, same data, same fine-tuning, same seeds.

    python jobs/experiments/compare.py --data DIR --network resnet20 --weights FILE \
        --search-val-rows FILE --macs-cut 0.57 --proposals 320 --fine-tune-epochs 6 --workers 2 \
        --cells runs/compare/resnet20 --work-dir runs/compare
    fppmo-ray submit jobs/experiments/compare.py ... --cells /absolute/path \
        --work-dir /absolute/path

Each method and seed is a cell: a file in the work folder ``--cells``. The same command continues a
comparison that was stopped; control-C and ``fppmo-ray stop`` wait for running scores and epochs.
Another ``--macs-cut`` or more ``--methods`` add to the folder; the table shows all of its cells.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar, cast

import ray
from cells import (
    Cell,
    Measurement,
    digest,
    find,
    folder_under_way,
    measure_missing,
    read_all,
    stopped_by_signal,
)
from fine_tuning import TuningTask, TuningWorker
from rich.console import Console
from rivals.fastnas import require_fastnas
from rivals.figure import draw_comparison
from rivals.measurement import cell_of, figures_of, look_before_and_after
from rivals.methods import (
    DENSE,
    FASTNAS,
    FIRST_GROUP,
    FPPMO,
    Case,
    Choice,
    Method,
    control,
    foreign_choice,
    method_of,
    one_shot,
    search_choice,
    settings_of,
)
from rivals.table import comparison_tables

from fppmo_ray import Dataset, Resources, SearchSettings, Splits, load_dataset
from fppmo_ray.distribution import BoolArray
from fppmo_ray.job import require_lasting, run_job
from fppmo_ray.service.compute_choice import choose_compute, is_settled
from fppmo_ray.service.image_task import image_classification
from fppmo_ray.service.journal.facts import unpack_mask
from fppmo_ray.service.journal.run_directory import open_run
from fppmo_ray.service.pool.worker_pool import WorkerPool, worker_pool
from fppmo_ray.service.problem import Problem, build_problem, started_of
from fppmo_ray.service.resources import connection
from fppmo_ray.service.search_id import search_id
from fppmo_ray.service.stopping import StopRequest
from fppmo_ray.service.worker import PruningWorker
from fppmo_ray.service.worker_protocol import Arrays, Worker, to_arrays
from fppmo_ray.training import ComputeConfig, build_network, load_weights, splits_from_files
from fppmo_ray.versions import package_versions

logger = logging.getLogger(__name__)

W = TypeVar("W")

_UNTRAINED = 10_000  # what is added to a seed for weights that nothing was trained from


def main(
    data: Path,
    weights: Path,
    cells: Path,
    work_dir: Path,
    settings: SearchSettings,
    resources: Resources,
    *,
    network: str = "resnet20",
    search_val_rows: Path | None = None,
    choose_val_rows: Path | None = None,
    methods: tuple[str, ...] = FIRST_GROUP,
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4),
) -> None:
    """Measure the cells that are missing, seed by seed; print the table, draw the figure.

    Args:
        data: Folder with CIFAR-10 as parquet files or in torchvision's layout.
        weights: Trained weights of the network, best of one that never saw search-val.
        cells: Work folder with a file for each method and seed.
        work_dir: Folder for journals and checkpoints of what is being measured; all workers must
            see it.
        settings: Of all searches; its seed is not used.
        resources: Where the work runs.
        network: Which network to prune: resnet20, 32, 44, 56 or 110 (``_b``: projection shortcuts),
            or vgg16_bn.
        search_val_rows: .npy file of training rows that the weights have never seen; by default
            10 % of every class.
        choose_val_rows: .npy file of further such rows; by default 40 % of the search-val rows.
        methods: What to compare; ``fppmo@80`` is the search with 80 scores.
        seeds: Of searches, fine-tuning and the choice of choose-val.
    """
    for folder in (cells, work_dir):
        require_lasting(folder)
    _check(settings, seeds)
    wanted = [method_of(text) for text in dict.fromkeys(methods)]
    if any(method.name == FASTNAS for method in wanted):
        require_fastnas()
    comparison = Comparison(
        dataset=load_dataset("cifar10", data),
        network=network,
        weights=weights,
        rows=(search_val_rows, choose_val_rows),
        settings=settings,
        resources=resources,
        cells=cells,
        work_dir=work_dir.resolve(),
    )
    with connection(resources), stopped_by_signal(cells) as stop:
        for seed in seeds:
            comparison.measure(seed, wanted, stop)
    show(cells)


def show(cells: Path) -> None:
    """Print the tables of a folder of cells and draw their figure into it."""
    console = Console(width=None if sys.stdout.isatty() else 170)
    records = list(read_all(cells).values())
    for table in comparison_tables(records):
        console.print(table)
    draw_comparison(records, cells / "comparison.png")


def _check(settings: SearchSettings, seeds: Sequence[int]) -> None:
    if settings.seed:
        raise ValueError(
            f"a comparison has several seeds: give --seeds, not --seed {settings.seed}"
        )
    if settings.baseline.baseline_epochs:
        raise ValueError("a comparison starts from --weights, so --baseline-epochs must be 0")
    if not seeds:
        raise ValueError("a comparison needs at least one seed")
    settings.only_macs_cut()  # refuses several


@dataclass(frozen=True, kw_only=True, eq=False)
class Comparison:
    """A comparison, and where its cells are kept."""

    dataset: Dataset
    network: str
    weights: Path
    rows: tuple[Path | None, Path | None]
    """Files of search-val and choose-val."""
    settings: SearchSettings
    resources: Resources
    cells: Path
    work_dir: Path

    def measure(self, seed: int, methods: Sequence[Method], stop: StopRequest) -> None:
        """Measure a seed's missing cells: first find all masks, then fine-tune side by side.

        Args:
            seed: Seed of search, choice and fine-tuning.
            methods: Methods to measure.
            stop: Request that ends the work.

        Raises:
            SearchStopped: the stop was requested.
        """
        case = self._case(seed, stop)
        wanted = {method: self._cell(case, method) for method in methods}
        missing = {
            method: cell for method, cell in wanted.items() if find(self.cells, cell) is None
        }
        if not missing:
            logger.info("seed %d  all %d cells are there", seed, len(wanted))
            return
        with self._pool(PruningWorker, case.problem, stop) as pool:
            choices = self._choices(case, missing, pool)
        with self._pool(TuningWorker, case.problem, stop) as pool:
            measurements = [
                self._tuning(case, missing[method], choice) for method, choice in choices.items()
            ]
            measure_missing(self.cells, measurements, pool)

    def _pool(
        self, worker: Callable[[Problem, int], W], problem: Problem, stop: StopRequest
    ) -> AbstractContextManager[WorkerPool[W]]:
        workers, demand = self.resources.workers, self.resources.demand
        return worker_pool(worker, problem, num_workers=workers, demand=demand, stop=stop)

    def _case(self, seed: int, stop: StopRequest) -> Case:
        settings = replace(self.settings, seed=seed)
        dense = build_network(self.network, self.dataset.num_classes, seed=seed)
        load_weights(dense, self.weights)
        task = image_classification(self.dataset, self._splits(seed), seed=seed)
        # Rivals choose filters by weights alone, so searches start with equal shares here too.
        problem = build_problem(dense, task, settings, resources=self.resources, calibrates=False)
        return Case(problem=problem, compute=self._compute(problem, stop))

    def _splits(self, seed: int) -> Splits | None:
        search_val, choose_val = self.rows
        if search_val is None:
            return None
        return splits_from_files(
            self.dataset.train.labels, search_val=search_val, choose_val=choose_val, seed=seed
        )

    def _compute(self, problem: Problem, stop: StopRequest) -> ComputeConfig:
        """The compute configuration of the cells that are there; else chosen as a search would."""
        if is_settled(problem.settings):
            return problem.compute
        for record in read_all(self.cells).values():
            return ComputeConfig(**record.key["compute"])
        run_dir = self.work_dir / f"compute-{digest(problem.identity())}"
        started = started_of(problem, search_id(run_dir), package_versions())
        alone = replace(self, resources=replace(self.resources, workers=1))
        with (
            open_run(run_dir, resume="auto", started=started) as run,
            alone._pool(PruningWorker, problem, stop) as pool,
        ):
            return choose_compute(problem, run, pool)[0]

    def _cell(self, case: Case, method: Method) -> Cell:
        return cell_of(case, method, self.network)

    def _choices(
        self, case: Case, missing: Mapping[Method, Cell], pool: WorkerPool[Worker]
    ) -> dict[Method, Choice]:
        """What every method keeps; the dense network comes first, since it trains longest."""
        found: dict[Method, Choice] = {}
        for method, cell in sorted(missing.items(), key=lambda item: item[0].name != DENSE):
            if method.name == DENSE:
                found[method] = Choice(keep=None, weights=case.trained)
            elif method.is_search:
                found[method] = self._search(case, method, pool)
            elif method.name == FASTNAS:
                found[method] = foreign_choice(case, self._folder(cell) / "choice.json")
            elif method.needs_fppmo:
                chosen = self._chosen(case, found, pool)
                found[method] = control(case, method.name, chosen, self._untrained(case))
            else:
                found[method] = one_shot(case, method.name)
        return found

    def _search(self, case: Case, method: Method, pool: WorkerPool[Worker]) -> Choice:
        cell = self._cell(case, method)
        problem = replace(case.problem, settings=settings_of(method, case.settings))
        logger.info("search  %s", cell.name)
        run_dir = self._folder(cell) / "search"
        own_case = replace(case, problem=problem)
        return search_choice(own_case, method.name, pool, run_dir, self.resources)

    def _chosen(
        self, case: Case, found: Mapping[Method, Choice], pool: WorkerPool[Worker]
    ) -> BoolArray:
        """FPPMO's mask: of this run, of its cell, or of a search made for it."""
        method = Method(name=FPPMO)
        if method in found:
            keep = found[method].keep
        elif (record := find(self.cells, self._cell(case, method))) is not None:
            keep = unpack_mask(record.figures["mask"], case.problem.space.num_filters)
        else:
            keep = self._search(case, method, pool).keep
        assert keep is not None  # a search's is a mask
        return keep

    def _untrained(self, case: Case) -> Arrays:
        seed = _UNTRAINED + case.settings.seed
        return to_arrays(build_network(self.network, self.dataset.num_classes, seed=seed))

    def _tuning(self, case: Case, cell: Cell, choice: Choice) -> Measurement[TuningWorker]:
        task = TuningTask(
            keep=choice.keep,
            recipe=case.settings.fine_tune,
            seed=case.settings.seed,
            compute=case.compute,
            folder=self._folder(cell) / "tuning",
        )
        look = partial(look_before_and_after, known=figures_of(case, choice))
        weights = cast(Arrays, ray.put(choice.weights))  # Ray resolves the reference on the worker
        return Measurement(cell=cell, ask=lambda worker: worker.measure(task, look, weights))

    def _folder(self, cell: Cell) -> Path:
        """Of the cell while it is measured; other settings get another one."""
        return folder_under_way(self.work_dir, cell)


if __name__ == "__main__":
    run_job(main)
