"""How long a network takes on the device at hand."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch
from torch import nn

_BATCHES = (1, 64)
_WARM_UP = 3
_REPEATS = 10


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Median wall time of a forward pass."""

    batch: int
    milliseconds: float


@torch.no_grad()
def measure_latency(network: nn.Module, image: torch.Tensor) -> tuple[Latency, ...]:
    """Median of ten forward passes, after three to warm up, at batch 1 and 64.

    Args:
        network: In eval mode, on the device to measure.
        image: One normalised image (1, C, H, W) on the same device.
    """
    return tuple(
        Latency(batch=batch, milliseconds=_median_ms(network, image.repeat(batch, 1, 1, 1)))
        for batch in _BATCHES
    )


def _median_ms(network: nn.Module, images: torch.Tensor) -> float:
    seconds = []
    for _ in range(_WARM_UP + _REPEATS):
        _synchronize(images.device)
        begin = time.perf_counter()
        network(images)
        _synchronize(images.device)
        seconds.append(time.perf_counter() - begin)
    return 1000 * statistics.median(seconds[_WARM_UP:])


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
