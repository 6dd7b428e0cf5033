"""The whole of a search: from a trained network to a smaller one, with a record of how."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

from fppmo_ray.distribution import Inheritance
from fppmo_ray.service.adaptation import Adaptations
from fppmo_ray.service.compute_choice import choose_compute
from fppmo_ray.service.conclusion import conclude
from fppmo_ray.service.connection import connection, package_versions
from fppmo_ray.service.finalists import Choice, choose
from fppmo_ray.service.job_client.submission import search_id
from fppmo_ray.service.latency_limit import with_latency
from fppmo_ray.service.model_handle import ModelHandle
from fppmo_ray.service.pool.own_modules import carried
from fppmo_ray.service.pool.worker_pool import worker_pool
from fppmo_ray.service.problem import Problem, Prunable, identity_of, state_problem
from fppmo_ray.service.record.facts import Finished, Started
from fppmo_ray.service.record.run_directory import open_run
from fppmo_ray.service.result import SearchResult
from fppmo_ray.service.rounds import Context, RoundWeights, measure_importance, prepare_round
from fppmo_ray.service.scoring import Proposer, Scoring, score_proposals
from fppmo_ray.service.settings import Placement, SearchSettings
from fppmo_ray.service.stages import Stage, in_one_shot, tune_between
from fppmo_ray.service.stopping import stop_on_signal
from fppmo_ray.service.task import Task, settings_of_task
from fppmo_ray.service.task_problem import TaskProblem, state_task
from fppmo_ray.service.watching.progress import Progress, watch
from fppmo_ray.service.workers.scoring_worker import ScoringWorker
from fppmo_ray.service.workers.task_worker import TaskWorker
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
        network: The trained network; left as it is.
        task: What the network is for: images and classes, whose test part is read once, for the
            final figures; or a ``Task``, which scores and fine-tunes by functions of your own.
        settings: What to search for.
        run_dir: Folder for the journal, the checkpoints and the result, or a URI of any pyarrow
            filesystem: ``s3://bucket/path``, ``gs://...``.
        splits: Rows of the training images that the network may train on, and two held-out sets;
            by default 90, 6 and 4 % of every class.
        placement: How many workers of what size; by default two of one CPU.
        resume: Go on with the search that ``run_dir`` holds; None: or begin it.
        source: How to construct the dense network, for the saved recipe:
            ``{"constructor": "module:function", "arguments": {...}}``.
        console: Where live progress is drawn, if it is a terminal.

    Returns:
        The result, whose network lies in ``run_dir``.

    Raises:
        ValueError: something the caller can mend: settings, data, run directory.
        RuntimeError: the search cannot go on: training diverged, all proposals failed.
        SearchStopped: SIGTERM or SIGINT asked for it, within ``signals_stop_searches`` (as in
            ``run_job``); scores that were running are finished and recorded.
    """
    placement = placement or Placement()
    settings = settings.on(placement.device_type)
    _warn_of_idle_workers(placement.workers, settings.population)
    problem: Problem | TaskProblem
    if isinstance(task, Task):
        if splits is not None:
            raise ValueError("splits are of images; a task knows which data it looks at")
        settings = settings_of_task(settings, task)
        problem = state_task(network, task, settings, placement=placement)
    else:
        problem = state_problem(network, task, settings, splits=splits, placement=placement)
    started = start_of(problem, settings, run_dir)
    with open_run(run_dir, resume=resume, started=started) as run:
        if not run.all(Finished):
            with (
                connection(placement),
                carried(network, *(task.functions() if isinstance(task, Task) else ())),
                stop_on_signal(run, settings.proposals) as stop,
                worker_pool(
                    ScoringWorker if isinstance(problem, Problem) else TaskWorker,
                    problem,
                    num_workers=placement.workers,
                    demand=placement.demand,
                    stop=stop,
                ) as pool,
            ):
                compute = choose_compute(problem, settings, run, pool)
                priced = with_latency(problem, settings, run, pool, compute)
                context = Context(priced, settings, run, pool, compute)
                _run_phases(context, placement.score_timeout, source, console or Console())
    return SearchResult(run_dir, network)


def _run_phases(
    context: Context,
    score_timeout: float | None,
    source: Mapping[str, Any] | None,
    console: Console,
) -> None:
    """Every phase takes up what the journal already holds of it."""
    found = find_mask(context, score_timeout=score_timeout, console=console)
    conclude(
        context,
        found.weights,
        choices=found.choices,
        source=source,
        others=found.others,
        teacher=found.given,
    )


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a search ends with, before anything is fine-tuned."""

    weights: RoundWeights
    """The dense weights that the chosen networks are cut from."""
    others: RoundWeights
    """Those of the networks that they are compared with."""
    given: RoundWeights
    """Those that the search began with."""
    choices: Sequence[Choice]
    """One for every budget, the widest first."""


def find_mask(context: Context, *, score_timeout: float | None, console: Console) -> Found:
    """Search and choose: all of a search but its conclusion, gone on with where the journal ends.

    Args:
        context: Its pool has nothing unfinished.
        score_timeout: Seconds after which a score is taken from its worker; None: learned.
        console: Where live progress is drawn, if it is a terminal.

    Raises:
        ValueError: what the run directory holds cannot be gone on with.
        RuntimeError: the search cannot go on: training diverged, all proposals failed.
        SearchStopped: a stop was requested.
    """
    given = first = prepare_round(context)
    importance = measure_importance(context, given)
    space, inherited = context.problem.tracing.space, None
    *earlier, last = context.settings.stage_settings()
    with watch(context.run, context.settings.optimizer_settings(), console) as progress:
        for number, settings in enumerate(earlier):
            stage = Stage(number=number, settings=settings, given=given, first=first)
            with _model(space, importance, settings, inherited) as model:
                found = _search_stage(model, context, stage, score_timeout, progress)
                keep = found.choices[0].chosen.keep
                inherited = Inheritance(keep=keep, keep_logits=model.keep_logits())
            first = tune_between(context, stage, keep, found.weights)
        stage = Stage(number=len(earlier), settings=last, given=given, first=first)
        with _model(space, importance, last, inherited) as model:
            found = _search_stage(model, context, stage, score_timeout, progress)
    if not earlier:
        return found
    # Gradual pruning is compared with what needs no search, and none of its training.
    one_shot = in_one_shot(space, importance, context.settings.only_macs_cut())
    choices = [replace(choice, importance_only=one_shot) for choice in found.choices]
    return replace(found, choices=choices, others=given)


@contextmanager
def _model(*arguments: Any) -> Iterator[ModelHandle]:
    model = ModelHandle(*arguments)
    try:
        yield model
    finally:
        model.close()


def find_mask_with(
    model: Proposer,
    context: Context,
    weights: RoundWeights,
    score_timeout: float | None,
    console: Console,
) -> Found:
    """Search in one stage with whatever proposes masks; see ``find_mask``."""
    settings = context.settings.optimizer_settings()
    stage = Stage(number=0, settings=settings, given=weights, first=weights)
    with watch(context.run, settings, console) as progress:
        return _search_stage(model, context, stage, score_timeout, progress)


def _search_stage(
    model: Proposer,
    context: Context,
    stage: Stage,
    score_timeout: float | None,
    progress: Progress,
) -> Found:
    settings, first = context.settings, stage.first
    scoring = Scoring(
        round=first.round,
        weights=first.reference,
        rung=settings.score_steps,
        timeout=score_timeout,
        stage=stage.number,
        ids=stage.ids,
    )
    rounds = Adaptations(context, first, scoring, teacher=stage.given.reference)
    score_proposals(model, context.pool, context.run, scoring, progress, rounds)
    latest = rounds.latest()
    scoring = replace(scoring, round=latest.round, weights=latest.reference)
    choices = choose(
        model.finalists(),
        context.pool,
        context.run,
        settings,
        scoring,
        context.problem.tracing.space,
    )
    weights = latest if settings.tune_from == "adapted" else first
    return Found(weights=weights, others=weights, given=stage.given, choices=choices)


def _warn_of_idle_workers(workers: int, population: int) -> None:
    if workers > population / 2:
        warnings.warn(
            f"{workers} workers will wait for each other at every generation of {population} "
            f"proposals; use at most {population // 2}, or a population of {4 * workers} or more",
            stacklevel=3,
        )


def start_of(problem: Prunable, settings: SearchSettings, run_dir: Path | str) -> Started:
    """Return the first fact of a search's journal, with a new id.

    Args:
        problem: What is pruned.
        settings: The search's settings.
        run_dir: The search's run directory, from which its id may be derived.
    """
    space = problem.tracing.space
    return Started(
        search_id=search_id(run_dir),
        identity=identity_of(problem, settings),
        versions=package_versions(),
        groups=[group.name for group in space.groups],
        dense_macs=space.dense_macs,
    )
