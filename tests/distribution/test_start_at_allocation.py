"""Searches that start at the widths which error curves give without scores."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from planted_optimum import packed, resnet20_landscape, run_to_end

from fppmo_ray.distribution import Budget, MaskOptimizer, OptimizerSettings
from fppmo_ray.distribution.allocation import allocate, allocation_masks, keep_most_important
from fppmo_ray.distribution.costs import TensorSize
from fppmo_ray.distribution.logits import logits_at_widths, sigmoid

LANDSCAPE, IMPORTANCE = resnet20_landscape(seed=0)
SIZES = tuple(
    TensorSize(tensor=cost.layer, per_pair=9, out_width=cost.out_width, in_width=cost.in_width)
    for cost in LANDSCAPE.space.layer_costs
)
SPACE = replace(LANDSCAPE.space, tensor_sizes=SIZES)
# The later a group, the less its filters matter.
CURVES = [
    (1 - np.arange(group.num_filters + 1) / group.num_filters) ** 2 / (1 + number)
    for number, group in enumerate(SPACE.groups)
]


def allocation(macs_cut: float) -> np.ndarray:
    widths = allocate(Budget.from_cut(SPACE, macs_cut), CURVES)
    return keep_most_important(SPACE, widths, IMPORTANCE)


def optimizer(**changes) -> MaskOptimizer:
    settings = {"macs_cut": 0.57, "num_proposals": 32, "population_size": 8} | changes
    asked = OptimizerSettings(**settings)
    budgets = [Budget.from_cut(SPACE, cut) for cut in asked.macs_cuts]
    masks = allocation_masks(budgets, CURVES, IMPORTANCE)
    return MaskOptimizer(SPACE, IMPORTANCE, asked, allocations=masks)


@pytest.mark.parametrize("macs_cut", [0.3, 0.57, 0.8])
def test_the_mode_of_the_start_is_the_allocation(macs_cut):
    keep = allocation(macs_cut)
    widths = SPACE.widths(keep) / SPACE.dense_widths
    assert np.ptp(widths) > 0.2  # far from equal shares
    start = optimizer(macs_cut=macs_cut).keep_logits()
    assert np.array_equal(Budget.from_cut(SPACE, macs_cut).fill(start), keep)


def test_the_start_expects_the_budget_and_prefers_important_filters():
    budget = Budget.from_cut(SPACE, 0.57)
    logits = logits_at_widths(budget, IMPORTANCE, SPACE.widths(allocation(0.57)))
    kept = np.add.reduceat(sigmoid(logits), SPACE.offsets)
    assert SPACE.expected_macs(kept) == pytest.approx(budget.max_macs, rel=1e-6)
    for group in range(len(SPACE.groups)):
        members = SPACE.group_of == group
        assert np.array_equal(np.argsort(logits[members]), np.argsort(IMPORTANCE[members]))


def test_a_layer_that_keeps_all_its_filters_can_still_lose_some():
    widths = SPACE.dense_widths.copy()
    widths[1:] = SPACE.min_widths[1:]
    logits = logits_at_widths(Budget.from_cut(SPACE, 0.57), IMPORTANCE, widths)
    assert np.isfinite(logits).all()
    assert np.ptp(logits) < 12


@pytest.mark.parametrize("rule", ["layer_es", "widths"])
def test_the_allocation_is_a_finalist_whatever_was_found(rule):
    search = optimizer(rule=rule)
    run_to_end(search)
    *found, allocated, importance_only = search.finalists()
    assert (allocated.name, importance_only.name) == ("allocation", "importance-only")
    assert np.array_equal(allocated.keep, allocation(0.57))
    assert found
    assert len({packed(item.keep) for item in found} | {packed(allocated.keep)}) == len(found) + 1


def test_without_proposals_the_allocation_is_all_that_is_found():
    search = optimizer(num_proposals=0)
    assert search.ask() == []
    assert search.finished
    assert [item.name for item in search.finalists()] == ["allocation", "importance-only"]


def test_every_budget_has_its_own_allocation():
    search = optimizer(macs_cut=(0.4, 0.57))
    found = {f.macs_cut: f.keep for f in search.finalists() if f.name == "allocation"}
    assert set(found) == {0.4, 0.57}
    for macs_cut, keep in found.items():
        assert np.array_equal(keep, allocation(macs_cut))


@pytest.mark.parametrize(
    ("masks", "sentence"),
    [
        ([np.ones(3, bool)], r"must be 1 masks of shape \(\d+,\), one per budget, got shapes"),
        ([allocation(0.57), allocation(0.57)], "must be 1 masks"),
        ([allocation(0.3)], "must meet the budgets of this search, one does not"),
    ],
)
def test_masks_that_a_search_cannot_start_at_are_refused(masks, sentence):
    settings = OptimizerSettings(macs_cut=0.57, num_proposals=32)
    with pytest.raises(ValueError, match=sentence):
        MaskOptimizer(SPACE, IMPORTANCE, settings, allocations=masks)
