"""Networks under the names by which a job asks for them: for small images, and torchvision's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from fppmo_ray.training.networks.cifar_resnet import (
    CifarResNet,
    resnet20,
    resnet32,
    resnet44,
    resnet56,
    resnet110,
)
from fppmo_ray.training.networks.cifar_vgg import CifarVGG, vgg16_bn
from fppmo_ray.training.networks.digits_cnn import DigitsCNN, digits_cnn
from fppmo_ray.training.networks.torchvision_networks import (
    build_torchvision_network,
    torchvision_source,
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


def build_network(name: str, num_classes: int, *, seed: int = 0) -> nn.Module:
    """A freshly initialised network.

    Args:
        name: A key of ``NETWORKS``. ``_b`` marks option-B (projection) shortcuts.
        num_classes: Width of the last layer, at least 2.
        seed: Of the initial weights; torch's own generator is left as it was.

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
    """What ``build_network`` is called with, as data, for whoever has to make the network again."""
    return {
        "constructor": f"{__name__}:{build_network.__name__}",
        "arguments": {"name": name, "num_classes": num_classes},
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
