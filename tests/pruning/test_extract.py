"""Extraction by index selection, and its inverse: scattering into the dense shape."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from fppmo_ray.pruning import extract, trace
from fppmo_ray.pruning.scatter import scatter
from fppmo_ray.pruning.twin import randomised_copy
from fppmo_ray.training.networks import resnet20

SMALL_IMAGE = torch.zeros(1, 3, 16, 16)


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return resnet20(shortcut="B")


@pytest.fixture(scope="module")
def tracing(network):
    return trace(network, SMALL_IMAGE)


def test_the_full_mask_gives_an_equal_network_of_its_own(network, tracing) -> None:
    same = extract(network, tracing, np.ones(tracing.space.num_filters, dtype=bool))
    assert type(same) is type(network)
    state = same.state_dict()
    assert state.keys() == network.state_dict().keys()
    for name, tensor in network.state_dict().items():
        assert torch.equal(state[name], tensor)
        assert state[name].data_ptr() != tensor.data_ptr()
    assert repr(same) == repr(network)


def test_kept_weights_are_those_of_the_mask(network, tracing) -> None:
    keep = np.ones(tracing.space.num_filters, dtype=bool)
    names = [group.name for group in tracing.space.groups]
    start = tracing.space.offsets[names.index("layer1.0.conv1")]
    keep[start : start + 16] = [True, False] * 8
    block = extract(network, tracing, keep).layer1[0]
    dense = network.layer1[0]
    assert torch.equal(block.conv1.weight, dense.conv1.weight[::2])
    assert torch.equal(block.bn1.running_var, dense.bn1.running_var[::2])
    assert torch.equal(block.conv2.weight, dense.conv2.weight[:, ::2])
    assert (block.conv1.out_channels, block.bn1.num_features, block.conv2.in_channels) == (8, 8, 8)
    assert (block.conv2.out_channels, block.conv1.in_channels) == (16, 16)


def test_modes_dtype_gradients_and_hooks_are_kept(tracing) -> None:
    network = resnet20(shortcut="B").to(torch.float64).eval()
    network.layer1.train()
    network.conv1.weight.requires_grad_(False)
    calls: list[int] = []
    network.linear.register_forward_hook(lambda *_: calls.append(1))
    keep = np.arange(tracing.space.num_filters) % 2 == 0
    smaller = extract(network, tracing, keep)
    assert [module.training for module in smaller.modules()] == [
        module.training for module in network.modules()
    ]
    assert {tensor.dtype for tensor in smaller.parameters()} == {torch.float64}
    assert not smaller.conv1.weight.requires_grad
    assert smaller.layer1[0].conv1.weight.requires_grad
    assert smaller.conv1.weight.is_leaf
    smaller.eval()(SMALL_IMAGE.double())
    assert calls == [1]


def test_training_the_smaller_network_leaves_the_dense_one_alone(network, tracing) -> None:
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    smaller = extract(network, tracing, np.arange(tracing.space.num_filters) % 2 == 0).train()
    optimizer = torch.optim.SGD(smaller.parameters(), lr=0.1)
    smaller(torch.randn(4, 3, 16, 16)).sum().backward()
    optimizer.step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_bad_masks_and_other_networks_are_refused(network, tracing) -> None:
    size = tracing.space.num_filters
    emptied = np.ones(size, dtype=bool)
    emptied[:16] = False
    for keep, message in [
        (np.ones(size), "array of bool"),
        ([True] * size, "array of bool"),
        (np.ones(size - 1, dtype=bool), "another network"),
        (emptied, "removes all 16 filters of group conv1"),
    ]:
        with pytest.raises(ValueError, match=message):
            extract(network, tracing, keep)
    with pytest.raises(ValueError, match="architecture that was traced"):
        extract(nn.Sequential(nn.Conv2d(3, 4, 1)), tracing, np.ones(size, dtype=bool))


IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)).double()


class Shared(nn.Module):
    """A linear layer behind a flattened map, and a convolution that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.twice = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8 * 14 * 14, 4)

    def forward(self, images):
        features = self.norm(self.first(images)).relu()
        return self.head((self.twice(features) + self.twice(features.flip(3))).flatten(1))


@pytest.mark.parametrize("make", [lambda: resnet20(shortcut="B"), Shared])
def test_what_was_extracted_and_trained_comes_back_to_the_bit_and_computes_the_same(make) -> None:
    torch.manual_seed(0)
    network = make()
    tracing = trace(network, IMAGES[:1].float())
    keep = np.arange(tracing.space.num_filters) % 3 != 0
    trained = randomised_copy(extract(network, tracing, keep)).double().eval()
    dense = copy.deepcopy(network).double().eval()
    scatter(trained, dense, tracing, keep)
    back = extract(dense, tracing, keep)
    assert back.state_dict().keys() == trained.state_dict().keys()
    for name, tensor in trained.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor)
    num_nonzero = sum(int(tensor.count_nonzero()) for tensor in dense.parameters())
    assert num_nonzero == sum(int(tensor.count_nonzero()) for tensor in trained.parameters())
    with torch.no_grad():
        torch.testing.assert_close(dense(IMAGES), trained(IMAGES), rtol=1e-9, atol=1e-9)


def test_a_mask_of_another_network_is_refused() -> None:
    network = resnet20(shortcut="B")
    tracing = trace(network, IMAGES[:1].float())
    keep = np.arange(tracing.space.num_filters) % 2 == 0
    with pytest.raises(ValueError, match="architecture that was traced"):
        scatter(extract(network, tracing, ~keep), network, tracing, np.ones_like(keep))
