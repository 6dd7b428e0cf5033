"""The latency of whole networks, which take turns."""

from __future__ import annotations

import torch
from torch import nn

from fppmo_ray.pruning.latency import measure_latencies


class Noted(nn.Module):
    """Notes its name and the batch of every pass."""

    def __init__(self, name: str, passes: list[tuple[str, int]]) -> None:
        super().__init__()
        self.name, self.passes = name, passes

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.passes.append((self.name, len(images)))
        return images.exp()


def test_networks_take_turns_and_each_has_a_time_at_every_batch() -> None:
    passes: list[tuple[str, int]] = []
    networks = [Noted(name, passes) for name in "ab"]
    found = measure_latencies(networks, torch.ones(1, 3), batches=(1, 4))
    assert [[one.batch for one in of_network] for of_network in found] == [[1, 4], [1, 4]]
    assert all(0 < one.milliseconds < 1000 for of_network in found for one in of_network)
    changes = [one for one, before in zip(passes[1:], passes, strict=False) if one != before]
    order = [passes[0], *changes]
    assert order[:4] == [("a", 1), ("b", 1), ("a", 1), ("b", 1)]
    assert order[-2:] == [("a", 4), ("b", 4)]
