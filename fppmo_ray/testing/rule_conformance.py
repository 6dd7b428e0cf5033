"""What every update rule must satisfy, for the tests of a rule of your own.

Example:
    >>> import pytest  # doctest: +SKIP
    >>> from fppmo_ray.testing import CHECKS
    >>> @pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
    ... def test_my_rule_conforms(check):
    ...     check(MyRule())
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import numpy as np

from fppmo_ray.distribution import (
    ChannelGroup,
    Feedback,
    FloatArray,
    LayerCost,
    MaskOptimizer,
    OptimizerSettings,
    Proposal,
    PruningSpace,
    UpdateRule,
    Width,
)

_SIZES = 8, 16, 24


def budget_is_kept(rule: UpdateRule) -> None:
    """Check that no proposal and no finalist costs more than the budget."""
    optimizer = _optimizer(rule)
    space, most = _space(), int(0.5 * _space().dense_macs)
    masks = [item.keep for item in _searched(optimizer)]
    masks += [item.keep for item in optimizer.finalists()]
    assert all(space.macs(keep) <= most for keep in masks)
    assert all((space.widths(keep) >= space.min_widths).all() for keep in masks)


def arrival_does_not_matter(rule: UpdateRule) -> None:
    """Check that the order in which feedback arrives changes no mask."""
    in_order = [item.keep for item in _searched(_optimizer(rule))]
    shuffled = [item.keep for item in _searched_in_any_order(_optimizer(rule))]
    assert np.array_equal(in_order, shuffled)


def searches_repeat(rule: UpdateRule) -> None:
    """Check that the same seed gives the same masks, so the rule holds no state of its own."""
    first = [item.keep for item in _searched(_optimizer(rule))]
    assert np.array_equal(first, [item.keep for item in _searched(_optimizer(rule))])


def ranks_alone_matter(rule: UpdateRule) -> None:
    """Check that a monotone change of all losses changes no mask."""
    plain = [item.keep for item in _searched(_optimizer(rule))]
    stretched = [
        item.keep for item in _searched(_optimizer(rule), lambda loss: float(np.exp(5 * loss)))
    ]
    assert np.array_equal(plain, stretched)


def failures_do_not_enter(rule: UpdateRule) -> None:
    """Check that a search goes on although a third of its proposals fail."""
    optimizer = _optimizer(rule)
    while not optimizer.finished:
        for item in optimizer.ask():
            if item.proposal_id % 3 == 0:
                optimizer.tell(Feedback(proposal_id=item.proposal_id, error="out of memory"))
            else:
                optimizer.tell(_feedback(item))
    assert np.isfinite(optimizer.prune_prob()).all()
    assert all(name.name not in {"sample 0", "sample 3"} for name in optimizer.finalists())


def no_filter_is_decided_for_good(rule: UpdateRule) -> None:
    """Check that every pruning probability stays within [0.02, 0.98]."""
    optimizer = _optimizer(rule)
    _searched(optimizer)
    prob = optimizer.prune_prob()
    assert prob.min() >= 0.02
    assert prob.max() <= 0.98


CHECKS: Sequence[Callable[[UpdateRule], None]] = (
    budget_is_kept,
    arrival_does_not_matter,
    searches_repeat,
    ranks_alone_matter,
    failures_do_not_enter,
    no_filter_is_decided_for_good,
)
"""All checks. Each takes a rule and raises AssertionError if the rule fails it."""


def _space() -> PruningSpace:
    """Return a chain of three layers of 3 x 3 convolutions, and a classifier."""
    groups = tuple(ChannelGroup(name=f"conv{i}", num_filters=n) for i, n in enumerate(_SIZES))
    outputs = [Width(terms=((i, 1),)) for i in range(len(_SIZES))] + [Width(constant=10)]
    inputs = [Width(constant=3), *outputs[:-1]]
    costs = tuple(
        LayerCost(layer=f"conv{i}", macs_per_pair=9, out_width=out, in_width=into)
        for i, (out, into) in enumerate(zip(outputs, inputs, strict=True))
    )
    return PruningSpace(groups, costs).with_limits(min_keep=0.1)


def _optimizer(rule: UpdateRule) -> MaskOptimizer:
    space = _space()
    importance: FloatArray = 1.0 + np.arange(space.num_filters, dtype=np.float64) * 7 % 11
    settings = OptimizerSettings(
        macs_cut=0.5, num_proposals=44, population_size=8, seed=3, rule=rule
    )
    return MaskOptimizer(space, importance, settings)


def _feedback(item: Proposal, stretch: Callable[[float], float] = float) -> Feedback:
    """Return a loss without ties that is low for masks that keep filters with even numbers."""
    worth = np.where(np.arange(len(item.keep)) % 2 == 0, 2.0, 0.5)
    worth += np.linspace(0, 0.1, len(worth))
    loss = 1 - float(worth @ item.keep / worth.sum())
    return Feedback(proposal_id=item.proposal_id, val_loss=stretch(loss))


def _searched(
    optimizer: MaskOptimizer, stretch: Callable[[float], float] = float
) -> list[Proposal]:
    proposals = []
    while not optimizer.finished:
        asked = optimizer.ask()
        assert asked, "the search waits although nothing is in flight"
        proposals += asked
        for item in asked:
            optimizer.tell(_feedback(item, stretch))
    return proposals


def _searched_in_any_order(optimizer: MaskOptimizer) -> list[Proposal]:
    shuffle = random.Random(0)
    in_flight: list[Proposal] = []
    proposals: list[Proposal] = []
    while not optimizer.finished:
        while shuffle.random() < 0.7 and (asked := optimizer.ask()):
            in_flight += asked
            proposals += asked
        if in_flight:
            optimizer.tell(_feedback(in_flight.pop(shuffle.randrange(len(in_flight)))))
    return proposals
