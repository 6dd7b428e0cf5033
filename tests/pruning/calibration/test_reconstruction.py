"""The reconstruction: errors of earlier layers are made up for, and nothing else is changed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from calibrated_networks import (
    IMAGE,
    Chain,
    Concatenated,
    Depthwise,
    Flattened,
    Grouped,
    Shuffled,
    Transposed,
    made,
)
from torch import nn
from torch.nn import functional as F

from fppmo_ray.pruning import extract, trace
from fppmo_ray.pruning.calibration import (
    calibrate,
    layer_targets,
    reconstruct,
    refit,
)
from fppmo_ray.pruning.calibration.layer_outputs import Place, find_places
from fppmo_ray.training import recalibrate_batchnorm


class Residual(nn.Module):
    """A block whose shortcut has a convolution that runs after the branch."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.first = nn.Conv2d(8, 10, 3, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(10)
        self.second = nn.Conv2d(10, 12, 3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(12)
        self.shortcut = nn.Conv2d(8, 12, 1, bias=False)
        self.shortcut_norm = nn.BatchNorm2d(12)
        self.head = nn.Linear(12, 4)

    def forward(self, images):
        images = F.relu_(self.norm(self.stem(images)))
        features = F.relu_(self.first_norm(self.first(images)))
        features = self.second_norm(self.second(features))
        features += self.shortcut_norm(self.shortcut(images))
        return self.head(F.relu_(features).mean((2, 3)))


class Shortcut(nn.Module):
    """A shortcut that multiplies by a number."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Conv2d(3, 3, 1)
        self.first = nn.Conv2d(3, 6, 1)
        self.head = nn.Linear(6, 4)
        self.register_buffer("gain", torch.tensor(0.0))

    def forward(self, images):
        images = images * self.gain + self.branch(images)
        return self.head(F.relu(self.first(images)).mean((2, 3)))


NETWORKS = [Chain(), Concatenated(), Depthwise(), Flattened(), Grouped(), Shuffled(), Residual()]


def images(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, *IMAGE.shape[1:], generator=generator, dtype=torch.float64)


def name_of(network) -> str:
    return type(network).__name__


def trained(network: nn.Module) -> nn.Module:
    network = made(network)
    recalibrate_batchnorm(network, [images(64)])  # as training would have left it
    return network


@pytest.mark.parametrize("network", [*NETWORKS, Transposed(groups=2)], ids=name_of)
def test_a_network_that_loses_nothing_stays_the_same_to_the_bit(network):
    network = trained(network)
    tracing = trace(network, IMAGE)
    keep = np.ones(tracing.space.num_filters, dtype=bool)
    same = extract(network, tracing, keep)
    reconstruct(same, tracing, keep, layer_targets(network, tracing, [images(20)]))
    for before, after in zip(network.parameters(), same.parameters(), strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize("network", NETWORKS, ids=name_of)
def test_the_answers_to_unseen_images_come_nearer_to_the_dense_networks(network):
    network = trained(network)
    tracing = trace(network, IMAGE)
    seen, unseen = images(100), images(50, seed=1)
    targets = layer_targets(network, tracing, [seen])
    calibration = calibrate(network, tracing, [seen])
    before, after = [], []
    for seed in range(3):
        keep = np.random.default_rng(seed).random(tracing.space.num_filters) < 0.6
        keep[tracing.space.offsets] = True
        pruned = extract(network, tracing, keep).eval()
        refit(pruned, network, tracing, keep, calibration)
        recalibrate_batchnorm(pruned, [seen])
        with torch.no_grad():
            before.append((pruned(unseen) - network(unseen)).square().mean())
            reconstruct(pruned, tracing, keep, targets)
            after.append((pruned(unseen) - network(unseen)).square().mean())
    assert sum(after) < 0.9 * sum(before)


def test_a_layer_makes_up_for_the_error_of_the_other_branch():
    dense = Shortcut().double().eval()
    tracing = trace(dense, IMAGE, ignore=["branch"])
    keep = np.ones(tracing.space.num_filters, dtype=bool)
    other = extract(dense, tracing, keep)
    other.gain.fill_(1.0)
    with torch.no_grad():
        reconstruct(other, tracing, keep, layer_targets(dense, tracing, [images(100)]))
    expected = dense.branch.weight[:, :, 0, 0] - torch.eye(3)  # takes the shortcut's part away
    assert torch.allclose(other.branch.weight[:, :, 0, 0], expected, atol=0.02)
    assert torch.allclose(other(images(3)), dense(images(3)), atol=0.02)


def test_the_sum_belongs_to_the_wider_layer_of_the_two_that_are_added():
    assert find_places(Residual().eval(), [torch.randn(2, 3, 8, 8)]) == [
        Place(layer="stem", norm="norm", is_summand=False),
        Place(layer="first", norm="first_norm", is_summand=False),
        Place(layer="second", norm="second_norm", is_summand=True),
        Place(layer="shortcut", norm="shortcut_norm", is_summand=False),
        Place(layer="head", norm=None, is_summand=False),
    ]


def test_batch_norms_end_with_the_statistics_of_the_images():
    network = trained(Residual())
    tracing = trace(network, IMAGE)
    keep = np.ones(tracing.space.num_filters, dtype=bool)
    keep[tracing.space.offsets + 1] = False
    pruned = extract(network, tracing, keep).eval()
    seen = images(100)
    reconstruct(pruned, tracing, keep, layer_targets(network, tracing, [seen]))
    with torch.no_grad():
        answer = pruned(seen)
        in_training = pruned.train()(seen)
    assert torch.allclose(in_training, answer, atol=0.03 * float(answer.std()))


@pytest.mark.parametrize("count", [10, 12, 14, 16, 19, 51, 251])
def test_any_number_of_images_from_ten_on_has_some_to_fit_on_and_some_to_choose_by(count):
    network = trained(Chain())
    tracing = trace(network, IMAGE)
    keep = np.ones(tracing.space.num_filters, dtype=bool)
    keep[tracing.space.offsets + 1] = False
    targets = layer_targets(network, tracing, [images(count)])
    assert len(targets.batches) >= 5
    assert sum(len(inputs) for (inputs,) in targets.batches) == count
    pruned = extract(network, tracing, keep).eval()
    reconstruct(pruned, tracing, keep, targets)
    assert all(torch.isfinite(tensor).all() for tensor in pruned.state_dict().values())


def test_fewer_than_ten_images_or_too_little_memory_give_no_targets():
    network = trained(Chain())
    tracing = trace(network, IMAGE)
    assert layer_targets(network, tracing, [images(9)]) is None
    assert layer_targets(network, tracing, [images(100)], max_bytes=100_000) is None
    some = layer_targets(network, tracing, [images(100)], max_bytes=1_000_000)
    assert 10 <= sum(len(inputs) for (inputs,) in some.batches) < 100
