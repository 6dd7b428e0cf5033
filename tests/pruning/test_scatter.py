"""Scattering: extraction's way back, to the bit."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from fppmo_ray.pruning import extract, trace
from fppmo_ray.pruning.equivalence import randomised_copy
from fppmo_ray.pruning.scatter import scatter
from fppmo_ray.training.networks import resnet20

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
