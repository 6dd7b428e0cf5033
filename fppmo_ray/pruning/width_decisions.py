"""Decisions of a network's code by widths: which of them a mask can change, and where it cannot.

A forward may compare sizes, as in ``x + y if x.shape == y.shape else y``. Another outcome than in
the dense network may make it another network.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from fppmo_ray.distribution.space import IntArray
from fppmo_ray.pruning.dependency.widths import (
    Decision,
    Expression,
    Length,
    Term,
    evaluated,
    lengths,
    with_units,
)

_UNBOUNDED = 1 << 62
_TRIED_WIDTHS = 64  # equal widths of all groups, and random ones


@dataclass(frozen=True, eq=False)
class WidthDecision:
    """A decision as a function of the widths of some channel groups."""

    source: Decision
    """The comparison as recorded."""
    decision: Decision
    """The same. Its lengths hold a constant, followed by the positions per group's filter."""
    groups: tuple[int, ...]
    """Indices of the groups whose widths it depends on."""

    @property
    def place(self) -> str:
        """File and line of the code that decides."""
        return self.decision.place

    def can_change(self, low: IntArray, high: IntArray) -> bool:
        """Return whether it may turn out differently at some widths in a range.

        Args:
            low: Smallest width per group, ``(num_groups,)``.
            high: Largest width per group, ``(num_groups,)``.
        """
        least, most = _difference(self.decision, low, high)
        is_true, is_false = {
            "eq": (least <= 0 <= most, (least, most) != (0, 0)),
            "ne": ((least, most) != (0, 0), least <= 0 <= most),
            "lt": (least < 0, most >= 0),
            "le": (least <= 0, most > 0),
            "gt": (most > 0, least <= 0),
            "ge": (most >= 0, least < 0),
        }[self.decision.comparison]
        return is_false if self.decision.outcome else is_true

    def changes(self, widths: IntArray) -> np.ndarray:
        """Return whether it turns out differently, ``(num_vectors,)``.

        Args:
            widths: Vectors of widths, ``(num_vectors, num_groups)``.
        """
        left, right = (
            evaluated(side, lambda terms: terms[0] + widths @ terms[1:])
            for side in (self.decision.left, self.decision.right)
        )
        outcome = getattr(operator, self.decision.comparison)(left, right)
        return np.broadcast_to(outcome != self.decision.outcome, len(widths))


def width_decisions(
    decisions: Sequence[Decision], filter_of_unit: IntArray, sizes: IntArray
) -> list[WidthDecision]:
    """Return the different decisions that depend on the width of a group.

    Args:
        decisions: All comparisons; their lengths hold units.
        filter_of_unit: Index into the mask per unit, -1 for units that always stay; the last entry
            is that of unit -1.
        sizes: Filters per group of the mask, ``(num_groups,)``.
    """
    group_of = np.repeat(np.arange(len(sizes)), sizes)

    def terms(units: IntArray) -> IntArray:
        filters = filter_of_unit[units]
        counts = np.bincount(group_of[filters[filters >= 0]], minlength=len(sizes))
        return np.concatenate([[np.count_nonzero(filters < 0)], counts // sizes])

    found: dict[tuple[object, ...], WidthDecision] = {}
    for decision in decisions:
        left, right = (with_units(side, terms) for side in (decision.left, decision.right))
        sides = Decision(decision.comparison, left, right, decision.outcome, decision.place)
        read = sum(length.positions[1:] for length in [*lengths(left), *lengths(right)])
        key = (decision.comparison, _key(left), _key(right), decision.outcome, decision.place)
        if np.any(read):
            found.setdefault(
                key, WidthDecision(decision, sides, tuple(np.flatnonzero(read).tolist()))
            )
    return list(found.values())


def usual_widths(
    decisions: Sequence[WidthDecision], dense: IntArray, rng: np.random.Generator
) -> list[IntArray]:
    """Return two random widths of about half the filters at which all decisions are as when dense.

    Where none are found, some decisions turn out differently.

    Args:
        decisions: The decisions.
        dense: Filters per group, ``(num_groups,)``; two or more each.
        rng: Source of randomness.
    """
    multiples = np.array([1, 1, 1, 2, 4, 8, 16, 32])
    shares = rng.uniform(0.25, 0.75, size=(len(multiples) * _TRIED_WIDTHS, len(dense)))
    shares[1::4] = shares[1::4, :1]  # groups of equal size have equal widths
    shares[2::4] = 1 - shares[2::4] / 4  # nearly all filters
    step = np.tile(multiples, _TRIED_WIDTHS)[:, None]
    tried = np.clip((shares * dense / step).round().astype(np.int64) * step, 1, dense - 1)
    unchanged = ~np.any([decision.changes(tried) for decision in decisions], axis=0)
    usual = np.flatnonzero(np.broadcast_to(unchanged, len(tried)))
    return [tried[index] for index in (*usual[:2], 0, 4)[:2]]


def changing_widths(
    decisions: Sequence[WidthDecision], low: IntArray, high: IntArray, involved: Sequence[int]
) -> Iterator[tuple[IntArray, list[WidthDecision]]]:
    """Yield widths at which some decisions turn out differently, for every one that can.

    For each decision these are the widths nearest to the dense ones, where others stay as they are,
    and some at which many change together.

    Args:
        decisions: The decisions.
        low: Smallest width per group, ``(num_groups,)``.
        high: Largest width per group, ``(num_groups,)``.
        involved: The groups that may be narrower than ``high``.

    Yields:
        Width per group, and the decisions that change there.
    """
    if not decisions:
        return
    tried = np.clip(_tried_widths(low, high, involved), low, high)
    tried = tried[np.argsort((high - tried).sum(axis=1), kind="stable")]
    changes = np.array([decision.changes(tried) for decision in decisions])
    can_change = changes.any(axis=1)
    picked = dict.fromkeys(np.argmax(changes[can_change], axis=1).tolist())
    open_ones = can_change.copy()
    while open_ones.any():
        best = int(np.argmax(changes[open_ones].sum(axis=0)))
        picked[best] = None
        open_ones &= ~changes[:, best]
    for index in picked:
        changed = changes[:, index]
        yield tried[index], [d for d, now in zip(decisions, changed, strict=True) if now]


def _tried_widths(low: IntArray, high: IntArray, involved: Sequence[int]) -> IntArray:
    """Vectors of widths: one group narrower, all of equal width, random ones."""
    vectors = []
    for group in involved:
        steps = np.unique(np.linspace(low[group], high[group], 4 * _TRIED_WIDTHS).astype(int))
        alone = np.tile(high, (len(steps), 1))
        alone[:, group] = steps
        vectors.append(alone[::-1])
    largest = int(high[list(involved)].max())
    special = {*high[list(involved)].tolist(), *low[list(involved)].tolist()}
    equal = {*special, *np.linspace(1, largest, _TRIED_WIDTHS).astype(int).tolist()}
    for width in sorted(equal, reverse=True):
        together = high.copy()
        together[list(involved)] = width
        vectors.append(together[None])
    rng = np.random.default_rng(0)
    anywhere = np.tile(high, (_TRIED_WIDTHS, 1))
    for group in involved:
        anywhere[:, group] = rng.integers(low[group], high[group] + 1, size=_TRIED_WIDTHS)
    return np.concatenate([*vectors, anywhere])


def smallest_floor(
    decision: WidthDecision, low: IntArray, high: IntArray
) -> tuple[int, int] | None:
    """Return a group and the smallest width of it from which on a decision cannot change.

    Of several groups it is the one that may still lose the largest share.

    Args:
        decision: The decision.
        low: Smallest width per group so far, ``(num_groups,)``.
        high: Largest width per group, ``(num_groups,)``.

    Returns:
        The index of the group, and the width; None if no width but the dense one will do.
    """
    found = []
    for group in decision.groups:
        raised = low.copy()
        first, last = int(low[group]), int(high[group])
        while first < last:
            raised[group] = (first + last) // 2
            if decision.can_change(raised, high):
                first = raised[group] + 1
            else:
                last = raised[group]
        if first < high[group]:
            found.append((float(first / high[group]), group, int(first)))
    return min(found)[1:] if found else None


def _difference(decision: Decision, low: IntArray, high: IntArray) -> tuple[int, int]:
    """The smallest and largest difference of a decision's two sides in a range of widths."""
    left, right = decision.left, decision.right
    if _key(left) == _key(right):
        return 0, 0
    linear = _linear(Term("sub", left, right))
    if linear is not None:
        constant, factors = int(linear[0]), linear[1:]
        ends = np.stack([factors * low, factors * high])
        return constant + int(ends.min(axis=0).sum()), constant + int(ends.max(axis=0).sum())
    (least, most), (smallest, largest) = (_range(side, low, high) for side in (left, right))
    return least - largest, most - smallest


def _linear(expression: Expression) -> IntArray | None:
    """A constant, followed by a factor per group; None if the expression is not linear."""
    if isinstance(expression, Length):
        return expression.positions
    if isinstance(expression, int):
        return np.array([expression])
    left, right = _linear(expression.left), _linear(expression.right)
    if left is None or right is None:
        return None
    size = max(len(left), len(right))
    left, right = (np.pad(side, (0, size - len(side))) for side in (left, right))
    if expression.operator in ("add", "sub"):
        return left + right if expression.operator == "add" else left - right
    if expression.operator == "mul" and not (left[1:].any() and right[1:].any()):
        product: IntArray = left * right[0] if left[1:].any() else right * left[0]
        return product
    return None


def _range(expression: Expression, low: IntArray, high: IntArray) -> tuple[int, int]:
    """The smallest and largest value of an expression in a range of widths, or beyond."""
    if isinstance(expression, int):
        return expression, expression
    if isinstance(expression, Length):
        ends = (int(expression.positions[0] + expression.positions[1:] @ w) for w in (low, high))
        return next(ends), next(ends)
    (least, most), (smallest, largest) = (
        _range(side, low, high) for side in (expression.left, expression.right)
    )
    if expression.operator == "add":
        return least + smallest, most + largest
    if expression.operator == "sub":
        return least - largest, most - smallest
    if expression.operator != "mul" and smallest <= 0:  # a quotient by 0 or less
        return -_UNBOUNDED, _UNBOUNDED
    if expression.operator == "mod":
        is_constant = least == most and smallest == largest
        return (least % smallest,) * 2 if is_constant else (0, largest - 1)
    function = getattr(operator, expression.operator)
    values = [function(one, other) for one in (least, most) for other in (smallest, largest)]
    return min(values), max(values)


def _key(expression: Expression) -> tuple[object, ...]:
    """Equal for expressions that are computed alike."""
    if isinstance(expression, Term):
        return (expression.operator, _key(expression.left), _key(expression.right))
    if isinstance(expression, Length):
        return ("length", expression.positions.tobytes())
    return (expression,)
