"""Batch norms folded into convolutions: the same function, in fewer operations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fppmo_ray.training import build_network, fold_batchnorm


def disturbed(network: nn.Module) -> nn.Module:
    """In float64, with batch norms that are not the identity: fresh ones would hide errors."""
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor in (module.running_mean, module.running_var, module.weight, module.bias):
                if tensor is not None:
                    with torch.no_grad():
                        tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return network.double().eval()


def num_norms(network: nn.Module) -> int:
    return sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules())


def difference(network: nn.Module, image: Tensor) -> float:
    with torch.no_grad():
        expected, folded = network(image), fold_batchnorm(network)(image)
    return float((folded - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("name", ["resnet20", "resnet20_b", "vgg16_bn", "digits_cnn"])
def test_every_norm_of_the_built_in_networks_is_folded_and_the_answers_stay(name: str) -> None:
    network = disturbed(build_network(name, 10))
    shape = (3, 1, 8, 8) if name == "digits_cnn" else (3, 3, 32, 32)
    assert num_norms(network) > 0
    assert num_norms(fold_batchnorm(network)) == 0
    assert difference(network, torch.randn(shape, dtype=torch.float64)) < 1e-12


def test_the_network_itself_is_left_as_it_is() -> None:
    network = disturbed(build_network("digits_cnn", 10))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    fold_batchnorm(network)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert num_norms(network) == 4


class SharedParts(nn.Module):
    """What must not be folded: an output that is used twice, and a convolution that is."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 3, 1)
        self.twice = nn.Conv2d(3, 3, 1)
        self.norms = nn.ModuleList([nn.BatchNorm2d(3) for _ in range(3)])

    def forward(self, image: Tensor) -> Tensor:
        out = self.first(image)
        out = out + self.norms[0](out)
        return self.norms[2](self.twice(self.norms[1](self.twice(out))))


class WithoutStatistics(nn.Sequential):
    """A norm that takes the batch's own statistics in evaluation mode too."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False))


@pytest.mark.parametrize("network", [SharedParts(), WithoutStatistics()], ids=["shared", "batch"])
def test_what_cannot_be_folded_stays(network: nn.Module) -> None:
    network = disturbed(network)
    assert num_norms(fold_batchnorm(network)) == num_norms(network)
    assert difference(network, torch.randn(5, 3, 4, 4, dtype=torch.float64)) < 1e-12


def test_a_norm_without_weights_is_folded() -> None:
    network = disturbed(nn.Sequential(nn.Conv1d(3, 4, 1), nn.BatchNorm1d(4, affine=False)))
    assert num_norms(fold_batchnorm(network)) == 0
    assert difference(network, torch.randn(5, 3, 4, dtype=torch.float64)) < 1e-12


class Undecided(nn.Module):
    """Looks at the numbers to decide what to do."""

    def forward(self, image: Tensor) -> Tensor:
        return image if image.sum() > 0 else -image


def test_a_network_whose_forward_cannot_be_followed_is_refused() -> None:
    with pytest.raises(ValueError, match=r"torch\.fx cannot follow the network's forward"):
        fold_batchnorm(Undecided().eval())


def test_a_network_in_training_mode_is_refused() -> None:
    with pytest.raises(ValueError, match=r"in training mode cannot be folded; call eval\(\) first"):
        fold_batchnorm(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
