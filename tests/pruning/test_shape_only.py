"""Large networks: passes without numbers, and proofs that spare passes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fppmo_ray.pruning import Tracing, check_equivalence, shape_only, trace
from fppmo_ray.pruning.copying import WorkingCopy
from fppmo_ray.pruning.coupling import couple
from fppmo_ray.pruning.shape_only import ShapeOnly, is_large, worthwhile

IMAGE = torch.zeros(1, 3, 8, 8)


class Attentive(nn.Module):
    """A convolution, batch norm, attention and a hidden layer; 8 heads of one channel."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.bn = nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.hidden, self.head = nn.Linear(8, 12), nn.Linear(12, 4)

    def forward(self, images: Tensor) -> Tensor:
        tokens = F.relu(self.bn(self.first(images))).flatten(2).transpose(1, 2)
        attended = self.attention(tokens, tokens, tokens, need_weights=False)[0]
        return self.head(F.relu(self.hidden(attended)).mean(1))


class Choosing(nn.Module):
    """Its code asks for values."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3)
        self.head = nn.Linear(6, 4)

    def forward(self, images: Tensor) -> Tensor:
        scale = 2.0 if float(images.mean()) > 100 else 1.0
        return self.head(F.relu(self.second(F.relu(self.first(images)))).mean((2, 3))) * scale


class Mixing(Choosing):
    """Sums over the images of a batch."""

    def forward(self, images: Tensor) -> Tensor:
        features = F.relu(self.second(F.relu(self.first(images)))).mean((2, 3))
        return self.head(features + features.sum(0, keepdim=True))


@pytest.fixture
def _all_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shape_only, "_LARGE", 0)
    monkeypatch.setattr(shape_only, "_PER_LAYER", 0)


def told(tracing: Tracing) -> object:
    space = tracing.space
    return (
        space.groups,
        space.layer_costs,
        space.constant_macs,
        [(part.tensor, part.axis, part.units.tolist(), part.side) for part in tracing.slices],
        tracing.left_whole,
    )


@pytest.mark.filterwarnings("ignore:channel groups left whole")
@pytest.mark.parametrize("make", [Attentive, Choosing, Mixing])
def test_large_networks_are_traced_as_small_ones_are(make, monkeypatch) -> None:
    torch.manual_seed(0)
    network = make()
    small = trace(network, IMAGE)
    monkeypatch.setattr(shape_only, "_LARGE", 0)
    monkeypatch.setattr(shape_only, "_PER_LAYER", 0)
    large = trace(network, IMAGE)
    assert told(large) == told(small)
    check_equivalence(network, large, IMAGE)


def test_dependencies_and_memory_are_the_same_without_numbers() -> None:
    network = Attentive()
    shapes = ShapeOnly(network)
    with_numbers = couple(WorkingCopy(network), (IMAGE,))
    copy = WorkingCopy(shapes.network)
    vars(copy)["network"] = shapes.network
    without = shapes.attempt(lambda *given: couple(copy, given), (IMAGE,))
    assert without is not None
    assert without.moments == with_numbers.moments
    assert without.constant_macs == with_numbers.constant_macs
    for one, other in zip(without.axes, with_numbers.axes, strict=True):
        assert one.axis == other.axis
        assert np.array_equal(one.units, other.units)
    assert all(type(value) is nn.Parameter for value in network.parameters())


def test_a_network_that_asks_for_values_needs_numbers() -> None:
    shapes = ShapeOnly(Choosing())
    assert shapes.attempt(shapes.network, (IMAGE,)) is None


@pytest.mark.usefixtures("_all_large")
def test_one_wrong_index_of_a_large_network_is_found() -> None:
    network = Attentive()
    with pytest.warns(UserWarning, match="left whole"):
        tracing = trace(network, IMAGE)
    part = next(part for part in tracing.slices if part.tensor == "hidden.bias")
    part.units[:2] = part.units[1::-1]
    with pytest.raises(ValueError, match="off by"):
        check_equivalence(network, tracing, IMAGE)


@pytest.mark.usefixtures("_all_large")
def test_groups_of_a_large_network_that_are_not_exact_stay_whole() -> None:
    class Hidden(Choosing):
        """Ties images to channels at a place that only a batch of two shows."""

        def forward(self, images: Tensor) -> Tensor:
            features = F.relu(self.first(images))
            if len(images) > 1:
                features = features / features.detach().numpy().shape[1]
            return self.head(F.relu(self.second(features)).mean((2, 3)))

    with pytest.warns(UserWarning, match=r"left whole.*first \("):
        tracing = trace(Hidden(), IMAGE)
    assert [group.name for group in tracing.space.groups] == ["second"]


def test_large_is_a_matter_of_parameters_and_pixels() -> None:
    wide = nn.Sequential(nn.Conv2d(3, 1000, 3), nn.Conv2d(1000, 1000, 3))
    inputs = (torch.zeros(1, 3, 512, 512),)
    assert is_large(wide, inputs)
    assert worthwhile(wide, inputs)
    assert not is_large(wide, (torch.zeros(1, 3, 32, 32),))
    deep = nn.Sequential(*[nn.Identity() for _ in range(300)], wide)
    assert is_large(deep, inputs)
    assert not worthwhile(deep, inputs)
