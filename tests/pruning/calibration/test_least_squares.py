"""The refit: exact least squares, nothing changed where nothing is removed."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from calibrated_networks import (
    IMAGE,
    IMAGES,
    Chain,
    Concatenated,
    Depthwise,
    Flattened,
    Grouped,
    ReadTwice,
    Shuffled,
    Transposed,
    made,
    with_twin_filters,
)
from torch.nn import functional as F

from fppmo_ray.pruning import extract, trace
from fppmo_ray.pruning.calibration import Refit, calibrate, refit
from fppmo_ray.pruning.calibration.grams import RIDGE

NETWORKS = [
    Chain(),
    Chain(stride=2, dilation=2, padding=2),
    Chain(padding_mode="circular"),
    Concatenated(),
    Depthwise(),
    Flattened(),
    Grouped(),
    ReadTwice(),
    Shuffled(),
    Transposed(),
    Transposed(groups=2),
]


def random_mask(space, seed: int = 0) -> np.ndarray:
    keep = np.random.default_rng(seed).random(space.num_filters) < 0.6
    keep[space.offsets] = True
    return keep


def name_of(network) -> str:
    return type(network).__name__


def test_weights_are_the_least_squares_solution_of_all_patches():
    network = made(Chain())
    tracing = trace(network, IMAGE)
    keep = random_mask(tracing.space)
    pruned = extract(network, tracing, keep)
    refit(pruned, network, tracing, keep, calibrate(network, tracing, [IMAGES[:9], IMAGES[9:]]))
    kept, outputs = keep[:8], keep[8:]
    with torch.no_grad():
        inputs = F.relu(network.bn(network.first(IMAGES)))
        target = network.second(inputs)[:, outputs].movedim(1, -1).flatten(0, 2)
        patches = F.unfold(inputs, 3, padding=1).transpose(1, 2).flatten(0, 1)
        start = network.second.weight[outputs][:, kept].flatten(1)
    centred = patches - patches.mean(0)
    ridge = (RIDGE * centred.square().mean()) ** 0.5
    columns = torch.from_numpy(kept).repeat_interleave(9)
    # The ridge draws the new weights towards the old ones: as rows of the least-squares problem.
    rows = torch.cat([centred[:, columns] / len(centred) ** 0.5, ridge * torch.eye(len(start[0]))])
    right = torch.cat([(target - target.mean(0)) / len(centred) ** 0.5, ridge * start.T])
    solution = torch.linalg.lstsq(rows, right).solution.T
    assert torch.allclose(pruned.second.weight.flatten(1), solution, atol=1e-9)
    mean = patches[:, columns].mean(0)
    assert torch.allclose(pruned.second.bias, target.mean(0) - solution @ mean, atol=1e-9)


@pytest.mark.parametrize("network", NETWORKS, ids=name_of)
def test_a_network_that_loses_nothing_stays_the_same_to_the_bit(network):
    network = made(network)
    tracing = trace(network, IMAGE)
    keep = np.ones(tracing.space.num_filters, dtype=bool)
    same = extract(network, tracing, keep)
    refit(same, network, tracing, keep, calibrate(network, tracing, [IMAGES]))
    for before, after in zip(network.parameters(), same.parameters(), strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize(
    "network",
    [*NETWORKS[:3], Concatenated(), Depthwise(), Flattened(), ReadTwice()],
    ids=name_of,
)
def test_filters_that_others_can_stand_in_for_are_made_up_for(network):
    network = with_twin_filters(made(network))
    tracing = trace(network, IMAGE)
    keep = np.ones(tracing.space.num_filters, dtype=bool)
    keep[4:8] = False
    pruned = extract(network, tracing, keep)
    before = (pruned(IMAGES) - network(IMAGES)).norm() / network(IMAGES).norm()
    refit(pruned, network, tracing, keep, calibrate(network, tracing, [IMAGES]))
    after = (pruned(IMAGES) - network(IMAGES)).norm() / network(IMAGES).norm()
    assert after < 2e-3 < 0.05 < before


@pytest.mark.parametrize("network", NETWORKS, ids=name_of)
def test_the_layers_outputs_come_closer_to_the_dense_ones(network):
    network = made(network)
    tracing = trace(network, IMAGE)
    keep = random_mask(tracing.space)
    calibration = calibrate(network, tracing, [IMAGES])
    pruned = extract(network, tracing, keep)
    plain = copy.deepcopy(pruned)
    refit(pruned, network, tracing, keep, calibration)
    target = network(IMAGES)
    assert (pruned(IMAGES) - target).norm() < (plain(IMAGES) - target).norm()


def test_what_was_solved_for_a_layer_is_used_again():
    network = made(Chain())
    tracing = trace(network, IMAGE)
    calibration = calibrate(network, tracing, [IMAGES])
    fit = Refit(network, tracing, calibration)
    keep = random_mask(tracing.space)
    other = keep.copy()
    other[-1] = ~other[-1]  # the first group is the same, the second layer's outputs are not
    for mask in (keep, other, keep):
        pruned, fresh = (extract(network, tracing, mask) for _ in range(2))
        fit(pruned, mask)
        refit(fresh, network, tracing, mask, calibration)
        for one, two in zip(pruned.parameters(), fresh.parameters(), strict=True):
            assert torch.equal(one, two)
    assert len(fit._solved) == 3  # the second layer's inputs once, the head's twice


def test_the_cache_keeps_to_its_memory():
    network = made(Chain())
    tracing = trace(network, IMAGE)
    fit = Refit(network, tracing, calibrate(network, tracing, [IMAGES]), cache_bytes=4000)
    for seed in range(5):
        keep = random_mask(tracing.space, seed)
        fit(extract(network, tracing, keep), keep)
    assert 0 < sum(8 * (w.numel() + s.numel()) for w, s in fit._solved.values()) <= 4000


def test_another_masks_network_is_refused():
    network = made(Chain())
    tracing = trace(network, IMAGE)
    keep = random_mask(tracing.space)
    with pytest.raises(ValueError, match="expected a network whose"):
        refit(network, network, tracing, keep, calibrate(network, tracing, [IMAGES]))
