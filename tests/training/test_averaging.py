"""Averaged weights: what a training ends in, and nothing that it goes on from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fppmo_ray.training import (
    Images,
    Recipe,
    TrainingState,
    build_network,
    fine_tune,
    load_dataset,
    open_images,
    train_steps,
)
from fppmo_ray.training.averaging import WeightAverage

PLAIN_RECIPE = Recipe(epochs=3, batch_size=32, distillation_weight=0.0)
RECIPE = replace(PLAIN_RECIPE, ema_decay=0.9)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def images() -> Images:
    digits = load_dataset("digits")
    return open_images(digits.train, np.arange(200), digits)


def trained(images: Images, recipe: Recipe) -> tuple[nn.Module, TrainingState]:
    network = build_network("digits_cnn", 10)
    return network, fine_tune(network, images, recipe, seed=5)


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, second[name]) for name, value in first.items())


def test_the_share_that_is_kept_rises_to_the_decay() -> None:
    layer = nn.Linear(1, 1, bias=False)
    layer.weight.data.fill_(100.0)
    average = WeightAverage(layer, 0.2, first_step=0)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    average.follow(optimizer)
    for gradient in (99.0, -9.0, -10.0):  # the weight becomes 1, 10 and 20
        layer.weight.grad = torch.full((1, 1), gradient)
        optimizer.step()
    assert layer.weight.item() == 20
    average.put_in_place()
    # Shares 1/10, 2/11 and then 0.2: 0.1 * 100 + 0.9 * 1 = 10.9, and so on.
    expected = 0.2 * (2 / 11 * 10.9 + 9 / 11 * 10) + 0.8 * 20
    assert layer.weight.item() == pytest.approx(expected)


def test_training_goes_on_as_without_an_average(images: Images) -> None:
    network, state = trained(images, RECIPE)
    _, plain = trained(images, PLAIN_RECIPE)
    assert same(state.unaveraged, plain.network)
    assert same(state.momentum, plain.momentum)
    assert plain.unaveraged == {}
    assert same(state.network, network.state_dict())  # the user gets the average
    assert not same(state.network, state.unaveraged)


def test_batch_norms_statistics_are_averaged_and_their_batches_counted() -> None:
    norm = nn.BatchNorm2d(1, momentum=1.0)  # statistics are those of the last batch
    optimizer = torch.optim.SGD(norm.parameters(), lr=0.0)
    average = WeightAverage(norm, 0.5, first_step=90)  # where shares have risen to 0.91
    average.follow(optimizer)
    for value in (4.0, 8.0):
        norm(torch.full((2, 1, 1, 1), value)).sum().backward()
        optimizer.step()
    assert norm.running_mean is not None
    assert norm.running_mean.item() == 8
    average.put_in_place()
    assert norm.running_mean.item() == 0.5 * (0.5 * 0 + 0.5 * 4) + 0.5 * 8
    assert norm.num_batches_tracked == 2


def test_a_scores_steps_average_nothing(images: Images) -> None:
    first, second = (build_network("digits_cnn", 10) for _ in range(2))
    train_steps(first, images, RECIPE, steps=5, seed=0)
    train_steps(second, images, PLAIN_RECIPE, steps=5, seed=0)
    assert same(first.state_dict(), second.state_dict())
