"""The OBS order: equal to removing, at each step, the filter of least least-squares error."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from calibrated_networks import (
    IMAGE,
    IMAGES,
    Chain,
    Concatenated,
    Doubled,
    Flattened,
    Grouped,
    ReadTwice,
    Shuffled,
    Transposed,
    made,
    with_twin_filters,
)
from torch import nn

from fppmo_ray.pruning import trace
from fppmo_ray.pruning.calibration import calibrate, obs_order
from fppmo_ray.pruning.calibration.consumers import weight_matrix


def error_without(network: nn.Module, calibration, removed: list[int]) -> float:
    """The relative error of the best weights without some filters, solved anew from the Grams."""
    error = 0.0
    for gram in calibration.grams:
        ((_, block),) = gram.blocks
        matrix = weight_matrix(network.get_submodule(gram.consumer.modules[0]))
        units = np.tile(gram.consumer.units[0], gram.consumer.num_taps)
        stays = torch.from_numpy(~np.isin(units, removed))
        lost = left = 0.0
        for M, G in zip(matrix, block, strict=True):
            fitted = M @ G[:, stays] @ torch.linalg.inv(G[stays][:, stays])
            change = M.clone()
            change[:, stays] -= fitted
            lost += float((change @ G * change).sum())
            left += float((M @ G * M).sum())
        error += lost / left
    return error


@pytest.mark.parametrize(
    "network",
    [Chain(), Concatenated(), Flattened(), Grouped(), Shuffled(), Transposed(2), ReadTwice()],
    ids=lambda network: type(network).__name__,
)
def test_each_step_removes_the_filter_of_least_error(network, monkeypatch):
    monkeypatch.setattr("fppmo_ray.pruning.calibration.filter_order._PENDING_COLUMNS", 20)
    network = made(network)
    tracing = trace(network, IMAGE)
    calibration = calibrate(network, tracing, [IMAGES])
    order = obs_order(network, tracing, calibration)
    for group, offset, curve in zip(
        tracing.space.groups, tracing.space.offsets, order.error_curves, strict=True
    ):
        left = list(range(offset, offset + group.num_filters))
        removed: list[int] = []
        for width in reversed(range(group.num_filters)):
            best = min(left, key=lambda unit: error_without(network, calibration, [*removed, unit]))
            left.remove(best)
            removed.append(best)
            assert order.importance[best] == pytest.approx(len(removed) / group.num_filters)
            expected = error_without(network, calibration, removed)
            assert curve[width] == pytest.approx(expected, rel=1e-8, abs=1e-12)


def test_all_filters_of_the_only_reader_are_all_of_the_variance():
    network = made(Chain())
    tracing = trace(network, IMAGE)
    order = obs_order(network, tracing, calibrate(network, tracing, [IMAGES]))
    for curve in order.error_curves:
        assert curve[0] == pytest.approx(1, rel=1e-9)
        assert curve[-1] == 0
        assert (np.diff(curve) <= 0).all()


def test_one_filter_of_each_equal_pair_goes_first_and_costs_nothing():
    network = with_twin_filters(made(Chain()))
    tracing = trace(network, IMAGE)
    order = obs_order(network, tracing, calibrate(network, tracing, [IMAGES]))
    first = order.importance[:8]
    assert all(min(first[i], first[i + 4]) <= 0.5 < max(first[i], first[i + 4]) for i in range(4))
    assert order.error_curves[0][4] < 1e-3 < order.error_curves[0][3]


def test_the_scale_of_the_inputs_does_not_matter():
    orders = []
    for scale in (1.0, 1e-18, 1e18):
        torch.manual_seed(0)
        first, second = nn.Conv2d(3, 60, 3).double(), nn.Conv2d(60, 60, 1).double()
        network = nn.Sequential(first, nn.ReLU(), second)
        with torch.no_grad():
            for parameter in first.parameters():
                parameter *= scale
        tracing = trace(network, IMAGE)
        orders.append(obs_order(network, tracing, calibrate(network, tracing, [IMAGES])))
    for order in orders[1:]:
        assert order.importance.tolist() == orders[0].importance.tolist()
        assert np.allclose(order.error_curves[0], orders[0].error_curves[0], rtol=1e-6)


def test_a_given_order_is_followed_and_only_measured():
    network = made(Chain())
    tracing = trace(network, IMAGE)
    calibration = calibrate(network, tracing, [IMAGES])
    importance = np.random.default_rng(0).random(tracing.space.num_filters)
    order = obs_order(network, tracing, calibration, importance=importance)
    assert np.argsort(order.importance[:8]).tolist() == np.argsort(importance[:8]).tolist()
    removed = np.argsort(importance[:8])[:3].tolist()
    assert order.error_curves[0][5] == pytest.approx(error_without(network, calibration, removed))
    with pytest.raises(ValueError, match="one number per filter"):
        obs_order(network, tracing, calibration, importance=importance[1:])


def test_split_columns_give_about_the_same_order():
    network = made(Flattened())
    tracing = trace(network, IMAGE)
    whole = calibrate(network, tracing, [IMAGES])
    split = calibrate(network, tracing, [IMAGES], max_bytes=whole.num_bytes // 2)
    exact, approximate = (obs_order(network, tracing, part) for part in (whole, split))
    assert sorted(approximate.importance[8:]) == sorted(exact.importance[8:])
    assert approximate.error_curves[1][0] == pytest.approx(1, rel=1e-9)


def test_where_inputs_are_not_seen_the_size_of_weights_decides():
    network = made(Doubled())
    tracing = trace(network, IMAGE)
    with pytest.warns(UserWarning, match="could not be observed"):
        calibration = calibrate(network, tracing, [IMAGES])
    order = obs_order(network, tracing, calibration)
    sizes = network.second.weight.detach().square().sum((0, 2, 3)).numpy()
    assert np.argsort(order.importance[:8]).tolist() == np.argsort(sizes).tolist()
    shares = np.sort(sizes) / sizes.sum()
    assert order.error_curves[0][5] == pytest.approx(shares[:3].sum())
