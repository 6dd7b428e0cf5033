"""torchvision's classification networks, by its names."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

import torch
from torch import nn

_AUXILIARY = ("googlenet", "inception_v3")


def build_torchvision_network(name: str, num_classes: int, *, seed: int = 0) -> nn.Module:
    """A freshly initialised network of torchvision; torchvision is imported here.

    Args:
        name: As ``torchvision.models`` calls it: ``resnet50``.
        num_classes: Width of the last layer, at least 2.
        seed: Of the initial weights; torch's own generator is left as it was.

    Raises:
        ValueError: no network that classifies images has that name, it trains with auxiliary
            outputs, or there are fewer than two classes.
    """
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        near = ", ".join(get_close_matches(name, known)) or "resnet50"
        raise ValueError(f"torchvision has no classification network {name!r}; near it: {near}")
    if name in _AUXILIARY:
        raise ValueError(
            f"{name} trains with auxiliary outputs, of which fine-tuning here knows nothing; "
            "choose a network with one output"
        )
    if num_classes < 2:
        raise ValueError(f"a classifier needs at least 2 classes, got {num_classes}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network: nn.Module = models.get_model(name, weights=None, num_classes=num_classes)
    return network


def torchvision_source(name: str, num_classes: int) -> dict[str, Any]:
    """How to construct the network again, as data."""
    return {
        "constructor": f"torchvision.models:{name}",
        "arguments": {"weights": None, "num_classes": num_classes},
    }
