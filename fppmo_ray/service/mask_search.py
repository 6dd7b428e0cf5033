"""The search for a mask: dense weights, importance, propose-score-tell, choice of a finalist."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fppmo_ray.distribution import Feedback, FloatArray, Proposal
from fppmo_ray.service.allocations import choose_allocations
from fppmo_ray.service.dense_weights import Context, dense_weights, measure_filters
from fppmo_ray.service.finalists import Found, choose
from fppmo_ray.service.first_lines import log_data, score_dense
from fppmo_ray.service.pool.call import Call
from fppmo_ray.service.probability_model import Proposer, running_model
from fppmo_ray.service.progress.display import watch
from fppmo_ray.service.progress.observation import Listener
from fppmo_ray.service.search_loop import score_proposals
from fppmo_ray.service.worker_protocol import SharedWeights, Worker


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
