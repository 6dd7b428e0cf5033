"""Keep-logits: the state of the probability model, one number per filter.

A filter's keep-logit is ``b[layer] + z + delta - tau``: what its layer, its importance and the
feedback say of it, shifted so that the expected costs meet the budget. Update rules change b and
delta; this module starts the logits, and solves for tau.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fppmo_ray.distribution.budget import Budget
from fppmo_ray.distribution.space import BoolArray, FloatArray, IntArray, PruningSpace

MARGIN = 0.02
"""No probability comes closer to 0 or 1: no filter is ever decided for good. Found in trials on
ResNet-20 with a few hundred proposals."""

_LIMIT = 60.0
"""Logits as large as certainty gets in double precision."""
_HALVINGS = 40
"""From a bracket of about 100 to 1e-10."""


def sigmoid(logits: FloatArray) -> FloatArray:
    """Keep probabilities, in (0, 1)."""
    return 1 / (1 + np.exp(-logits))


def logit(prob: FloatArray) -> FloatArray:
    """The inverse of ``sigmoid``."""
    return np.log(prob / (1 - prob))


def prune_prob(keep_logits: FloatArray) -> FloatArray:
    """P(filter is removed), in [MARGIN, 1 - MARGIN]."""
    return np.clip(sigmoid(-keep_logits), MARGIN, 1 - MARGIN)


def layer_mean(space: PruningSpace, values: FloatArray) -> FloatArray:
    """The mean of each channel group over its filters, ``(num_groups,)``."""
    means: FloatArray = np.add.reduceat(values, space.offsets) / space.dense_widths
    return means


def start_logits(budget: Budget, importance: FloatArray) -> FloatArray:
    """Keep-logits that keep the same share of every layer, and in it the important filters.

    Within a layer they are the standardised logarithm of the importance plus an offset, one per
    layer, at which the layer's mean keep probability is the share that meets the budget.

    Args:
        budget: The space and the most that masks may cost.
        importance: ``(num_filters,)``, finite and > 0; only ratios within a layer matter.

    Raises:
        ValueError: the importance has another shape, or is not finite and positive.
    """
    space = budget.space
    if importance.shape != (space.num_filters,):
        raise ValueError(
            f"importance must have shape ({space.num_filters},), one number per filter of the "
            f"space, got {importance.shape}"
        )
    if not np.all(np.isfinite(importance) & (importance > 0)):
        worst = int(np.flatnonzero(~(np.isfinite(importance) & (importance > 0)))[0])
        raise ValueError(
            f"importance must be finite and > 0, got {importance[worst]} for filter {worst} in "
            f"{space.groups[space.group_of[worst]].name}; add a small constant to all of them"
        )
    # Half and twice the spread were tried once, by hand, and neither is better: searches of 320
    # proposals on the landscapes of jobs/experiments/rules.py like ResNet-20 / 56 / 50 gain
    # 0.58 / 0.31 / 0.21 with half of it, 0.56 / 0.35 / 0.30 with it, 0.48 / 0.35 / 0.32 with twice;
    # one of 640 on ResNet-20 ends at a loss of 0.917, 0.919 and 0.982.
    z = _standardised(space, np.log(importance))
    share = _uniform_share(budget)
    offsets = _bisect(
        lambda offset: layer_mean(space, sigmoid(z + offset[space.group_of])) <= share,
        np.full(len(space.groups), -_LIMIT),
        np.full(len(space.groups), _LIMIT),
    )
    return settle(budget, z + offsets[space.group_of])


def settle(budget: Budget, logits: FloatArray) -> FloatArray:
    """The logits minus the tau at which the expected costs meet the budget's tightest limit.

    Expected widths count from the smallest legal ones, so a tau always exists.
    """
    space = budget.space

    def within_budget(shift: FloatArray) -> BoolArray:
        widths = layer_mean(space, sigmoid(logits + shift)) * space.dense_widths
        return np.asarray(budget.is_expected(np.maximum(widths, space.min_widths)))

    span = np.abs(logits).max() + _LIMIT
    return logits + _bisect(within_budget, np.asarray(-span), np.asarray(span))


def uniform_priority(space: PruningSpace, importance: FloatArray) -> FloatArray:
    """Priorities by which every layer loses the same share, its least important filters first.

    They are the filters' quantiles within their layer, ``(num_filters,)`` in (0, 1).
    """
    rank = rank_in_layer(space, importance)
    priority: FloatArray = 1 - (rank + 0.5) / space.dense_widths[space.group_of]
    return priority


def rank_in_layer(space: PruningSpace, importance: FloatArray) -> IntArray:
    """How many filters of its layer are more important than each, ``(num_filters,)``."""
    ranked = np.lexsort((-importance, space.group_of))
    rank = np.empty(space.num_filters, dtype=np.int64)
    rank[ranked] = np.arange(space.num_filters) - space.offsets[space.group_of]
    return rank


def _standardised(space: PruningSpace, values: FloatArray) -> FloatArray:
    centred = values - layer_mean(space, values)[space.group_of]
    deviation = np.sqrt(layer_mean(space, centred**2))
    # A layer whose filters are all alike has no preference, rounding errors aside.
    deviation[deviation < 1e-9] = np.inf
    standardised: FloatArray = centred / deviation[space.group_of]
    return standardised


def _uniform_share(budget: Budget) -> FloatArray:
    space = budget.space

    def within_budget(share: FloatArray) -> BoolArray:
        widths = np.clip(share * space.dense_widths, space.min_widths, space.max_widths)
        return np.asarray(budget.is_expected(widths))

    return _bisect(within_budget, np.asarray(0.0), np.asarray(1.0))


def _bisect(
    is_low: Callable[[FloatArray], BoolArray], low: FloatArray, high: FloatArray
) -> FloatArray:
    """The largest values (of any shape, each on its own) that are still low."""
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        keep_upper = is_low(middle)
        low, high = np.where(keep_upper, middle, low), np.where(keep_upper, high, middle)
    return low
