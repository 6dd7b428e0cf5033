"""Filling a MACs budget exactly."""

from __future__ import annotations

import numpy as np
import pytest
from planted_optimum import chain_space, resnet20_space

from fppmo_ray.distribution import Budget, ChannelGroup, LayerCost, PruningSpace, Width


def linear_space(sizes, prices, **limits):
    """Every filter of a group costs its price: what fits can be worked out by hand."""
    groups = tuple(ChannelGroup(name=f"g{i}", num_filters=n, **limits) for i, n in enumerate(sizes))
    costs = tuple(
        LayerCost(
            layer=f"g{i}",
            macs_per_pair=price,
            out_width=Width(terms=((i, 1),)),
            in_width=Width(constant=1),
        )
        for i, price in enumerate(prices)
    )
    return PruningSpace(groups, costs)


def test_the_best_filters_are_kept_while_they_fit():
    space = linear_space([3, 3], [10, 10])
    priority = np.array([5.0, 1.0, 3.0, 4.0, 2.0, 6.0])
    assert Budget(space, 45).fill(priority).tolist() == [True, False, True, True, False, True]


def test_what_still_fits_behind_a_filter_too_dear_is_added():
    space = linear_space([2, 3], [10, 4])
    priority = np.array([9.0, 8.0, 3.0, 7.0, 1.0])
    # 10 + mandatory 4, then the second of ten does not fit, but another of four does.
    assert Budget(space, 19).fill(priority).tolist() == [True, False, True, True, False]


def test_min_keep_comes_before_priority():
    space = linear_space([4, 4], [10, 10], min_keep=2)
    priority = np.array([9.0, 8.0, 7.0, 6.0, 0.1, 0.2, 0.3, 0.4])
    kept = Budget(space, 50).fill(priority)
    assert np.flatnonzero(kept).tolist() == [0, 1, 2, 6, 7]


def test_blocks_of_a_multiple_enter_whole():
    space = linear_space([4, 4], [1, 1], multiple=2)
    priority = np.array([9.0, 1.0, 8.0, 2.0, 7.0, 6.5, 6.0, 5.0])
    # Mandatory: {0, 2} and {4, 5}; then the second block of the second group.
    assert np.flatnonzero(Budget(space, 7).fill(priority)).tolist() == [0, 2, 4, 5, 6, 7]


def test_the_last_block_of_a_group_may_be_smaller():
    space = linear_space([5], [1], multiple=2)
    priority = np.arange(5.0)
    assert [int(Budget(space, macs).fill(priority).sum()) for macs in (2, 3, 4, 5)] == [2, 2, 4, 5]


def test_equal_priorities_are_resolved_by_index():
    space = linear_space([3, 3], [1, 1])
    assert np.flatnonzero(Budget(space, 4).fill(np.zeros(6))).tolist() == [0, 1, 2, 3]
    rounded = np.array([1.0, 1.0, 1.0, 1.0, 1.0, 2.0])
    assert np.flatnonzero(Budget(space, 3).fill(rounded)).tolist() == [0, 1, 5]


def test_the_order_of_priorities_is_exact_far_below_their_range():
    space = linear_space([4], [1])
    priority = np.array([1e6, 1.0, 1.001, 1.002])
    assert np.flatnonzero(Budget(space, 2).fill(priority)).tolist() == [0, 3]


@pytest.mark.parametrize("multiple", [1, 3, 8])
@pytest.mark.parametrize("macs_cut", [0.1, 0.57, 0.69])
def test_random_masks_meet_the_budget_and_no_legal_step_fits_any_more(macs_cut, multiple):
    space = resnet20_space().with_limits(min_keep=0.1, multiple=multiple)
    budget = Budget.from_cut(space, macs_cut)
    rng = np.random.default_rng(0)
    for _ in range(20):
        widths = space.widths(budget.fill(3 * rng.standard_normal(space.num_filters)))
        assert space.macs_of_widths(widths) <= (1 - macs_cut) * space.dense_macs
        assert np.all(widths >= space.min_widths)
        assert np.all((widths % multiple == 0) | (widths == space.dense_widths))
        for group in np.flatnonzero(widths < space.dense_widths):
            wider = widths.copy()
            wider[group] = min(widths[group] + multiple, space.dense_widths[group])
            assert space.macs_of_widths(wider) > budget.max_macs


@pytest.mark.parametrize(("multiple", "widest"), [(1, 45), (8, 40)])
def test_no_mask_is_wider_than_its_layers_may_be(multiple: int, widest: int):
    space = resnet20_space().with_limits(multiple=multiple, layers={"layer3.*": (0.2, 0.71)})
    budget = Budget.from_cut(space, 0.5)
    rng = np.random.default_rng(0)
    third = [group.name.startswith("layer3.") for group in space.groups]
    for _ in range(20):
        wishes = 3 * rng.standard_normal(space.num_filters)
        wishes[space.offsets[third][0] :] += 100
        widths = space.widths(budget.fill(wishes))
        assert widths[third].tolist() == [widest] * 3
        assert space.macs_of_widths(widths) <= budget.max_macs


def test_a_fine_space_is_filled_to_half_a_percent():
    space = resnet20_space()
    budget = Budget.from_cut(space, 0.57)
    rng = np.random.default_rng(1)
    for _ in range(20):
        macs = space.macs(budget.fill(rng.logistic(size=space.num_filters)))
        assert 0 <= budget.max_macs - macs <= 0.005 * space.dense_macs


@pytest.mark.parametrize("macs_cut", [0.0, 1.0, -0.2, 57, float("nan")])
def test_a_cut_out_of_range_is_refused(macs_cut):
    with pytest.raises(ValueError, match=r"macs_cut must be in \(0, 1\)"):
        Budget.from_cut(resnet20_space(), macs_cut)


def test_a_cut_that_min_keep_rules_out_is_refused_with_what_is_reachable():
    space = chain_space([4, 4], min_keep=0.5)
    # dense 9 * (12 + 16 + 40) = 612, smallest 9 * (6 + 4 + 20) = 270
    with pytest.raises(ValueError, match=r"at most 0\.5588, got 0\.6: .* 270 of 612 MACs"):
        Budget.from_cut(space, 0.6)
    assert Budget.from_cut(space, 0.5588).fill(np.arange(8.0)).sum() == 4
