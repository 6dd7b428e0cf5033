"""Where a search starts: the allocation, with the weight of parameters that scores best."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from fppmo_ray.distribution import BoolArray
from fppmo_ray.distribution.allocation import allocation_masks
from fppmo_ray.pruning import Score
from fppmo_ray.pruning.calibration import FilterOrder
from fppmo_ray.service.dense_weights import Context
from fppmo_ray.service.journal.facts import AllocationChosen
from fppmo_ray.service.pool.call import Call
from fppmo_ray.service.pool.worker_pool import WorkerPool
from fppmo_ray.service.problem import budgets_of
from fppmo_ray.service.worker_protocol import SharedWeights, Worker

logger = logging.getLogger(__name__)

_SEED_STREAM = 2  # seeds [seed, 0, 2]: never those of proposals or finalists


def choose_allocations(
    context: Context, weights: SharedWeights, order: FilterOrder
) -> list[BoolArray] | None:
    """Return the masks that the search starts at, one for each budget.

    Where the settings name several weights of the parameters, the mask of each is scored once on
    search-val, and every budget takes the best.

    Args:
        context: The search, its pool with nothing unfinished.
        weights: The dense weights that masks are scored on.
        order: Importance and error curves of the filters.

    Returns:
        The masks; None where the search starts with equal shares.

    Raises:
        RuntimeError: every allocation of a budget failed.
    """
    settings, space = context.settings, context.problem.space
    if settings.sampler.start != "allocation":
        return None
    budgets = budgets_of(space, settings)
    by_gamma = {
        gamma: allocation_masks(budgets, order.error_curves, order.importance, gamma=gamma)
        for gamma in settings.gammas()
    }
    known = {fact.budget: fact for fact in context.run.all(AllocationChosen)}
    chosen: list[BoolArray] = []
    for number in range(len(budgets)):
        masks = {gamma: masks[number] for gamma, masks in by_gamma.items()}
        if number in known:
            chosen.append(masks[known[number].gamma])
            continue
        gamma, scores = _best(masks, context, weights)
        logger.info("allocation  gamma %g of %s", gamma, ", ".join(f"{each:g}" for each in masks))
        context.run.record([AllocationChosen(budget=number, gamma=gamma, costs=scores)])
        chosen.append(masks[gamma])
    return chosen


def _best(
    masks: dict[float, BoolArray], context: Context, weights: SharedWeights
) -> tuple[float, list[float]]:
    """Return the weight whose mask scores best, and the costs of all that have a score."""
    distinct = {keep.tobytes(): gamma for gamma, keep in reversed(masks.items())}
    if len(distinct) == 1:  # equal masks, or a single weight: there is nothing to choose
        return next(iter(masks)), []
    space = context.problem.space
    merit = context.settings.optimizer_settings().merit(space)
    seed = (context.settings.seed, 0, _SEED_STREAM)
    gammas = sorted(distinct.values())
    calls = [_score_call(masks[gamma], gamma, weights, seed) for gamma in gammas]
    errors = _ended(calls, context.pool)
    costs = {
        gamma: merit.cost(call.value, space.parameters(masks[gamma]))
        for gamma, call, error in zip(gammas, calls, errors, strict=True)
        if error is None
    }
    if not costs:
        raise RuntimeError(f"no allocation could be scored; the first failed with: {errors[0]}")
    return min(costs, key=lambda gamma: costs[gamma]), [round(cost, 6) for cost in costs.values()]


def _ended(calls: Sequence[Call[Worker, Score]], pool: WorkerPool[Worker]) -> list[str | None]:
    """Run the calls, and return the error of each that failed."""
    for call in calls:
        pool.submit(call)
    while pool.num_unfinished:
        pool.next_ended()
    errors = [call.error or call.value.error for call in calls]
    for call, error in zip(calls, errors, strict=True):
        if error is not None:
            logger.warning("%s failed: %s", call.name, error)
    return errors


def _score_call(
    keep: BoolArray,
    gamma: float,
    weights: SharedWeights,
    seed: tuple[int, int, int],
) -> Call[Worker, Score]:
    return Call(
        f"allocation with gamma {gamma:g}",
        lambda worker: worker.rescore(weights.shared, keep, seed, "search_val"),
    )
