"""Batch norm: statistics measured anew, and norms folded into convolutions."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from fppmo_ray.training import build_network, fold_batchnorm, recalibrate_batchnorm


def batches(*means, size=4):
    """Batches of one constant image each, so that channel means are written out."""
    for mean in means:
        yield torch.full((size, 1, 8, 8), float(mean)), torch.zeros(size, dtype=torch.int64)


def snapshot(network):
    return copy.deepcopy(network.state_dict())


def test_statistics_are_the_plain_mean_over_the_batches():
    norm = nn.BatchNorm2d(1)
    norm.running_mean.fill_(99)
    generator = torch.Generator().manual_seed(0)
    images = [torch.randn(8, 1, 5, 5, generator=generator) * scale for scale in (1, 2, 3)]
    recalibrate_batchnorm(norm, [(batch, torch.zeros(8)) for batch in images])
    means = torch.stack([batch.mean() for batch in images])
    variances = torch.stack([batch.var() for batch in images])
    assert norm.running_mean.item() == pytest.approx(means.mean().item(), abs=1e-6)
    assert norm.running_var.item() == pytest.approx(variances.mean().item(), rel=1e-5)


def test_recalibrating_twice_changes_nothing_more():
    network = build_network("digits_cnn", 10)
    images = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    recalibrate_batchnorm(network, [(images, torch.zeros(16))])
    first = snapshot(network)
    recalibrate_batchnorm(network, [(images, torch.zeros(16))])
    assert all(torch.equal(first[name], value) for name, value in network.state_dict().items())


def test_modes_momenta_and_weights_are_left_as_they_were():
    network = build_network("digits_cnn", 10).eval()
    network.bn1.train()
    network.bn1.momentum = 0.3
    before = snapshot(network)
    recalibrate_batchnorm(network, batches(1, 2))
    assert [network.bn1.momentum, network.bn2.momentum] == [0.3, 0.1]
    assert [network.training, network.bn1.training, network.bn2.training] == [False, True, False]
    changed = {k for k, v in network.state_dict().items() if not torch.equal(v, before[k])}
    assert {name.split(".")[1] for name in changed} == {
        "running_mean",
        "running_var",
        "num_batches_tracked",
    }


def test_dropout_stays_off():
    network = nn.Sequential(nn.Dropout(0.9), nn.BatchNorm2d(1))
    images = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    recalibrate_batchnorm(network, [(images, torch.zeros(4))])
    assert network[1].running_mean.item() == pytest.approx(images.mean().item(), abs=1e-6)


def test_everything_is_restored_if_a_forward_pass_raises():
    network = build_network("digits_cnn", 10).eval()
    before = snapshot(network)
    wrong = torch.zeros(4, 3, 8, 8), torch.zeros(4)
    with pytest.raises(RuntimeError, match="channels"):
        recalibrate_batchnorm(network, [next(batches(5)), wrong])
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert network.bn1.momentum == 0.1
    assert not network.bn1.training


def test_no_batches_are_refused_and_leave_the_statistics():
    network = build_network("digits_cnn", 10)
    network.bn1.running_mean.fill_(7)
    with pytest.raises(ValueError, match="got no batches"):
        recalibrate_batchnorm(network, [])
    assert network.bn1.running_mean[0] == 7


def test_a_network_without_batchnorm_is_not_even_run():
    looked_at = []

    def batches():
        looked_at.append("a batch")
        yield from ()

    recalibrate_batchnorm(nn.Linear(2, 2), batches())
    recalibrate_batchnorm(nn.BatchNorm2d(1, track_running_stats=False), batches())
    assert looked_at == []


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
