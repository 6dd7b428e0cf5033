"""How long networks take on the device at hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from fppmo_ray.pruning.latency.measure import repeated
from fppmo_ray.pruning.latency.timing import Call, seconds_in_turns


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Wall time of a forward pass."""

    batch: int
    """Images per pass."""
    milliseconds: float
    """Least mean time over several turns."""


@torch.no_grad()
def measure_latencies(
    networks: Sequence[nn.Module], *inputs: torch.Tensor, batches: Sequence[int]
) -> list[tuple[Latency, ...]]:
    """Return each network's latency for every size of a batch.

    The networks take turns, so that other work on the machine slows none of them alone.

    Args:
        networks: In eval mode, on the device to measure.
        inputs: What their forward takes, for one image (1, ...), on the same device.
        batches: Numbers of images per pass.
    """
    by_batch = []
    for batch in batches:
        images = repeated(inputs, batch)
        makers: list[Callable[[], Call]] = [
            partial(partial, network, *images) for network in networks
        ]
        by_batch.append(seconds_in_turns(makers, inputs[0].device))
    return [
        tuple(
            Latency(batch=batch, milliseconds=1000 * seconds)
            for batch, seconds in zip(batches, of_network, strict=True)
        )
        for of_network in zip(*by_batch, strict=True)
    ]
