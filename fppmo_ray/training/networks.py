"""Build networks by name: networks for small images, and torchvision's classifiers."""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches
from functools import partial
from typing import Any

import torch
from torch import nn

from fppmo_ray.training.small_networks import (
    CifarResNet,
    CifarVGG,
    DigitsCNN,
    digits_cnn,
    resnet20,
    resnet32,
    resnet44,
    resnet56,
    resnet110,
    vgg16_bn,
)

NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "digits_cnn": digits_cnn,
    "resnet20": resnet20,
    "resnet32": resnet32,
    "resnet44": resnet44,
    "resnet56": resnet56,
    "resnet110": resnet110,
    "resnet20_b": partial(resnet20, shortcut="B"),
    "resnet32_b": partial(resnet32, shortcut="B"),
    "resnet44_b": partial(resnet44, shortcut="B"),
    "resnet56_b": partial(resnet56, shortcut="B"),
    "resnet110_b": partial(resnet110, shortcut="B"),
    "vgg16_bn": vgg16_bn,
}
"""Constructor by name; ``_b`` marks ResNets with option-B (projection) shortcuts."""


def build_network(name: str, num_classes: int, *, seed: int = 0) -> nn.Module:
    """Return a freshly initialised network for small images.

    Args:
        name: A key of ``NETWORKS``.
        num_classes: Width of the last layer, >= 2.
        seed: Random seed of the initial weights; torch's own generator keeps its state.

    Raises:
        ValueError: no network has that name, or there are fewer than two classes.
    """
    if name not in NETWORKS:
        raise ValueError(f"network must be one of {', '.join(NETWORKS)}, got {name!r}")
    if num_classes < 2:
        raise ValueError(f"a classifier needs at least 2 classes, got {num_classes}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return NETWORKS[name](num_classes)


def source_of(name: str, num_classes: int) -> dict[str, Any]:
    """Return the arguments of ``build_network`` as data, so that the network can be built again.

    Args:
        name: A key of ``NETWORKS``.
        num_classes: Width of the last layer.
    """
    return {
        "constructor": f"{__name__}:{build_network.__name__}",
        "arguments": {"name": name, "num_classes": num_classes},
    }


_AUXILIARY = ("googlenet", "inception_v3")


def build_torchvision_network(name: str, num_classes: int, *, seed: int = 0) -> nn.Module:
    """Return a freshly initialised network of torchvision, which is imported here.

    Args:
        name: Name in ``torchvision.models``, for instance ``resnet50``.
        num_classes: Width of the last layer, >= 2.
        seed: Random seed of the initial weights; torch's own generator keeps its state.

    Raises:
        ValueError: no classification network has that name, it trains with auxiliary outputs, or
            there are fewer than two classes.
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
    """Return the constructor and arguments of a torchvision network as data.

    Args:
        name: Name in ``torchvision.models``.
        num_classes: Width of the last layer.
    """
    return {
        "constructor": f"torchvision.models:{name}",
        "arguments": {"weights": None, "num_classes": num_classes},
    }


__all__ = [
    "NETWORKS",
    "CifarResNet",
    "CifarVGG",
    "DigitsCNN",
    "build_network",
    "build_torchvision_network",
    "digits_cnn",
    "resnet20",
    "resnet32",
    "resnet44",
    "resnet56",
    "resnet110",
    "source_of",
    "torchvision_source",
    "vgg16_bn",
]
