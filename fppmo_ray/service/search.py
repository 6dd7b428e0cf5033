"""The whole of a search: from a trained network to a smaller one, with a record of how."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

from fppmo_ray.service.connection import connection, package_versions
from fppmo_ray.service.dense_weights import Context
from fppmo_ray.service.finalize import finalize
from fppmo_ray.service.image_task import image_classification
from fppmo_ray.service.job_client.submission import search_id
from fppmo_ray.service.journal.run_directory import RunDirectory, open_run
from fppmo_ray.service.mask_search import find_mask
from fppmo_ray.service.measurements import choose_compute, with_latency
from fppmo_ray.service.pool.pickle_by_value import pickled_by_value
from fppmo_ray.service.pool.worker_pool import worker_pool
from fppmo_ray.service.problem import Problem, build_problem, started_of
from fppmo_ray.service.result import SearchResult
from fppmo_ray.service.search_loop import count_scored
from fppmo_ray.service.settings import Placement, SearchSettings
from fppmo_ray.service.stages import find_mask_in_stages
from fppmo_ray.service.stopping import stop_on_signal
from fppmo_ray.service.task import Task
from fppmo_ray.service.worker import PruningWorker
from fppmo_ray.training import Dataset, Splits


def search(
    network: nn.Module,
    task: Dataset | Task,
    settings: SearchSettings,
    *,
    run_dir: Path | str,
    splits: Splits | None = None,
    placement: Placement | None = None,
    resume: bool | None = False,
    source: Mapping[str, Any] | None = None,
    console: Console | None = None,
) -> SearchResult:
    """Search for the filters to remove from a trained network, remove them, and fine-tune it.

    Args:
        network: The trained network; it stays unchanged.
        task: What the network is for: images and classes, whose test part is read once, for the
            final figures; or a task such as ``FunctionTask``, which scores and fine-tunes by
            functions of your own.
        settings: What to search for.
        run_dir: Folder for the journal, the checkpoints and the result, or a URI of any pyarrow
            filesystem: ``s3://bucket/path``, ``gs://...``.
        splits: Rows of the training images that the network may train on, and two held-out sets;
            by default 90, 6 and 4 % of every class.
        placement: How many workers of what size; by default two of one CPU.
        resume: True: resume the search in ``run_dir``; False: begin one; None: resume it if there
            is one, else begin.
        source: How to construct the dense network, for the saved recipe:
            ``{"constructor": "module:function", "arguments": {...}}``.
        console: Where live progress is drawn, if it is a terminal.

    Returns:
        The result, whose network lies in ``run_dir``.

    Raises:
        ValueError: something the caller can mend: settings, data, run directory.
        RuntimeError: the search cannot go on: training diverged, all proposals failed.
        SearchStopped: SIGTERM or SIGINT asked for it; what was running is finished and recorded.
    """
    placement = placement or Placement()
    _warn_of_idle_workers(placement.workers, settings.population)
    task = _task_of(task, splits, settings.seed)
    problem = build_problem(network, task, settings, placement=placement)
    started = started_of(problem, search_id(run_dir), package_versions())
    with open_run(run_dir, resume=resume, started=started) as run:
        if not run.is_finished():
            _search(problem, run, run_dir, placement, source, console or Console())
    return SearchResult(run_dir, network)


def _search(
    problem: Problem,
    run: RunDirectory,
    run_dir: Path | str,
    placement: Placement,
    source: Mapping[str, Any] | None,
    console: Console,
) -> None:
    """Run every phase of a search; each starts from what the journal already holds of it."""

    def how_far() -> str:
        if problem.settings.stages:
            return "the stages before this one are finished"
        return f"{count_scored(run)} of {problem.settings.proposals} proposals are scored"

    with (
        connection(placement),
        pickled_by_value(problem.network, *problem.task.functions()),
        stop_on_signal(how_far) as stop,
        worker_pool(
            PruningWorker,
            problem,
            num_workers=placement.workers,
            demand=placement.demand,
            limits=placement.time_limits(),
            stop=stop,
        ) as pool,
    ):
        compute, training_compute = choose_compute(problem, run, pool)
        problem = with_latency(problem, run, pool, compute)
        context = Context(
            problem=problem,
            run=run,
            pool=pool,
            compute=compute,
            training_compute=training_compute,
        )
        if problem.settings.stages:
            found = find_mask_in_stages(context, run_dir, placement, console)
        else:
            found = find_mask(context, console=console)
        finalize(context, found, source)


def _task_of(task: Dataset | Task, splits: Splits | None, seed: int) -> Task:
    if isinstance(task, Dataset):
        return image_classification(task, splits, seed=seed)
    if splits is not None:
        raise ValueError("splits divide a data set; a task chooses the data it looks at itself")
    return task


def _warn_of_idle_workers(workers: int, population: int) -> None:
    if workers > population / 2:
        warnings.warn(
            f"{workers} workers will wait for each other at every generation of {population} "
            f"proposals; use at most {population // 2}, or a population of {4 * workers} or more",
            stacklevel=3,
        )
