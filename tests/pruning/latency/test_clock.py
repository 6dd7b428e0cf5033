"""Latency by a user's clock, of which the truth is known here."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from fppmo_ray import prune
from fppmo_ray.distribution import ChannelGroup, PruningSpace
from fppmo_ray.pruning import trace
from fppmo_ray.pruning.latency import num_readings, read_clock, table_by_clock
from fppmo_ray.pruning.latency.measure import random_masks


def small_network() -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for width_in, width_out in ((3, 16), (16, 24), (24, 12)):
        layers += [nn.Conv2d(width_in, width_out, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(12, 4, 1)).eval()


NETWORK = small_network()
TRACING = trace(NETWORK, torch.zeros(1, 3, 8, 8))
SPACE = TRACING.space


def convolutions(network: nn.Module) -> list[nn.Conv2d]:
    return [layer for layer in network.modules() if isinstance(layer, nn.Conv2d)]


def by_filters(network: nn.Module) -> float:
    """Half a millisecond, and 10 microseconds for every filter."""
    return 0.5 + 0.01 * sum(layer.out_channels for layer in convolutions(network))


def by_weights(network: nn.Module) -> float:
    """Half a millisecond, and a microsecond for every weight."""
    return 0.5 + 0.001 * sum(layer.weight.numel() for layer in convolutions(network))


@pytest.mark.parametrize(
    "clock",
    [by_filters, by_weights, lambda network: by_filters(network) + by_weights(network)],
    ids=["by filters", "by weights", "by both"],
)
def test_the_table_of_a_clock_equals_the_truth(clock: Callable[[nn.Module], float]) -> None:
    calls = []

    def read(keep: np.ndarray) -> float:
        calls.append(keep)
        return read_clock(clock, NETWORK, TRACING, keep)

    measured = table_by_clock(read, SPACE, seed=0, name="clock")
    assert len(calls) == num_readings(SPACE) == 1 + 3 * 4 + 8 + 8
    assert len(measured.checks) == 8
    assert measured.median_error < 1e-5
    for keep in random_masks(SPACE, 20, np.random.default_rng(1)):
        truth = 1e6 * read_clock(clock, NETWORK, TRACING, keep)
        assert measured.table.total(SPACE.widths(keep)) == pytest.approx(truth, rel=1e-5)


def test_many_groups_are_narrowed_once_each() -> None:
    groups = tuple(ChannelGroup(name=f"{i}", num_filters=8) for i in range(150))
    assert num_readings(PruningSpace(groups=groups, layer_costs=())) == 1 + 150 + 8 + 8
    assert num_readings(PruningSpace(groups=groups[:90], layer_costs=())) == 1 + 2 * 90 + 8 + 8


def raising(network: nn.Module) -> float:
    raise OSError("no phone at port 5555")


@pytest.mark.parametrize(
    ("clock", "sentence"),
    [
        (raising, "latency raising raised OSError: no phone at port 5555; it is given"),
        (lambda network: float("nan"), "must return milliseconds, finite and > 0, got nan"),
        (lambda network: -1, "must return milliseconds, finite and > 0, got -1"),
        (lambda network: None, "must return milliseconds, finite and > 0, got None"),
    ],
)
def test_a_clock_that_fails_is_refused_in_a_sentence(
    clock: Callable[[nn.Module], float], sentence: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        read_clock(clock, NETWORK, TRACING, np.ones(SPACE.num_filters, dtype=bool))


def test_prune_meets_a_cut_by_the_clock() -> None:
    images = torch.randn(40, 3, 8, 8)
    cuts = {"latency": 0.4}
    smaller = prune(
        *(NETWORK, images[:1], images),
        macs_cut=0.0,
        further_cuts=cuts,  # type: ignore[arg-type]
        latency=by_filters,
        gamma=1.0,
    )
    assert 0.5 * by_filters(NETWORK) < by_filters(smaller) <= 0.6 * by_filters(NETWORK)
    with pytest.raises(ValueError, match="give further_cuts"):
        prune(NETWORK, images[:1], images, latency=by_filters)
