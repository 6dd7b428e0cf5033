"""Widths without scores: which groups lose filters, by what their removal costs in error.

The input is one error curve per group: the relative error of the layers that read the group, as a
function of the number of filters that are kept. From the dense network, one legal step after the
other is taken in the group where it does the least harm per unit of the budget that is exceeded
most, until every budget is met.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fppmo_ray.distribution.budget import Budget
from fppmo_ray.distribution.costs import Cost
from fppmo_ray.distribution.logits import rank_in_layer
from fppmo_ray.distribution.space import BoolArray, FloatArray, IntArray, PruningSpace

GAMMA = 1.0
"""Default weight of the parameters that a step removes. ResNet-20 without training: 1 is the best
of 0, 0.3, 1 and 3 at cuts of 57, 70 and 80 %; ResNet-56 at 70 %, and long fine-tuning, prefer 3."""
GAMMAS = (0.0, 1.0, 3.0)
"""Weights to choose from by a score of each, which finds the best of them on these networks. A VGG,
whose last layers are wide and hardly needed, prefers 0 by 2 to 3 points, and ResNets 3."""


def allocate(
    budget: Budget, error_curves: Sequence[FloatArray], *, gamma: float = GAMMA
) -> IntArray:
    """Widths that meet every limit of a budget, found greedily from the dense network.

    Each step removes the filters of one group down to its next legal width. The chosen group has
    the least ``(increase of its error + gamma * decrease of log(parameters)) / saving``, where the
    saving is that of the resource which exceeds its limit by the largest factor. A mask that keeps
    more parameters at equal cost recovers better, which is what gamma accounts for.

    Args:
        budget: The limits, and the space with the legal widths of every group.
        error_curves: One array ``(num_filters of the group + 1,)`` per group: entry n is the
            relative error when n filters are kept. It must not rise with n.
        gamma: Weight of the parameters, >= 0; 0 looks at errors only.

    Returns:
        Kept filters per group, ``(num_groups,)``. No group could be widened by a legal step
        without exceeding a limit.

    Raises:
        ValueError: the curves do not fit the space, or gamma is out of range or needs sizes of
            tensors that the space does not have.
    """
    _check(budget.space, error_curves, gamma)
    removed = _removals(budget, error_curves, gamma)
    # The last step may save more than was needed. ``fill`` takes the steps back in reverse order
    # as long as they fit, and behind the first that does not, any other that does.
    return budget.space.widths(budget.fill(_priorities(budget.space, removed)))


def keep_most_important(space: PruningSpace, widths: IntArray, importance: FloatArray) -> BoolArray:
    """The mask ``(num_filters,)`` that keeps the most important filters of every group.

    Args:
        space: The groups.
        widths: Kept filters per group, ``(num_groups,)``.
        importance: ``(num_filters,)``; only the order within a group matters, ties go by index.
    """
    keep: BoolArray = rank_in_layer(space, importance) < np.asarray(widths)[space.group_of]
    return keep


def allocation_masks(
    budgets: Sequence[Budget],
    error_curves: Sequence[FloatArray],
    importance: FloatArray,
    *,
    gamma: float = GAMMA,
) -> list[BoolArray]:
    """Masks of the allocated widths, one ``(num_filters,)`` for each budget.

    Args:
        budgets: Budgets of the same space.
        error_curves: See ``allocate``.
        importance: ``(num_filters,)``; the most important filters of every group are kept.
        gamma: See ``allocate``.

    Raises:
        ValueError: see ``allocate``.
    """
    return [
        keep_most_important(budget.space, allocate(budget, error_curves, gamma=gamma), importance)
        for budget in budgets
    ]


def _check(space: PruningSpace, error_curves: Sequence[FloatArray], gamma: float) -> None:
    if not (np.isfinite(gamma) and gamma >= 0):
        raise ValueError(f"gamma must be finite and >= 0, got {gamma}; 1 is the default")
    if gamma > 0 and not space.tensor_sizes:
        raise ValueError(
            f"gamma = {gamma} needs a space with tensor_sizes, got one without; trace makes such "
            "spaces, or take gamma = 0"
        )
    if len(error_curves) != len(space.groups):
        raise ValueError(
            f"expected one error curve for each of the {len(space.groups)} groups, got "
            f"{len(error_curves)}"
        )
    for group, curve in zip(space.groups, error_curves, strict=True):
        if curve.shape != (group.num_filters + 1,):
            raise ValueError(
                f"the error curve of group {group.name} must have shape ({group.num_filters + 1},),"
                f" one entry for each width from 0 on, got {curve.shape}"
            )
        if not np.isfinite(curve).all():
            raise ValueError(f"the error curve of group {group.name} must be finite, it is not")


def _removals(
    budget: Budget, error_curves: Sequence[FloatArray], gamma: float
) -> list[tuple[int, int]]:
    """The steps that lead from the largest legal widths into the budget: (group, new width)."""
    space = budget.space
    costs: list[tuple[Cost, int]] = [(space.macs_cost, budget.max_macs)]
    costs += [(limit.cost, limit.most) for limit in budget.further]
    longest = max(group.num_filters for group in space.groups) + 1
    errors = np.array([np.pad(c, (0, longest - len(c)), mode="edge") for c in error_curves])
    group = np.arange(len(space.groups))
    widths = space.max_widths.copy()
    removed: list[tuple[int, int]] = []
    while True:
        excess = [cost.total(widths) / max(most, 1) for cost, most in costs]
        tightest = int(np.argmax(excess))
        if excess[tightest] <= 1:
            return removed
        narrower = _next_narrower(space, widths)
        harm = errors[group, narrower] - errors[group, widths]
        if gamma > 0:
            total = space.parameters_cost.total(widths)
            # -log(1 - share): the share of all parameters that the step removes.
            removed_share = -space.parameters_cost.increase(widths, narrower - widths) / total
            harm = harm - gamma * np.log1p(-removed_share)
        cost, most = costs[tightest]
        saving = _savings(cost, most, widths, narrower, space)
        can_step = narrower < widths
        # A step may lower the error by rounding; it is then as good as free, not better.
        ratio = np.where(
            can_step & (saving > 0), np.maximum(harm, 0) / np.maximum(saving, 1e-30), np.inf
        )
        best = int(np.argmin(ratio))
        assert np.isfinite(ratio[best]), "a budget that the smallest widths meet can be reached"
        widths[best] = narrower[best]
        removed.append((best, int(narrower[best])))


def _savings(
    cost: Cost, most: int, widths: IntArray, narrower: IntArray, space: PruningSpace
) -> FloatArray:
    """Return how much of a resource each group's step saves, ``(num_groups,)``.

    A peak of memory does not fall while two groups share it, and a measured latency can be flat
    from one width to the next. Where no single step saves anything, each group is looked at with
    all others as narrow as they get: what it costs then above the limit must be saved in this
    group. Where that is nothing either, MACs decide.
    """
    steps = narrower - widths
    saving = np.asarray(cost.total(widths) - cost.widened(widths, steps), dtype=np.float64)
    if (saving > 0).any():
        return saving
    least = space.min_widths
    alone = np.asarray(cost.widened(least, widths - least), dtype=np.float64)
    over = np.where(steps < 0, np.maximum(alone - most, 0), 0.0)
    if (over > 0).any():
        return over
    return -np.asarray(space.macs_increase(widths, steps), dtype=np.float64)


def _next_narrower(space: PruningSpace, widths: IntArray) -> IntArray:
    """The next smaller legal width of every group, or its width where there is none."""
    multiples = np.array([group.multiple for group in space.groups], dtype=np.int64)
    narrower: IntArray = np.maximum((widths - 1) // multiples * multiples, space.min_widths)
    return narrower


def _priorities(space: PruningSpace, removed: Sequence[tuple[int, int]]) -> FloatArray:
    """Priorities ``(num_filters,)`` by which filling a budget takes the steps back in reverse."""
    rank = np.arange(space.num_filters) - space.offsets[space.group_of]
    priority = np.full(space.num_filters, float(len(removed)))
    width = space.dense_widths.copy()
    for step, (group, narrower) in enumerate(removed):
        lost = (space.group_of == group) & (rank >= narrower) & (rank < width[group])
        priority[lost] = step
        width[group] = narrower
    return priority
