"""The space of masks and its arithmetic."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from planted_optimum import chain_space, resnet20_space

from fppmo_ray.distribution import ChannelGroup, LayerCost, PruningSpace, Width, legal_min_width
from fppmo_ray.distribution.space import TensorSize

ONE = Width(constant=1)


def test_macs_follow_from_the_kept_widths():
    space = chain_space([4, 6])
    keep = np.array([1, 0, 1, 0, 1, 1, 1, 0, 0, 0], dtype=bool)
    assert space.widths(keep).tolist() == [2, 3]
    assert space.macs(keep) == 9 * (2 * 3 + 3 * 2 + 10 * 3)
    assert space.dense_macs == 9 * (4 * 3 + 6 * 4 + 10 * 6)


def test_the_costs_of_several_masks_are_those_of_each():
    sizes = (TensorSize(tensor="w", per_pair=9, out_width=Width(terms=((0, 1),)), in_width=ONE),)
    space = replace(chain_space([4, 6]), tensor_sizes=sizes, constant_macs=5, constant_parameters=7)
    masks = np.array([[1, 0, 1, 0, 1, 1, 1, 0, 0, 0], [1] * 10, [0, 1] * 5], dtype=bool)
    assert space.macs_of_masks(masks) == [9 * 42 + 5, 9 * 96 + 5, 9 * (6 + 6 + 30) + 5]
    assert space.macs_of_masks(masks) == [space.macs(keep) for keep in masks]
    assert space.parameters_of_masks(masks) == [9 * 2 + 7, 9 * 4 + 7, 9 * 2 + 7]
    assert space.parameters_of_masks(masks) == [space.parameters(keep) for keep in masks]


def test_macs_of_a_concatenated_input_and_of_constant_work():
    cost = LayerCost(
        layer="conv",
        macs_per_pair=2,
        out_width=Width(constant=1, terms=((0, 1),)),
        in_width=Width(terms=((0, 1), (1, 4))),
    )
    groups = (ChannelGroup(name="a", num_filters=2), ChannelGroup(name="b", num_filters=3))
    space = PruningSpace(groups, (cost,), constant_macs=7)
    assert space.macs_of_widths(np.array([2, 1])) == 2 * (1 + 2) * (2 + 4) + 7


def test_dense_macs_of_resnet20_are_those_of_the_literature():
    assert resnet20_space().dense_macs == pytest.approx(40.6e6, rel=0.01)


@pytest.mark.parametrize("group", range(9))
def test_the_cost_of_widening_a_group_is_exact(group):
    space = resnet20_space()
    widths = np.array([3, 5, 5, 23, 14, 5, 60, 30, 34])
    steps = np.zeros(9, dtype=np.int64)
    steps[group] = 3
    difference = space.macs_of_widths(widths + steps) - space.macs_of_widths(widths)
    assert space.macs_increase(widths, steps)[group] == difference


def test_the_cost_of_widening_counts_a_group_on_both_sides_of_a_layer():
    both = Width(constant=1, terms=((0, 2),))
    cost = LayerCost(layer="conv", macs_per_pair=5, out_width=both, in_width=both)
    space = PruningSpace((ChannelGroup(name="a", num_filters=9),), (cost,))
    # 5 * (2 * 7 + 1)^2 - 5 * (2 * 4 + 1)^2
    assert space.macs_increase(np.array([4]), np.array([3])).tolist() == [1125 - 405]


def test_expected_macs_are_exact_at_whole_widths():
    space = chain_space([4, 6])
    assert space.expected_macs(np.array([2.0, 3.0])) == space.macs_of_widths(np.array([2, 3]))


@pytest.mark.parametrize(
    ("num_filters", "min_keep", "multiple", "smallest"),
    [(64, 7, 1, 7), (64, 7, 8, 8), (64, 9, 8, 16), (6, 1, 8, 6), (16, 16, 8, 16)],
)
def test_the_smallest_legal_width_respects_min_keep_and_multiple(
    num_filters, min_keep, multiple, smallest
):
    group = ChannelGroup(name="a", num_filters=num_filters, min_keep=min_keep, multiple=multiple)
    assert legal_min_width(group) == smallest


def test_limits_keep_a_tenth_of_every_group_and_one_filter_at_least():
    space = chain_space([4, 16, 64], min_keep=0.1)
    assert [group.min_keep for group in space.groups] == [1, 2, 7]
    assert space.min_macs == 9 * (1 * 3 + 2 * 1 + 7 * 2 + 10 * 7)


def test_fingerprints_are_the_recorded_ones():
    space = resnet20_space()
    assert space.with_limits(min_keep=0.2, multiple=8).fingerprint() == (
        "00139e9c6af50a47a8adb7fa1f888581b89e07c06e3d1c95dbf10c38e7df9d02"
    )
    assert space.with_limits(layers={"layer?.0": (0.5, 0.75)}).fingerprint() == (
        "aa10bd1d50bdcb6a481c2b5be6927e4d5278d550e7c8ef1b3ad95f528de684e5"
    )


def test_spaces_of_different_limits_have_different_fingerprints():
    space = resnet20_space()
    assert space.fingerprint() != space.with_limits(multiple=8).fingerprint()


def test_only_wide_groups_have_multiples_of_eight_where_that_is_asked_for():
    groups = tuple(
        ChannelGroup(name=f"conv{number}", num_filters=number) for number in (16, 63, 64, 256)
    )
    space = PruningSpace(groups, ()).with_limits(multiple="wide")
    assert [group.multiple for group in space.groups] == [1, 1, 8, 8]
    for wrong in (0, "narrow"):
        with pytest.raises(ValueError, match=f"multiple must be 'wide' or .* got {wrong!r}"):
            space.with_limits(multiple=wrong)


@pytest.mark.parametrize("min_keep", [0.0, -0.1, 1.5, float("nan")])
def test_a_min_keep_out_of_range_is_refused(min_keep):
    with pytest.raises(ValueError, match=r"min_keep must be in \(0, 1\]"):
        resnet20_space().with_limits(min_keep=min_keep)


def test_layers_have_limits_of_their_own_and_the_last_that_fits_counts():
    space = resnet20_space().with_limits(
        min_keep=0.1, layers={"layer?.0": (0.5, 0.75), "layer3.*": (1.0, 1.0)}
    )
    limits = {group.name: (group.min_keep, group.max_keep) for group in space.groups}
    assert limits["layer1.0"] == (8, 12)
    assert limits["layer2.0"] == (16, 24)
    assert limits["layer3.0"] == limits["layer3.1"] == (64, None)
    assert limits["layer1.1"] == (2, None)


def test_a_layer_is_found_by_any_name_that_its_group_goes_by():
    groups = (ChannelGroup(name="stem", num_filters=8),)
    width = Width(terms=((0, 1),))
    costs = tuple(
        LayerCost(layer=layer, macs_per_pair=9, out_width=width, in_width=Width(constant=3))
        for layer in ("stem", "block.conv2")
    )
    space = PruningSpace(groups, costs).with_limits(layers={"block.conv2": (0.5, 1.0)})
    assert space.groups[0].min_keep == 4


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"layer9": (0.5, 1.0)}, r"no channel group holds filters of 'layer9'; the groups are"),
        (
            {"layer1.0.conv1": (0.9, 0.5)},
            r"limits of layer1\.0\.conv1 must be shares .* 0\.9 and 0\.5",
        ),
        ({"layer1.0": (0.0, 0.5)}, "must be shares 0 < smallest"),
        ({"layer1.0": (0.5, 1.5)}, "must be shares 0 < smallest"),
    ],
)
def test_limits_of_layers_that_make_no_sense_are_refused(layers, message):
    with pytest.raises(ValueError, match=message):
        resnet20_space().with_limits(layers=layers)


@pytest.mark.parametrize(
    "changes", [{"min_keep": 0}, {"min_keep": 9}, {"multiple": 0}, {"min_keep": 4, "max_keep": 3}]
)
def test_a_group_with_impossible_limits_is_refused(changes):
    with pytest.raises(ValueError, match="of group a must be"):
        ChannelGroup(name="a", num_filters=8, **changes)


def test_a_space_without_groups_is_refused():
    with pytest.raises(ValueError, match="at least one channel group"):
        PruningSpace((), ())
