"""How long a network takes on the device at hand."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from fppmo_ray.pruning.latency.measure import repeated
from fppmo_ray.training.device import device_module

_WARM_UP = 3
_REPEATS = 10


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Median wall time of a forward pass."""

    batch: int
    milliseconds: float


@torch.no_grad()
def measure_latency(
    network: nn.Module, *inputs: torch.Tensor, batches: Sequence[int]
) -> tuple[Latency, ...]:
    """Median of ten forward passes, after three to warm up, for every size of a batch.

    Args:
        network: In eval mode, on the device to measure.
        inputs: What its forward takes, for one image (1, ...), on the same device.
        batches: Of how many such images.
    """
    return tuple(
        Latency(
            batch=batch,
            milliseconds=_median_ms(network, repeated(inputs, batch)),
        )
        for batch in batches
    )


def _median_ms(network: nn.Module, inputs: Sequence[torch.Tensor]) -> float:
    device = inputs[0].device
    seconds = []
    for _ in range(_WARM_UP + _REPEATS):
        device_module(device).synchronize(device)
        begin = time.perf_counter()
        network(*inputs)
        device_module(device).synchronize(device)
        seconds.append(time.perf_counter() - begin)
    return 1000 * statistics.median(seconds[_WARM_UP:])
