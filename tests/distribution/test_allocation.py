"""Widths from error curves: what greedy steps remove, and that every limit is met."""

from __future__ import annotations

import numpy as np
import pytest
from planted_optimum import chain_space, resnet20_space

from fppmo_ray.distribution import Budget, ChannelGroup, LayerCost, PruningSpace, Width
from fppmo_ray.distribution.allocation import allocate, keep_most_important
from fppmo_ray.distribution.costs import Activations, TensorSize
from fppmo_ray.distribution.limits import Limit


def priced_space(sizes, prices, parameters=None, **limits) -> PruningSpace:
    """Every filter of a group costs its price in MACs, and has its number of parameters."""
    groups = tuple(ChannelGroup(name=f"g{i}", num_filters=n, **limits) for i, n in enumerate(sizes))
    one = Width(constant=1)
    costs = tuple(
        LayerCost(
            layer=f"g{i}", macs_per_pair=price, out_width=Width(terms=((i, 1),)), in_width=one
        )
        for i, price in enumerate(prices)
    )
    tensors = tuple(
        TensorSize(tensor=f"g{i}", per_pair=number, out_width=Width(terms=((i, 1),)), in_width=one)
        for i, number in enumerate(parameters or ())
    )
    return PruningSpace(groups, costs, tensor_sizes=tensors)


def falling(num_filters: int, scale: float = 1.0) -> np.ndarray:
    """An error that rises quadratically with the share of filters removed."""
    return scale * (1 - np.arange(num_filters + 1) / num_filters) ** 2


def test_the_step_of_least_error_per_mac_comes_first():
    space = priced_space([3, 3], [10, 20])
    curves = [np.array([9, 5, 2, 0.0]), np.array([9, 5, 3, 0.0])]
    # Per MAC: 2 / 10 against 3 / 20, then 2 / 10 against 2 / 20.
    assert allocate(Budget(space, 70), curves, gamma=0).tolist() == [3, 2]
    assert allocate(Budget(space, 50), curves, gamma=0).tolist() == [3, 1]


def test_gamma_saves_the_group_with_more_parameters():
    space = priced_space([4, 4], [10, 10], parameters=[1, 100])
    curves = [falling(4, 2.0), falling(4)]
    assert allocate(Budget(space, 60), curves, gamma=0).tolist() == [3, 3]
    assert allocate(Budget(space, 60), curves, gamma=10).tolist() == [2, 4]


def test_what_the_last_step_saved_too_much_is_given_back():
    space = priced_space([4, 4], [3, 10])
    curves = [np.array([9, 3, 2, 1, 0.0]), np.array([999, 40, 30, 20, 0.0])]
    # Two steps of 3 leave 46; a limit of 42 needs the third, 43, and the step of 10: 33. Then
    # three steps of 3 fit again.
    assert allocate(Budget(space, 42), curves, gamma=0).tolist() == [4, 3]


def test_no_step_is_taken_where_the_budget_is_met_already():
    space = priced_space([3, 3], [10, 10])
    assert allocate(Budget(space, 60), [falling(3)] * 2, gamma=0).tolist() == [3, 3]


@pytest.mark.parametrize("multiple", [1, 4, 8])
@pytest.mark.parametrize("cut", [0.2, 0.5, 0.65])
def test_widths_are_legal_and_the_budget_is_met_and_used(multiple, cut):
    space = resnet20_space().with_limits(min_keep=0.1, multiple=multiple)
    budget = Budget.from_cut(space, cut)
    rng = np.random.default_rng(0)
    curves = [falling(group.num_filters, rng.uniform(0.1, 1)) for group in space.groups]
    widths = allocate(budget, curves, gamma=0)
    assert space.macs_of_widths(widths) <= budget.max_macs
    assert (widths >= space.min_widths).all()
    assert all(
        width % multiple == 0 or width == group.num_filters
        for width, group in zip(widths, space.groups, strict=True)
    )
    steps = np.where(widths < space.max_widths, multiple, 0)
    too_much = space.macs_of_widths(widths) + space.macs_increase(widths, steps)
    assert (too_much[steps > 0] > budget.max_macs).all()


def test_largest_widths_are_respected():
    space = chain_space([8, 12, 6]).with_limits(layers={"*": (0.1, 0.5)})
    curves = [falling(group.num_filters) for group in space.groups]
    assert allocate(Budget(space, space.dense_macs), curves, gamma=0).tolist() == [4, 6, 3]


def test_a_second_limit_takes_over_where_it_is_the_tighter_one():
    space = priced_space([10, 10], [1, 1], parameters=[1, 9])
    parameters = Limit("params", space.parameters_cost, 50)
    budget = Budget(space, 100, (parameters,))
    widths = allocate(budget, [falling(10), falling(10)], gamma=0)
    assert space.parameters_cost.total(widths) <= 50
    assert widths[1] < widths[0]  # its filters save nine times as much


def test_a_peak_of_memory_that_two_groups_share_falls():
    groups = tuple(ChannelGroup(name=f"g{i}", num_filters=8) for i in range(3))
    one = Width(constant=1)
    tensors = tuple(
        TensorSize(tensor=f"g{i}", per_pair=size, out_width=Width(terms=((i, 1),)), in_width=one)
        for i, size in enumerate([100, 100, 10])
    )
    costs = tuple(
        LayerCost(layer=f"g{i}", macs_per_pair=1, out_width=Width(terms=((i, 1),)), in_width=one)
        for i in range(3)
    )
    activations = Activations(tensors=tensors, moments=((0,), (1,), (2,)), num_groups=3)
    space = PruningSpace(groups, costs, activations=activations)
    budget = Budget.from_cut(space, 0, {"memory": 0.5})
    assert allocate(budget, [falling(8)] * 3, gamma=0).tolist() == [4, 4, 8]


def test_the_most_important_filters_are_kept():
    space = priced_space([3, 4], [1, 1])
    importance = np.array([0.2, 0.9, 0.5, 3.0, 1.0, 2.0, 3.0])
    keep = keep_most_important(space, np.array([2, 2]), importance)
    assert keep.tolist() == [False, True, True, True, False, False, True]


@pytest.mark.parametrize(
    ("curves", "gamma", "message"),
    [
        ([falling(3)], 0.0, "one error curve for each of the 2 groups"),
        ([falling(3), falling(4)], 0.0, r"shape \(4,\)"),
        ([falling(3), np.full(4, np.nan)], 0.0, "must be finite"),
        ([falling(3), falling(3)], -1.0, "gamma must be finite and >= 0"),
        ([falling(3), falling(3)], 1.0, "take gamma = 0"),
    ],
)
def test_what_does_not_fit_is_refused_with_a_way_out(curves, gamma, message):
    space = priced_space([3, 3], [1, 1])
    with pytest.raises(ValueError, match=message):
        allocate(Budget(space, 4), curves, gamma=gamma)
