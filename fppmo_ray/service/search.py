"""The whole of a search: from a trained network to a smaller one, with a record of how."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from fppmo_ray.pruning.given_network import plain_network
from fppmo_ray.pruning.latency import Clock, name_of
from fppmo_ray.service.callbacks import Callback, ConsoleProgress, called_back
from fppmo_ray.service.compute_choice import choose_compute
from fppmo_ray.service.dense_network import Context
from fppmo_ray.service.finalize import finalize
from fppmo_ray.service.image_task import task_of
from fppmo_ray.service.journal.run_directory import Resume, RunDirectory, open_run
from fppmo_ray.service.mask_search import find_mask, find_mask_in_stages
from fppmo_ray.service.measured_latency import journaled_clock, with_latency
from fppmo_ray.service.observation import Listener
from fppmo_ray.service.pool.worker_pool import worker_pool
from fppmo_ray.service.problem import Problem, build_problem, started_of
from fppmo_ray.service.resources import Resources, connection
from fppmo_ray.service.result import SearchResult
from fppmo_ray.service.search_id import search_id
from fppmo_ray.service.search_loop import count_scored
from fppmo_ray.service.setting_groups import (
    Baseline,
    Calibration,
    Gradual,
    Numerics,
    Sampler,
    Scoring,
    Space,
)
from fppmo_ray.service.settings import SearchSettings
from fppmo_ray.service.stopping import stop_on_signal
from fppmo_ray.service.user_functions import pickled_by_value
from fppmo_ray.service.worker import PruningWorker
from fppmo_ray.training import Recipe, Splits, Transform
from fppmo_ray.versions import package_versions


def search(
    network: nn.Module,
    data: Any,
    *,
    run_dir: Path | str,
    macs_cut: float | tuple[float, ...] = SearchSettings.macs_cut,
    params_cut: float | None = SearchSettings.params_cut,
    latency_cut: float | None = SearchSettings.latency_cut,
    latency_batch: int = SearchSettings.latency_batch,
    latency: Clock | None = None,
    memory_cut: float | None = SearchSettings.memory_cut,
    proposals: int | None = SearchSettings.proposals,
    seed: int = SearchSettings.seed,
    space: Space = SearchSettings.space,
    sampler: Sampler = SearchSettings.sampler,
    scoring: Scoring = SearchSettings.scoring,
    calibration: Calibration = SearchSettings.calibration,
    fine_tune: Recipe = SearchSettings.fine_tune,
    baseline: Baseline = SearchSettings.baseline,
    gradual: Gradual = SearchSettings.gradual,
    numerics: Numerics = SearchSettings.numerics,
    resources: Resources | None = None,
    splits: Splits | None = None,
    transform: Transform | None = None,
    class_names: Sequence[str] | None = None,
    resume: Resume = "auto",
    source: Mapping[str, Any] | None = None,
    callbacks: Sequence[Callback] = (),
) -> SearchResult:
    """Search for the filters to remove from a trained network, remove them, and fine-tune it.

    ``search(network, data, run_dir="runs/mine", macs_cut=0.57)`` removes 57 % of the network's
    multiply-accumulates. The parameters from ``macs_cut`` to ``numerics`` are the fields of
    ``SearchSettings``, which documents each of them.

    Args:
        network: The trained network; it stays unchanged.
        data: Images and classes, whose test part is read once, for the final figures: a data set
            of ``load_dataset``, a folder of images, arrays (images, labels), a torch data set or
            DataLoader, a Hugging Face data set, or a dict of these with ``train``, ``val`` and
            ``test`` (see ``fppmo_ray.training.own_data``). Inputs without labels are pruned by
            comparison with the dense network's answers. Or a task such as ``FunctionTask``, which
            scores and fine-tunes by functions of your own.
        run_dir: Folder for the journal, the checkpoints and the result, or a URI of any pyarrow
            filesystem: ``s3://bucket/path``, ``gs://...``.
        macs_cut: Share of the multiply-accumulates to remove, in (0, 1), or several shares.
        params_cut: Share of the parameters to remove.
        latency_cut: Share of the latency to remove.
        latency_batch: Batch size at which latency is measured.
        latency: The clock of ``latency_cut``: (network) -> milliseconds, for a phone, an inference
            engine or anything else that a worker is not. It is given an extracted network, in eval
            mode on the CPU, on the driver and one at a time, a hundred times or so: the log says
            how often. What it returns is journaled. None: a worker measures its own latency.
        memory_cut: Share of the peak memory of activations to remove.
        proposals: Number of masks to score; None: what suits the start, see ``SearchSettings``.
        seed: Random seed of masks, scores and training, >= 0.
        space: What a mask may remove.
        sampler: How masks are proposed.
        scoring: How masks are scored.
        calibration: The pass over unlabelled images, and what is computed from it.
        fine_tune: How networks are trained.
        baseline: Training of the dense network before it is pruned.
        gradual: Whether and how the network is pruned in several stages.
        numerics: Number formats and kernels.
        resources: How many workers of what size; by default two of one CPU.
        splits: Rows of the training images that the network may train on, and two held-out sets;
            by default 90, 6 and 4 % of every class.
        transform: How images that are no tensors yet become the network's input: that of its
            training, such as ``Transform(mean=..., std=..., image_size=...)``.
        class_names: Names of the classes in the order of the network's outputs.
        resume: ``auto``: resume the search in ``run_dir`` if there is one, else begin it; True:
            there must be one; False: there must be none.
        source: How to construct the dense network, for the saved recipe:
            ``{"constructor": "module:function", "arguments": {...}}``.
        callbacks: Told of the search while it runs, such as ``TensorBoard(folder)``; a bar on the
            terminal is drawn unless a ``ConsoleProgress`` of your own is among them.

    Returns:
        The result, whose network lies in ``run_dir``.

    Raises:
        ValueError: something the caller can mend: settings, data, run directory.
        RuntimeError: the search cannot go on: training diverged, all proposals failed.
        SearchStopped: SIGTERM or SIGINT asked for it; what was running is finished and recorded.
    """
    settings = SearchSettings(
        macs_cut=macs_cut,
        params_cut=params_cut,
        latency_cut=latency_cut,
        latency_batch=latency_batch,
        memory_cut=memory_cut,
        proposals=proposals,
        seed=seed,
        space=space,
        sampler=sampler,
        scoring=scoring,
        calibration=calibration,
        fine_tune=fine_tune,
        baseline=baseline,
        gradual=gradual,
        numerics=numerics,
    )
    return run_search(
        network,
        data,
        settings,
        run_dir=run_dir,
        latency=latency,
        resources=resources,
        splits=splits,
        transform=transform,
        class_names=class_names,
        resume=resume,
        source=source,
        callbacks=callbacks,
    )


def run_search(
    network: nn.Module,
    data: Any,
    settings: SearchSettings,
    *,
    run_dir: Path | str,
    latency: Clock | None = None,
    resources: Resources | None = None,
    splits: Splits | None = None,
    transform: Transform | None = None,
    class_names: Sequence[str] | None = None,
    resume: Resume = "auto",
    source: Mapping[str, Any] | None = None,
    callbacks: Sequence[Callback] = (),
) -> SearchResult:
    """Search with all settings in one record, as jobs hold them; see ``search``.

    Args:
        network: The trained network; it stays unchanged.
        data: Images and classes, or a task of your own.
        settings: What to search for.
        run_dir: Folder or URI for all that the search leaves.
        latency: The clock of ``latency_cut``, as for ``search``.
        resources: How many workers of what size; by default two of one CPU.
        splits: Rows of the training images, as for ``search``.
        transform: How images become inputs, as for ``search``.
        class_names: Names of the classes, as for ``search``.
        resume: Whether to resume a search or to begin one.
        source: How to construct the dense network.
        callbacks: Told of the search, as for ``search``.
    """
    resources = resources or Resources()
    _warn_of_idle_workers(resources.workers, settings.sampler.population)
    network = plain_network(network)
    task = task_of(data, splits, transform=transform, class_names=class_names, seed=settings.seed)
    _check_clock(latency, settings)
    problem = build_problem(network, task, settings, resources=resources)
    problem = replace(problem, clock=None if latency is None else name_of(latency))
    started = started_of(problem, search_id(run_dir), package_versions())
    with open_run(run_dir, resume=resume, started=started) as run:
        if not run.is_finished():
            result = partial(SearchResult, run_dir, network)
            with called_back(_with_console(callbacks), run, result) as listener:
                _search(problem, run, run_dir, resources, source, [listener], latency)
    return SearchResult(run_dir, network)


def _search(
    problem: Problem,
    run: RunDirectory,
    run_dir: Path | str,
    resources: Resources,
    source: Mapping[str, Any] | None,
    listeners: Sequence[Listener],
    clock: Clock | None,
) -> None:
    """Run every phase of a search; each starts from what the journal already holds of it."""

    def how_far() -> str:
        if problem.settings.gradual.stages:
            return "the stages before this one are finished"
        return f"{count_scored(run)} of {problem.settings.num_proposals} proposals are scored"

    with (
        connection(resources),
        pickled_by_value(problem.network, *problem.task.functions()),
        stop_on_signal(how_far) as stop,
        worker_pool(
            PruningWorker,
            problem,
            num_workers=resources.workers,
            demand=resources.demand,
            limits=resources.time_limits(),
            stop=stop,
        ) as pool,
    ):
        compute, training_compute = choose_compute(problem, run, pool)
        read = journaled_clock(clock, problem, run)
        problem = with_latency(problem, run, pool, compute, read)
        context = Context(
            problem=problem,
            run=run,
            pool=pool,
            compute=compute,
            training_compute=training_compute,
            read_clock=read,
        )
        if problem.settings.gradual.stages:
            found = find_mask_in_stages(context, run_dir, resources, listeners)
        else:
            found = find_mask(context, listeners=listeners)
        finalize(context, found, source)


def _check_clock(latency: Clock | None, settings: SearchSettings) -> None:
    """Refuse a clock that nothing asks for, and a batch size that it cannot be told."""
    if latency is None:
        return
    if not callable(latency):
        raise ValueError(f"latency must be a function (network) -> milliseconds, got {latency!r}")
    if settings.latency_cut is None:
        raise ValueError("latency times networks for latency_cut; give latency_cut too")
    if settings.latency_batch != SearchSettings.latency_batch:
        raise ValueError(
            "a latency function chooses its batch itself; leave latency_batch at "
            f"{SearchSettings.latency_batch}, got {settings.latency_batch}"
        )


def _with_console(callbacks: Sequence[Callback]) -> list[Callback]:
    if any(isinstance(callback, ConsoleProgress) for callback in callbacks):
        return list(callbacks)
    return [ConsoleProgress(), *callbacks]


def _warn_of_idle_workers(workers: int, population: int) -> None:
    if workers > population / 2:
        warnings.warn(
            f"{workers} workers will wait for each other at every generation of {population} "
            f"proposals; use at most {population // 2}, or a population of {4 * workers} or more",
            stacklevel=4,
        )
