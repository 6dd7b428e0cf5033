"""Keep-logits: the state of the probability model, one number per filter.

A filter's keep-logit is ``b[layer] + z + delta - tau``: an offset of its layer, its standardised
log-importance, and the sum of the feedback's moves, minus a shift at which the expected costs meet
the budget. Update rules move the sum of b and delta; this module starts the logits and solves for
tau.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fppmo_ray.distribution.budget import Budget
from fppmo_ray.distribution.space import BoolArray, FloatArray, IntArray, PruningSpace

MARGIN = 0.02
"""Least distance of a probability from 0 and 1, so that no filter is ever decided for good. The
value was found in trials on ResNet-20 with a few hundred proposals."""

_LIMIT = 60.0
"""A logit beyond which the keep probability is 0 or 1 in double precision."""
_HALVINGS = 40
"""Steps of a bisection: they shrink a bracket of about 100 to 1e-10."""


def sigmoid(logits: FloatArray) -> FloatArray:
    """Return the keep probabilities, in (0, 1)."""
    return 1 / (1 + np.exp(-logits))


def logit(prob: FloatArray) -> FloatArray:
    """Return the logits whose ``sigmoid`` are these probabilities, in (0, 1)."""
    return np.log(prob / (1 - prob))


def prune_prob(keep_logits: FloatArray) -> FloatArray:
    """Return P(filter is removed), in [MARGIN, 1 - MARGIN]."""
    return np.clip(sigmoid(-keep_logits), MARGIN, 1 - MARGIN)


def layer_mean(space: PruningSpace, values: FloatArray) -> FloatArray:
    """Return the mean of each channel group over its filters, ``(num_groups,)``.

    Args:
        space: The space of the filters.
        values: ``(num_filters,)``.
    """
    means: FloatArray = np.add.reduceat(values, space.offsets) / space.dense_widths
    return means


def start_logits(budget: Budget, importance: FloatArray) -> FloatArray:
    """Return keep-logits that expect the same share of every layer and prefer important filters.

    Within a layer they are the standardised logarithm of the importance plus an offset, one per
    layer, at which the layer's mean keep probability is the share that meets the budget.

    Args:
        budget: The space and the most that masks may cost.
        importance: ``(num_filters,)``, finite and > 0; only ratios within a layer matter.

    Raises:
        ValueError: the importance has another shape, or is not finite and positive.
    """
    space = budget.space
    check_importance(space, importance)
    # z has a standard deviation of 1. Deviations of 0.5 and 2 were tried once, and neither is
    # better: searches of 320 proposals on the landscapes of jobs/experiments/rules.py that are like
    # ResNet-20 / 56 / 50 gain 0.58 / 0.31 / 0.21 with 0.5, 0.56 / 0.35 / 0.30 with 1 and
    # 0.48 / 0.35 / 0.32 with 2; one of 640 on ResNet-20 ends at a loss of 0.917, 0.919 and 0.982.
    z = _standardised(space, np.log(importance))
    share = _uniform_share(budget)
    # Per layer, the offset b at which mean(sigmoid(z + b)) = share; the mean rises with b.
    offsets = _bisect(
        lambda offset: layer_mean(space, sigmoid(z + offset[space.group_of])) <= share,
        np.full(len(space.groups), -_LIMIT),
        np.full(len(space.groups), _LIMIT),
    )
    return project_to_budget(budget, z + offsets[space.group_of])


def logits_at_widths(budget: Budget, importance: FloatArray, widths: IntArray) -> FloatArray:
    """Return keep-logits whose mode has given widths and prefers important filters.

    Within a layer they are the standardised logarithm of the importance plus an offset, one per
    layer, which puts the last filter of the layer's width as far above a threshold as the next one
    is below it. All layers have the same threshold.

    Args:
        budget: The space and the most that masks may cost.
        importance: ``(num_filters,)``, finite and > 0; only ratios within a layer matter.
        widths: Kept filters per layer, ``(num_groups,)``, within the budget.
    """
    space = budget.space
    z = _standardised(space, np.log(importance))
    thresholds = np.empty(len(space.groups))
    for group, width in enumerate(widths.tolist()):
        ordered = np.sort(z[space.group_of == group])[::-1]
        # Beyond the ends, a step of one standard deviation.
        ordered = np.concatenate([[ordered[0] + 1], ordered, [ordered[-1] - 1]])
        thresholds[group] = (ordered[width] + ordered[width + 1]) / 2
    return project_to_budget(budget, z - thresholds[space.group_of])


def check_importance(space: PruningSpace, importance: FloatArray) -> None:
    """Refuse an importance that probabilities cannot start from.

    Args:
        space: The space of the filters.
        importance: ``(num_filters,)``.

    Raises:
        ValueError: it has another shape, or is not finite and positive.
    """
    _check_shape(space, "importance", importance)
    is_bad = ~(np.isfinite(importance) & (importance > 0))
    if is_bad.any():
        raise ValueError(
            f"importance must be finite and > 0, got {_first(space, importance, is_bad)}; add a "
            "small constant to all of them"
        )


def check_warm_start(space: PruningSpace, keep_logits: FloatArray) -> None:
    """Refuse keep-logits of another search that this one cannot start from.

    Args:
        space: The space of the filters.
        keep_logits: ``(num_filters,)``.

    Raises:
        ValueError: they have another shape, or are not finite.
    """
    _check_shape(space, "warm_start", keep_logits)
    is_bad = ~np.isfinite(keep_logits)
    if is_bad.any():
        raise ValueError(
            f"warm_start must be finite, got {_first(space, keep_logits, is_bad)}; search within "
            "a mask (PruningSpace.within) to leave filters out"
        )


def project_to_budget(budget: Budget, logits: FloatArray) -> FloatArray:
    """Return the logits minus the tau at which the expected costs meet the tightest limit.

    Args:
        budget: The space and the most that masks may cost.
        logits: ``(num_filters,)``, finite.
    """
    space = budget.space

    # Expected widths are ``sum_i sigmoid(logit_i - tau)`` over a layer, at least the smallest legal
    # width, so that every budget has a solution. They rise with the shift -tau, costs never fall
    # with widths, and so bisection finds the largest shift within the budget.

    def within_budget(shift: FloatArray) -> BoolArray:
        widths = layer_mean(space, sigmoid(logits + shift)) * space.dense_widths
        return np.asarray(budget.is_expected(np.maximum(widths, space.min_widths)))

    span = np.abs(logits).max() + _LIMIT  # at +-span all filters are kept, or none
    return logits + _bisect(within_budget, np.asarray(-span), np.asarray(span))


def uniform_priority(space: PruningSpace, importance: FloatArray) -> FloatArray:
    """Return priorities by which every layer loses the same share, least important filters first.

    Args:
        space: The space of the filters.
        importance: ``(num_filters,)``.

    Returns:
        The quantile of each filter within its layer, ``(num_filters,)`` in (0, 1).
    """
    rank = rank_in_layer(space, importance)
    priority: FloatArray = 1 - (rank + 0.5) / space.dense_widths[space.group_of]
    return priority


def rank_in_layer(space: PruningSpace, importance: FloatArray) -> IntArray:
    """Return how many filters of the same layer are more important, ``(num_filters,)``.

    Args:
        space: The space of the filters.
        importance: ``(num_filters,)``; ties go by index.
    """
    ranked = np.lexsort((-importance, space.group_of))
    rank = np.empty(space.num_filters, dtype=np.int64)
    rank[ranked] = np.arange(space.num_filters) - space.offsets[space.group_of]
    return rank


def _check_shape(space: PruningSpace, name: str, values: FloatArray) -> None:
    if values.shape != (space.num_filters,):
        raise ValueError(
            f"{name} must have shape ({space.num_filters},), one number per filter of the "
            f"space, got {values.shape}"
        )


def _first(space: PruningSpace, values: FloatArray, is_bad: BoolArray) -> str:
    """Return the first bad value together with its filter and group."""
    index = int(np.flatnonzero(is_bad)[0])
    return f"{values[index]} for filter {index} in {space.groups[space.group_of[index]].name}"


def _standardised(space: PruningSpace, values: FloatArray) -> FloatArray:
    """Return the values with mean 0 and standard deviation 1 in every layer."""
    centred = values - layer_mean(space, values)[space.group_of]
    deviation = np.sqrt(layer_mean(space, centred**2))
    # In a layer of equal values the deviation is a rounding error; its filters all become 0.
    deviation[deviation < 1e-9] = np.inf
    standardised: FloatArray = centred / deviation[space.group_of]
    return standardised


def _uniform_share(budget: Budget) -> FloatArray:
    """Return the largest share of filters, kept in every layer, that is within the budget."""
    space = budget.space

    def within_budget(share: FloatArray) -> BoolArray:
        widths = np.clip(share * space.dense_widths, space.min_widths, space.max_widths)
        return np.asarray(budget.is_expected(widths))

    return _bisect(within_budget, np.asarray(0.0), np.asarray(1.0))


def _bisect(
    holds: Callable[[FloatArray], BoolArray], low: FloatArray, high: FloatArray
) -> FloatArray:
    """Return the largest values for which a condition holds, one bisection for each element.

    Args:
        holds: The condition, which is true up to some value of each element and false above it.
        low: Lower ends, of any shape.
        high: Upper ends, of the same shape.
    """
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        is_low = holds(middle)
        low, high = np.where(is_low, middle, low), np.where(is_low, high, middle)
    return low
