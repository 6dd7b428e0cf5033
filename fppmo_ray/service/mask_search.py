"""The search for a mask: from the dense weights to the choice of a finalist, once or in stages.

Stages prune gradually: an outer loop over whole searches, each on the network that the one before
left. Every stage has a run directory of its own, ``stage-1``, ``stage-2`` ... below the search's.
Between two stages the chosen network is fine-tuned, on the workers and in the journal of the whole
search.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from torch import nn

from fppmo_ray.distribution import (
    BoolArray,
    Budget,
    Feedback,
    Finalist,
    FloatArray,
    Proposal,
    PruningSpace,
)
from fppmo_ray.distribution.logits import uniform_priority
from fppmo_ray.pruning import extract, trace
from fppmo_ray.pruning.scatter import scatter
from fppmo_ray.service.choices import Choice, Found, choose, choose_allocations
from fppmo_ray.service.ddp_training import train_whole
from fppmo_ray.service.dense_network import (
    Context,
    dense_weights,
    log_data,
    measure_filters,
    score_dense,
)
from fppmo_ray.service.journal.artifacts import IMPORTANCE_ONLY
from fppmo_ray.service.journal.facts import Chosen, Fact, Started
from fppmo_ray.service.journal.run_directory import open_run
from fppmo_ray.service.journal.storage import stage_run_dir
from fppmo_ray.service.observation import Listener
from fppmo_ray.service.pool.call import Call
from fppmo_ray.service.pool.worker_pool import worker_pool
from fppmo_ray.service.problem import Problem, started_of
from fppmo_ray.service.progress import watch
from fppmo_ray.service.resources import Resources
from fppmo_ray.service.search_loop import Proposer, running_model, score_proposals
from fppmo_ray.service.settings import SearchSettings, in_stages
from fppmo_ray.service.trainings import Training
from fppmo_ray.service.worker import PruningWorker
from fppmo_ray.service.worker_protocol import (
    SharedWeights,
    TrainingTask,
    Worker,
    load_arrays,
    share_weights,
    to_arrays,
)
from fppmo_ray.training import state_from_bytes


def find_mask(
    context: Context,
    *,
    listeners: Sequence[Listener],
    warm_start: FloatArray | None = None,
) -> Found:
    """Search for a mask of every budget, from where the journal ends.

    Args:
        context: The search, its pool with nothing unfinished.
        listeners: Functions that are told of every score.
        warm_start: Keep-logits ``(num_filters,)`` of an earlier stage to start from; None: the
            importance.

    Raises:
        ValueError: the run directory holds something that cannot be resumed.
        RuntimeError: the search cannot go on: training diverged, all proposals failed.
        SearchStopped: a stop was requested.
    """
    log_data(context)
    weights = dense_weights(context)
    score_dense(context, weights)
    order = measure_filters(context, weights)
    allocations = choose_allocations(context, weights, order)
    settings, space = context.settings.optimizer_settings(), context.problem.space
    with running_model(space, order.importance, settings, warm_start, allocations) as model:
        found = find_mask_with(model, context, weights, listeners=listeners)
        return replace(found, keep_logits=model.keep_logits())


def find_mask_with(
    model: Proposer,
    context: Context,
    weights: SharedWeights,
    *,
    listeners: Sequence[Listener],
) -> Found:
    """Search with any model that proposes masks; see ``find_mask``.

    Args:
        model: Proposes masks and learns from feedback.
        context: The search, its pool with nothing unfinished.
        weights: The dense weights that masks are scored on.
        listeners: Functions that are told of every score.
    """

    def score_call(proposal: Proposal) -> Call[Worker, Feedback]:
        return Call(
            f"proposal {proposal.proposal_id}",
            lambda worker: worker.score(weights.shared, proposal),
        )

    settings, space = context.settings.optimizer_settings(), context.problem.space
    with watch(context.run, settings, settings.merit(space), listeners) as progress:
        score_proposals(model, context.pool, context.run, score_call, progress)
    choices = choose(model.finalists(), context, weights)
    return Found(choices=choices, weights=weights, given=weights, searches=[context.run.facts])


def find_mask_in_stages(
    context: Context, run_dir: Path | str, resources: Resources, listeners: Sequence[Listener]
) -> Found:
    """Search in stages of ascending cuts, from where the journals end.

    Args:
        context: The whole search, its pool with nothing unfinished.
        run_dir: Its run directory; the stages' lie below.
        resources: Workers of every stage.
        listeners: Functions that are told of every score.

    Raises:
        ValueError: a run directory holds something that cannot be resumed.
        RuntimeError: the search cannot go on: training diverged, all proposals failed.
        SearchStopped: a stop was requested.
    """
    space, stages = context.problem.space, in_stages(context.settings)
    given = weights = dense_weights(context)
    importance = measure_filters(context, given).importance
    keep, warm_start = np.ones(space.num_filters, dtype=bool), None
    searches: list[Sequence[Fact]] = []
    for number, settings in enumerate(stages, start=1):
        problem = _stage_problem(context, settings, keep, weights)
        with context.pool.away():
            found = _search_stage(
                problem, context, number, run_dir, resources, listeners, warm_start
            )
        searches += found.searches
        chosen = found.choices[0].chosen
        assert found.keep_logits is not None  # stages are searched by the probability model
        warm_start = found.keep_logits[chosen.keep]
        keep = _within(keep, chosen.keep)
        if number < len(stages):
            weights = _fine_tune(context, number, keep, weights, given)
    choice = Choice(
        chosen=Finalist(name=chosen.name, keep=keep, parameters=chosen.parameters),
        importance_only=_importance_only(space, importance, context.settings.only_macs_cut()),
    )
    if not context.run.all(Chosen):
        context.run.record([Chosen(finalist=chosen.name, keep=keep)])
    return Found(choices=[choice], weights=weights, given=given, searches=searches)


def _stage_problem(
    context: Context, settings: SearchSettings, keep: BoolArray, weights: SharedWeights
) -> Problem:
    """Return the problem of pruning what a mask leaves of the dense network.

    Its widths are limited like those of the dense network: a layer that has lost half of its
    filters may not lose them all in steps of the smallest share.
    """
    whole = context.problem
    dense = copy.deepcopy(whole.network)
    load_arrays(dense, weights.snapshot.arrays)
    network = extract(dense, whole.tracing, keep)
    tracing = trace(network, whole.task.inputs(), ignore=settings.space.ignore)
    space = whole.space.within(keep)
    if not np.array_equal(tracing.space.dense_widths, space.dense_widths):
        raise RuntimeError(
            "the pruned network of a stage has other channel groups than the dense network: "
            f"{_described(tracing.space)} instead of {_described(space)}; search without stages"
        )
    macs_left = (1 - settings.only_macs_cut()) * whole.space.dense_macs
    settings = settings.changed(
        macs_cut=1 - macs_left / space.dense_macs, baseline_epochs=0, autotune=False
    )
    return replace(whole, network=network, tracing=replace(tracing, space=space), settings=settings)


def _search_stage(
    problem: Problem,
    context: Context,
    number: int,
    run_dir: Path | str,
    resources: Resources,
    listeners: Sequence[Listener],
    warm_start: FloatArray | None,
) -> Found:
    [whole] = context.run.all(Started)
    started = started_of(problem, f"{whole.search_id}-stage-{number}", whole.versions)
    with (
        open_run(stage_run_dir(run_dir, number), resume="auto", started=started) as run,
        worker_pool(
            PruningWorker,
            problem,
            num_workers=resources.workers,
            demand=resources.demand,
            limits=resources.time_limits(),
            stop=context.pool.stop,
        ) as pool,
    ):
        stage = replace(context, problem=problem, run=run, pool=pool)
        return find_mask(
            stage,
            listeners=listeners,
            warm_start=warm_start,
        )


def _fine_tune(
    context: Context, number: int, keep: BoolArray, weights: SharedWeights, teacher: SharedWeights
) -> SharedWeights:
    """Fine-tune a stage's network; return its weights in the dense network's shapes, with zeros."""
    settings, problem = context.settings, context.problem
    task = TrainingTask(
        name=f"stage-{number}",
        keep=keep,
        recipe=replace(settings.fine_tune, epochs=settings.gradual.stage_epochs),
        seed=settings.seed,
        compute=context.training_compute,
    )
    training = Training(task=task, weights=weights, teacher=teacher)
    states = train_whole([training], problem, context.pool, context.run)
    smaller: nn.Module = extract(problem.network, problem.tracing, keep)
    smaller.load_state_dict(state_from_bytes(states[task.name]).network)
    dense = copy.deepcopy(problem.network)
    scatter(smaller, dense, problem.tracing, keep)
    return share_weights(to_arrays(dense), context.compute)


def _within(keep: BoolArray, inner: BoolArray) -> BoolArray:
    """Return the mask over all filters of a mask over the filters that ``keep`` leaves."""
    whole = np.zeros_like(keep)
    whole[keep] = inner
    return whole


def _importance_only(space: PruningSpace, importance: FloatArray, macs_cut: float) -> Finalist:
    """Return the mask that importance alone removes in one shot, for the comparison."""
    keep = Budget.from_cut(space, macs_cut).fill(uniform_priority(space, importance))
    parameters = space.parameters(keep) if space.tensor_sizes else 0
    return Finalist(name=IMPORTANCE_ONLY, keep=keep, parameters=parameters)


def _described(space: PruningSpace) -> str:
    return ", ".join(f"{group.name} ({group.num_filters})" for group in space.groups)
