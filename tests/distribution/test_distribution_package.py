"""The package as others meet it: what it imports, what it exports, and its example."""

from __future__ import annotations

import doctest
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

import fppmo_ray.distribution


def test_the_distribution_imports_neither_torch_nor_ray():
    code = (
        "import sys, fppmo_ray.distribution; "
        "print(sorted({'torch', 'ray', 'pandas', 'scipy'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("name", fppmo_ray.distribution.__all__)
def test_every_public_name_exists(name):
    assert hasattr(fppmo_ray.distribution, name)


def test_the_example_ends_with_a_network_of_half_the_macs():
    torch.manual_seed(0)
    network = nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)),
    ).eval()
    images = torch.randn(8, 3, 8, 8)
    with torch.no_grad():
        answers = network(images)

    @torch.no_grad()
    def loss_of(pruned: nn.Module) -> float:
        return float((pruned(images) - answers).square().mean())

    names: dict[str, Any] = {"network": network, "images": images, "loss_of": loss_of}
    steps = doctest.DocTestParser().get_examples(fppmo_ray.distribution.__doc__ or "")
    exec("".join(step.source for step in steps), names)
    assert names["proposal"].proposal_id == 63
    first, second, last = (len(names["smaller"][i].weight) for i in (0, 2, 6))
    dense = 64 * 9 * (3 * 16 + 16 * 16) + 16 * 10
    assert last == 10
    macs = 64 * 9 * (3 * first + first * second) + second * 10
    assert 0.4 * dense < macs <= 0.5 * dense
    *_, importance_only = names["finalists"]
    assert loss_of(names["smaller"]) < loss_of(importance_only)
