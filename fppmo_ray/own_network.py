"""A user's own network on the command line: by name, or by a function that constructs it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from torch import nn

from fppmo_ray.service.result import load_constructor
from fppmo_ray.training import build_network, build_torchvision_network, load_weights, source_of
from fppmo_ray.training.networks import NETWORKS, torchvision_source

_TIMM = "timm"


def open_network(
    name: str, weights: Path | None, num_classes: int, *, seed: int = 0
) -> tuple[nn.Module, dict[str, Any]]:
    """Return a network with its weights, and its constructor as data for ``save_network``.

    Args:
        name: ``MODULE:FUNCTION``, a function without arguments that constructs the network; the
            working directory is searched for the module. Or a network of this package
            (``resnet56``), of torchvision (``resnet50``), or of timm (``timm:resnet50``).
        weights: File of its weights; None: those that the constructor gives it.
        num_classes: Number of classes of the data; for networks by name.
        seed: Random seed of the initial weights of networks by name.

    Raises:
        ValueError: there is no such network, or the file holds other weights.
    """
    library, colon, model = name.partition(":")
    source: dict[str, Any]
    if library == _TIMM and colon:
        network = _timm_network(model, num_classes)
        arguments = {"model_name": model, "num_classes": num_classes}
        source = {"constructor": "timm:create_model", "arguments": arguments}
    elif colon:
        sys.path.insert(0, str(Path.cwd()))
        network, source = load_constructor(name)(), {"constructor": name, "arguments": {}}
    elif name in NETWORKS:
        network, source = build_network(name, num_classes, seed=seed), source_of(name, num_classes)
    else:
        network = build_torchvision_network(name, num_classes, seed=seed)
        source = torchvision_source(name, num_classes)
    if not isinstance(network, nn.Module):
        raise ValueError(f"{name} must return a torch.nn.Module, got {type(network).__name__}")
    if weights is not None:
        load_weights(network, weights)
    return network, source


def _timm_network(name: str, num_classes: int) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise ValueError(f"timm:{name} needs timm, which is not installed here") from error
    if name not in timm.list_models() and name not in timm.list_pretrained():
        near = ", ".join(timm.list_models(f"*{name.partition('.')[0]}*")[:5]) or "resnet50"
        raise ValueError(f"timm has no network {name!r}; near it: {near}")
    network: nn.Module = timm.create_model(name, num_classes=num_classes)
    return network
