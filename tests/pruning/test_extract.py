"""Extraction: index selection, with everything else kept."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from fppmo_ray.pruning import extract, trace
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
