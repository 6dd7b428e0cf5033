from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fppmo_ray.training import build_network, recalibrate_batchnorm


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
