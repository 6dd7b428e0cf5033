"""Networks as users have them: wrapped, in half precision, or not yet networks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from fppmo_ray import prune
from fppmo_ray.pruning.given_network import plain_network


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)),
    )


@pytest.mark.parametrize(
    "wrap", [nn.DataParallel, AveragedModel, lambda given: torch.compile(given, backend="eager")]
)
def test_wrappers_are_taken_off(wrap: Any) -> None:
    inner = network()
    found = plain_network(wrap(inner))
    assert isinstance(found, nn.Sequential)
    assert found.state_dict().keys() == inner.state_dict().keys()


def test_a_network_that_is_no_wrapper_is_itself() -> None:
    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = network()

    given = Module()
    assert plain_network(given) is given


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_becomes_single_precision_in_a_copy(dtype: torch.dtype) -> None:
    given = network().to(dtype)
    found = plain_network(given)
    assert {p.dtype for p in found.parameters()} == {torch.float32}
    assert {p.dtype for p in given.parameters()} == {dtype}


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ("resnet.pth", "got the path resnet.pth; construct the network, load its weights with"),
        (Path("resnet.pth"), "got the path resnet.pth"),
        (network().state_dict(), "got a dict of 11 entries, probably a state dict; construct"),
        (nn.Linear, r"got the class or function Linear; call it: Linear\(\)"),
        (network, r"got the class or function network; call it: network\(\)"),
        (None, "got NoneType"),
    ],
)
def test_what_is_no_network_is_refused_with_the_way_out(given: Any, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        prune(given, torch.zeros(1, 3, 8, 8), torch.randn(20, 3, 8, 8))


def test_prune_takes_wrapped_half_networks_and_torch_data_sets() -> None:
    data = torch.utils.data.TensorDataset(torch.randn(30, 3, 8, 8), torch.arange(30) % 4)
    smaller = prune(nn.DataParallel(network().half()), torch.zeros(1, 3, 8, 8), data, macs_cut=0.4)
    assert smaller[0].out_channels < 16
    assert smaller(torch.zeros(2, 3, 8, 8)).shape == (2, 4)
    both = (prune(network(), torch.zeros(1, 3, 8, 8), d, macs_cut=0.4) for d in (data, data[:][0]))
    assert len({tuple(n[0].weight.shape) for n in both}) == 1
