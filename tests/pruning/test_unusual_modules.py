"""Networks with unusual modules: shared ones, derived or integer weights, kept activations."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.nn.utils import prune as torch_prune

from fppmo_ray.pruning import (
    Tracing,
    check_equivalence,
    extract,
    importance,
    load_network,
    save_network,
    trace,
)
from fppmo_ray.pruning.one_call import prune

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


class Functional(nn.Module):
    """Its convolutions are functions, their weights no module's."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Parameter(torch.randn(8, 3, 3, 3))
        self.weights = nn.ParameterList([torch.randn(6, 8, 3, 3), torch.randn(4, 6, 3, 3)])
        self.out = nn.Parameter(torch.randn(3, 4))

    def forward(self, images: Tensor) -> Tensor:
        for weight in [self.stem, *self.weights]:
            images = F.relu(F.conv2d(images, weight, padding=1))
        return F.linear(images.mean((2, 3)), self.out)


class Tied(nn.Module):
    """Two layers have one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.two.weight = self.one.weight
        self.stem, self.head = nn.Conv2d(3, 8, 3), head(8)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.two(self.one(self.stem(images).relu()).relu()).relu())


class Autoencoder(Tied):
    """A transposed convolution has the weight of a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.two, self.down = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 6, 2, 2)

    def forward(self, images: Tensor) -> Tensor:
        features = self.down(self.one(self.stem(images).relu()).relu()).relu()
        up = F.conv_transpose2d(features, self.down.weight, stride=2)
        return self.head(self.two(up.relu()))


class FromOneToOne(nn.Module):
    """Convolutions from one channel to one, by a parameter and by a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.map = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 1, 1)
        self.smooth = nn.Conv2d(1, 1, 3, padding=1)
        self.register_buffer("blur", torch.rand(1, 1, 3, 3))

    def forward(self, images: Tensor) -> Tensor:
        smooth = F.conv2d(self.smooth(self.map(F.relu(self.features(images)))), self.blur)
        return smooth.flatten(1)[:, :3]


NETWORKS = {
    "functions with parameters": (Functional, {"stem": 8, "weights": 6, "weights (2)": 4}),
    "tied weights": (Tied, {"one": 8}),
    "from one channel to one": (FromOneToOne, {"features": 8}),
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


def test_a_weight_that_is_used_both_ways_stays_whole() -> None:
    with pytest.warns(UserWarning, match=r"one \(a tied weight .*; down \(a tied weight"):
        tracing = trace(Autoencoder(), IMAGE)
    assert tracing.left_whole == ("one", "down")
    assert sizes(tracing) == {"stem": 8, "two": 8}


@pytest.mark.filterwarnings("ignore:the inputs of these weights could not be observed")
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("criterion", ["obs", "l1"])
def test_unusual_networks_are_pruned_in_one_call(name: str, criterion) -> None:
    torch.manual_seed(0)
    network = NETWORKS[name][0]()
    images = torch.randn(16, 3, 8, 8)
    smaller = prune(network, IMAGE, images, macs_cut=0.3, importance=criterion)
    assert smaller(images).shape == (16, 3)
    assert sum(p.numel() for p in smaller.parameters()) <= sum(
        p.numel() for p in network.parameters()
    )


def test_filters_that_a_mask_zeroed_are_the_least_important() -> None:
    torch.manual_seed(0)
    network = masked()
    zeroed = network[2].weight_mask.flatten(1).sum(1) == 0
    assert zeroed.sum() == 2
    with torch.no_grad():
        network[2].weight_orig.mul_(network[2].weight_mask)
    values = importance(network, trace(network, IMAGE), "l1")[8:]
    assert values[zeroed.numpy()].max() < values[~zeroed.numpy()].min()


DERIVED = {
    "weight norm": parametrizations.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "weight norm by a hook": nn.utils.weight_norm,
    "spectral norm by a hook": nn.utils.spectral_norm,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("name", DERIVED)
def test_derived_weights_become_plain_ones_that_compute_the_same(name: str, tmp_path) -> None:
    def make() -> nn.Module:
        derive = DERIVED[name]
        first, second = derive(nn.Conv2d(3, 8, 3)), derive(nn.Conv2d(8, 6, 3))
        return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), head(6))

    torch.manual_seed(0)
    network, images = make(), torch.randn(2, 3, 8, 8)
    with pytest.warns(UserWarning, match="become plain parameters"):
        tracing = trace(network, IMAGE)
    assert sizes(tracing) == {"0": 8, "2": 6}
    everything = extract(network, tracing, np.ones(14, dtype=bool)).eval()
    assert type(everything[0]) is nn.Conv2d
    torch.testing.assert_close(everything(images), network.eval()(images))
    keep = np.arange(14) % 2 == 0
    check_equivalence(network, tracing, IMAGE, keep=keep)
    smaller = extract(network, tracing, keep).eval()
    path = save_network(smaller, tmp_path / "net", tracing=tracing, keep=keep)
    assert torch.equal(load_network(path, make)(images), smaller(images))
    assert {n: tuple(p.shape) for n, p in smaller[0].named_parameters()} == {
        "weight": (4, 3, 3, 3),
        "bias": (4,),
    }


class Quantised(nn.Module):
    """Two convolutions and linear layers, which are quantised to eight bits."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3)
        self.hidden, self.head = nn.Linear(6, 10), nn.Linear(10, 3)

    def forward(self, images: Tensor) -> Tensor:
        features = F.relu(self.two(F.relu(self.one(images)))).mean((2, 3))
        return self.head(F.relu(self.hidden(features)))


def dynamically_quantised(network: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates it
        return torch.ao.quantization.quantize_dynamic(network.eval(), {nn.Linear})


@pytest.mark.parametrize("seed", range(3))
@torch.no_grad()
def test_convolutions_before_quantised_layers_are_pruned_exactly(seed: int) -> None:
    torch.manual_seed(seed)
    network = dynamically_quantised(Quantised())
    with pytest.warns(UserWarning, match=r"two \(a quantised layer reads it.*quantise the smaller"):
        tracing = trace(network, IMAGE)
    assert sizes(tracing) == {"one": 8}
    keep = np.random.default_rng(seed).permutation(8) < 4
    masked = copy.deepcopy(network)
    masked.two.weight[:, torch.from_numpy(~keep)] = 0
    images = torch.randn(16, 3, 8, 8)
    # Rounding may move an activation to the next of 256 levels.
    torch.testing.assert_close(
        extract(network, tracing, keep)(images), masked(images), atol=0.01, rtol=0
    )


def test_a_network_of_which_quantised_layers_read_all_filters_is_refused_with_a_way_out() -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3), head(8))
    with pytest.raises(ValueError, match="prune the floating-point network and quantise the"):
        trace(dynamically_quantised(network), IMAGE)
