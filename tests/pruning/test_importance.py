"""Importance against values worked out by hand."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fppmo_ray.pruning import Criterion, Tracing, importance, trace

IMAGE = torch.zeros(1, 1, 4, 4)


class Pair(nn.Module):
    """Two 1 x 1 convolutions added up, whose three filters are therefore one group."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(1, 3, 1, bias=False), nn.Conv2d(1, 3, 1, bias=False)
        self.bn = nn.BatchNorm2d(3)
        self.head = nn.Linear(3, 2)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.bn(self.left(images) + self.right(images)).relu().mean((2, 3)))


@pytest.fixture(scope="module")
def pair() -> Pair:
    network = Pair()
    with torch.no_grad():
        network.left.weight.copy_(torch.tensor([1.0, -2.0, 6.0]).reshape(3, 1, 1, 1))
        network.right.weight.copy_(torch.tensor([4.0, 0.0, 2.0]).reshape(3, 1, 1, 1))
        network.bn.weight.copy_(torch.tensor([-2.0, 1.0, 3.0]))
    return network


@pytest.fixture(scope="module")
def tracing(pair: Pair) -> Tracing:
    return trace(pair, IMAGE)


@pytest.mark.parametrize(
    ("criterion", "expected"),
    [
        ("l1", [(1 / 3 + 2) / 2, (2 / 3 + 0) / 2, (6 / 3 + 1) / 2]),  # layer means 3 and 2
        ("l2", [(1 / 3 + 2) / 2, (2 / 3 + 0) / 2, (6 / 3 + 1) / 2]),
        # distance sums 8, 11, 13 (mean 32 / 3) and 6, 6, 4 (mean 16 / 3)
        ("fpgm", [(24 / 32 + 18 / 16) / 2, (33 / 32 + 18 / 16) / 2, (39 / 32 + 12 / 16) / 2]),
        ("bn_scale", [2 / 2, 1 / 2, 3 / 2]),
    ],
)
def test_a_filter_counts_the_mean_of_its_layers_each_scaled_to_mean_one(
    pair: Pair, tracing: Tracing, criterion: Criterion, expected: list[float]
) -> None:
    np.testing.assert_allclose(importance(pair, tracing, criterion), expected, rtol=1e-6)


def test_taylor_is_the_product_of_weight_and_gradient(pair: Pair, tracing: Tracing) -> None:
    torch.manual_seed(0)
    batches = [(torch.randn(5, 1, 4, 4), torch.tensor([0, 1, 1, 0, 1])) for _ in range(2)]
    expected = np.zeros(3)
    for layer in ("left", "right"):
        per_filter = np.zeros(3)
        for images, labels in batches:
            probe = copy.deepcopy(pair).eval()
            nn.functional.cross_entropy(probe(images), labels).backward()
            weight = probe.get_submodule(layer).weight
            per_filter += (weight * weight.grad).abs().detach().flatten().numpy()
        expected += per_filter / per_filter.mean() / 2
    values = importance(pair, tracing, "taylor", batches)
    np.testing.assert_allclose(values, np.maximum(expected, 1e-6), rtol=1e-5)


def test_taylor_leaves_the_network_alone(tracing: Tracing) -> None:
    network = Pair().train().requires_grad_(False)
    before = copy.deepcopy(network.state_dict())
    importance(network, tracing, "taylor", [(torch.randn(3, 1, 4, 4), torch.tensor([0, 1, 0]))])
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())
    assert all(not parameter.requires_grad for parameter in network.parameters())
    assert all(module.training for module in network.modules())


def test_filters_without_any_weight_stay_positive(tracing: Tracing) -> None:
    network = Pair()
    for layer in (network.left, network.right):
        nn.init.zeros_(layer.weight)
    values = importance(network, tracing, "l1")
    assert (values > 0).all()
    assert len(set(values)) == 1


def test_bad_requests_are_refused_with_a_sentence(pair: Pair, tracing: Tracing) -> None:
    with pytest.raises(ValueError, match="taylor needs batches"):
        importance(pair, tracing, "taylor")
    with pytest.raises(ValueError, match="at least one batch"):
        importance(pair, tracing, "taylor", [])
    with pytest.raises(ValueError, match="must be one of l1, l2, fpgm, bn_scale, taylor"):
        importance(pair, tracing, "L1")  # type: ignore[arg-type]
    broken = copy.deepcopy(pair)
    nn.init.constant_(broken.left.weight, float("nan"))
    with pytest.raises(ValueError, match=r"left\.weight is not finite"):
        importance(broken, tracing, "l1")


def test_bn_scale_needs_a_batch_norm_on_every_group() -> None:
    network = nn.Sequential(nn.Conv2d(1, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    with pytest.raises(ValueError, match="batch norm with a scale on every group, got none on 0"):
        importance(network, trace(network, IMAGE), "bn_scale")
