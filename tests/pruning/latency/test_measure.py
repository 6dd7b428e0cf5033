"""Latency tables measured on a very small network."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from fppmo_ray.pruning import trace
from fppmo_ray.pruning.latency import measure_latency_table, time_masks, timing
from fppmo_ray.pruning.latency.measure import mask_at
from fppmo_ray.pruning.latency.timing import seconds_in_turns

NETWORK = nn.Sequential(
    *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
    *(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
    *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)),
).eval()
IMAGE = torch.zeros(1, 3, 6, 6)
TRACING = trace(NETWORK, IMAGE)


def test_the_table_tells_every_mask_s_latency_and_how_far_off_it_may_be() -> None:
    space = TRACING.space
    measured = measure_latency_table(NETWORK, TRACING, (IMAGE,), batch=2, seed=0)
    assert [layer.layer for layer in measured.table.layers] == ["0", "3", "8"]
    assert measured.table.layers[1].out_points == measured.table.layers[1].in_points
    assert measured.table.layers[1].out_points[::5] == (1, 8)
    assert len(measured.checks) == 8
    assert measured.median_error >= 0
    assert measured.device == "cpu"
    assert measured.table.dense_ns > 0
    times = [measured.table.total(space.widths(mask_at(space, i / 10))) for i in range(11)]
    assert all(narrow <= wide for narrow, wide in pairwise(times))
    assert times[0] > 0


def test_masks_are_timed_in_nanoseconds() -> None:
    masks = [mask_at(TRACING.space, 1.0), mask_at(TRACING.space, 0.0)]
    times = time_masks(NETWORK, TRACING, (IMAGE,), masks, batch=1)
    assert all(1_000 < ns < 1_000_000_000 for ns in times)


def test_measuring_changes_nothing_about_the_network() -> None:
    before = {name: tensor.clone() for name, tensor in NETWORK.state_dict().items()}
    measure_latency_table(NETWORK, TRACING, (IMAGE,), batch=1, seed=0)
    for name, tensor in NETWORK.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert not NETWORK.training
    assert not any(module._forward_pre_hooks for module in NETWORK.modules())


def test_calls_take_turns_and_are_made_anew_for_each() -> None:
    made: list[int] = []

    def maker(number: int):
        def make():
            made.append(number)
            return lambda: np.zeros(1)

        return make

    seconds = seconds_in_turns([maker(0), maker(1)], torch.device("cpu"))
    assert made == [0, 1] * 8
    assert all(0 < value < 1 for value in seconds)


@pytest.mark.parametrize(("seconds", "turns"), [(0.01, 8), (0.5, 3)])
def test_long_calls_take_fewer_turns(
    seconds: float, turns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, made = [0.0], []

    def call() -> None:
        now[0] += seconds

    def make() -> Callable[[], None]:
        made.append(None)
        return call

    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    assert seconds_in_turns([make, make], torch.device("cpu")) == pytest.approx([seconds] * 2)
    assert len(made) == 2 * turns
