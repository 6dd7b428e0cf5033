"""Weights that are cast to float64 only while their layer computes."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fppmo_ray.pruning import check_equivalence, shape_only, trace
from fppmo_ray.pruning.cast_on_use import CastOnUse, castable_weights

IMAGE = torch.zeros(1, 3, 8, 8)


class Own(nn.Conv2d):
    """A kind of layer that is not torch's."""


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.second, self.hidden = nn.Conv2d(8, 6, 3), nn.Linear(6, 10)
        self.head = nn.Linear(10, 4)

    def forward(self, images: Tensor) -> Tensor:
        features = torch.tanh(self.second(torch.tanh(self.bn(self.first(images)))))
        return self.head(torch.tanh(self.hidden(features.mean((2, 3)))))


class AsksForPrecision(Net):
    """Casts its images to the precision of a weight, as networks in half precision do."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images.to(self.first.weight.dtype))


class ReadsElsewhere(Net):
    """Multiplies its output by the weight of a layer that is called, too."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(3, 4)

    def forward(self, images: Tensor) -> Tensor:
        scale = self.gate(images.mean((2, 3))) * self.gate.weight[:, 0]
        return super().forward(images) * scale


class Clamps(Net):
    """Bounds its own weights in every pass."""

    def forward(self, images: Tensor) -> Tensor:
        self.hidden.weight.data.clamp_(-0.1, 0.1)
        return super().forward(images)


def test_only_matrices_that_one_layer_of_torch_holds_are_cast_on_use() -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3), Own(8, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(1, 8, 1), nn.Linear(8, 8)
    )
    network.append(nn.Linear(8, 8))
    network[5].weight = network[4].weight
    assert list(castable_weights(network)) == ["0.weight"]


@torch.no_grad()
def test_a_layer_computes_as_if_its_weight_had_float64() -> None:
    network, images = Net().eval(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    before = {name: (id(p), p.clone()) for name, p in network.named_parameters()}
    expected = copy.deepcopy(network).double()
    expected.second.weight[:, [1, 4]] = 0
    narrow = castable_weights(network)
    for name, parameter in network.named_parameters():
        parameter.data = parameter.data.double() if name not in narrow else parameter.data
    network.bn.double()
    zeroed = {id(network.second.weight): [(1, torch.tensor([1, 4]))]}
    with CastOnUse().within(network, zeroed):
        assert torch.equal(network(images), expected(images))
    for name in narrow:
        weight = network.get_parameter(name)
        assert (id(weight), weight.dtype) == (before[name][0], torch.float32)
        assert torch.equal(weight, before[name][1])


@torch.no_grad()
def test_weights_are_put_back_when_a_layer_fails() -> None:
    network = Net().eval()
    weight = network.hidden.weight
    with pytest.raises(RuntimeError), CastOnUse().within(network):
        network.hidden(torch.zeros(1, 5, dtype=torch.float64))
    assert network.hidden.weight is weight


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("kind", [Net, Clamps])
@pytest.mark.parametrize("zeros", [False, True])
def test_tracing_changes_no_weight(
    kind: type[Net], zeros: bool, large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if large:
        monkeypatch.setattr(shape_only, "_LARGE", 0)
        monkeypatch.setattr(shape_only, "_PER_LAYER", 0)
    network = kind()
    with torch.no_grad():
        network.hidden.weight[:, ::2] *= 0 if zeros else 1
    before = copy.deepcopy(network.state_dict())
    versions = [parameter._version for parameter in network.parameters()]
    trace(network, IMAGE)
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert [parameter._version for parameter in network.parameters()] == versions


@pytest.mark.parametrize("kind", [AsksForPrecision, ReadsElsewhere])
def test_a_network_that_reads_weights_outside_of_layers_is_proven_in_float64(kind) -> None:
    network = kind()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a lower precision would be remarked on
        tracing = trace(network, IMAGE)
    assert len(tracing.space.groups) == 3
    check_equivalence(network, tracing, IMAGE)


@pytest.mark.parametrize("kind", [Net, AsksForPrecision, ReadsElsewhere])
def test_two_swapped_indices_of_any_tensor_are_found(kind) -> None:
    torch.manual_seed(0)
    network = kind()
    tracing = trace(network, IMAGE)
    keep = np.ones(tracing.space.num_filters, dtype=bool)
    keep[[2, 9, 15]] = False
    check_equivalence(network, tracing, IMAGE, keep=keep)
    for part in tracing.slices:
        right = part.units.copy()
        part.units[:2] = right[1::-1]
        keep[:] = True
        keep[right[0]] = False  # one of the two goes, and the other stays
        with pytest.raises(ValueError, match="off by"):
            check_equivalence(network, tracing, IMAGE, keep=keep)
        part.units[:] = right
