"""Networks with unusual modules: shared ones, derived or integer weights, kept activations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune as torch_prune

from fppmo_ray.pruning import Tracing, check_equivalence, extract, trace

IMAGE = torch.zeros(1, 3, 8, 8)


def head(channels: int) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 3))


def sizes(tracing: Tracing) -> dict[str, int]:
    return {group.name: group.num_filters for group in tracing.space.groups}


class Listed(nn.Module):
    """Its layers are attributes, and members of a list too."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3)
        self.head = head(6)
        self.stages = nn.ModuleList([self.one, self.two])

    def forward(self, images: Tensor) -> Tensor:
        for stage in self.stages:
            images = F.relu(stage(images))
        return self.head(images)


class Remembering(Listed):
    """It keeps its last activation, as perceptual losses and Grad-CAM do."""

    def forward(self, images: Tensor) -> Tensor:
        self.kept = {"features": [F.relu(self.one(images))]}
        return self.head(F.relu(self.two(self.kept["features"][0])))


class FixedWeights(nn.Module):
    """A convolution whose weights are a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randn(6, 8, 3, 3))

    def forward(self, images: Tensor) -> Tensor:
        return F.conv2d(images, self.weight)


def used_twice() -> nn.Module:
    again = nn.Conv2d(8, 8, 3, padding=1)
    layers = [nn.Conv2d(3, 8, 3), again, nn.ReLU(), again, nn.Conv2d(8, 6, 3), head(6)]
    return nn.Sequential(*layers)


def counting() -> nn.Module:
    network = Listed()
    network.steps = nn.Parameter(torch.tensor([3, 0]), requires_grad=False)
    return network


def masked() -> nn.Module:
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), head(6))
    torch_prune.l1_unstructured(network[0], "weight", 0.3)
    torch_prune.ln_structured(network[2], "weight", 0.3, 2, 0)
    return network


def after_a_pass() -> nn.Module:
    network = Remembering()
    network(torch.randn(2, 3, 8, 8))
    return network


NETWORKS = {
    "modules under two names": (Listed, {"one": 8, "two": 6}),
    "a module used twice": (used_twice, {"0": 8, "4": 6}),
    "an integer parameter": (counting, {"one": 8, "two": 6}),
    "masks of torch.nn.utils.prune": (masked, {"0": 8, "2": 6}),
    "a kept activation": (after_a_pass, {"one": 8, "two": 6}),
    "weights in a buffer": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), FixedWeights(), head(6)),
        {"0": 8, "2": 6},
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_unusual_networks_are_pruned_throughout(name: str) -> None:
    make, groups = NETWORKS[name]
    torch.manual_seed(0)
    network = make()
    tracing = trace(network, IMAGE)
    assert sizes(tracing) == groups
    assert tracing.left_whole == ()
    keep = np.arange(tracing.space.num_filters) % 2 == 0
    check_equivalence(network, tracing, IMAGE, keep=keep)
    smaller = extract(network, tracing, keep)
    sliced = {part.tensor for part in tracing.slices}
    state = smaller.state_dict()
    assert all(state[tensor].numel() < network.state_dict()[tensor].numel() for tensor in sliced)
    assert smaller(IMAGE).shape == (1, 3)


def test_a_masked_layer_has_the_width_of_its_weights() -> None:
    network = masked()
    tracing = trace(network, IMAGE)
    smaller = extract(network, tracing, np.arange(tracing.space.num_filters) % 2 == 0)
    assert repr(smaller[2]) == "Conv2d(4, 3, kernel_size=(3, 3), stride=(1, 1))"
    assert smaller[2].weight.shape == (3, 4, 3, 3)
