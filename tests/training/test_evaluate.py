from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from fppmo_ray.training import build_network, evaluate


def batches(*sizes):
    generator = torch.Generator().manual_seed(0)
    for size in sizes:
        images = torch.randn(size, 1, 8, 8, generator=generator)
        yield images, torch.arange(size) % 10


def test_loss_and_accuracy_are_means_over_images_not_batches():
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.2, 0.6, 0.2], [0.1, 0.1, 0.8]]))
    labels = torch.tensor([0, 1, 0])
    metrics = evaluate(nn.Identity(), [(logits[:2], labels[:2]), (logits[2:], labels[2:])])
    assert metrics.loss == pytest.approx(-(math.log(0.5) + math.log(0.6) + math.log(0.1)) / 3)
    assert metrics.accuracy == pytest.approx(2 / 3)
    assert set(metrics.figures()) == {"loss", "accuracy"}


def test_the_five_likeliest_of_many_classes_count_too():
    logits = torch.arange(24.0).repeat(4, 1)  # class 23 is the likeliest, then 22
    metrics = evaluate(nn.Identity(), [(logits[:3], torch.tensor([23, 19, 18]))])
    assert (metrics.accuracy, metrics.top5_accuracy) == pytest.approx((1 / 3, 2 / 3))
    few = evaluate(nn.Identity(), [(logits[:, :10], torch.tensor([9, 8, 7, 6]))])
    assert (few.accuracy, few.top5_accuracy) == (0.25, None)


def test_evaluation_uses_and_leaves_the_running_statistics_and_the_modes():
    network = build_network("digits_cnn", 10).train()
    network.bn2.eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    together = evaluate(network, batches(6))
    [(images, labels)] = batches(6)
    one_by_one = evaluate(network, [(images[i : i + 1], labels[i : i + 1]) for i in range(6)])
    assert together.loss == pytest.approx(one_by_one.loss, rel=1e-5)
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert network.training
    assert network.bn1.training
    assert not network.bn2.training


def test_bfloat16_is_near_float32_but_not_the_same():
    network = build_network("digits_cnn", 10)
    network.linear.weight.data *= 100  # so that answers differ and rounding shows
    exact = evaluate(network, batches(50)).loss
    rough = evaluate(network, batches(50), dtype="bfloat16").loss
    assert rough != exact
    assert rough == pytest.approx(exact, rel=0.02)


def test_no_images_and_broken_networks_are_errors_not_numbers():
    network = build_network("digits_cnn", 10)
    with pytest.raises(ValueError, match="got no batches"):
        evaluate(network, [])
    network.linear.bias.data[3] = math.nan
    with pytest.raises(RuntimeError, match="the loss on 4 images is nan"):
        evaluate(network, batches(4))
