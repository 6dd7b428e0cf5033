"""A user's own network on the command line: by name, or by a function that constructs it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from fppmo_ray.service.result import load_constructor
from fppmo_ray.training import (
    Transform,
    build_network,
    build_torchvision_network,
    load_dataset,
    load_weights,
    source_of,
)
from fppmo_ray.training.named_datasets import DatasetName
from fppmo_ray.training.networks import NETWORKS, torchvision_source
from fppmo_ray.training.own_data import OwnData, own_data

_TIMM = "timm"


def load_function(name: str) -> Callable[..., Any]:
    """Return the function that ``MODULE:FUNCTION`` names; the working directory is searched too."""
    sys.path.insert(0, str(Path.cwd()))
    return load_constructor(name)


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
        network, source = load_function(name)(), {"constructor": name, "arguments": {}}
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


def open_data(
    kind: DatasetName, place: str, transform: Transform, class_names: Sequence[str], *, seed: int
) -> OwnData:
    """Return the data set in a folder or bucket.

    Args:
        kind: The kind of data set.
        place: Its folder; for an ``image_folder`` also a folder or URI of parquet files.
        transform: How images become the network's input.
        class_names: Class names in the order of the network's outputs; none: as the data has them.
        seed: Seed of the test rows, if the data has no test part.

    Raises:
        ValueError: there is no such data, or it is broken.
    """
    if kind == "image_folder":
        found = own_data(place, transform, class_names=class_names or None, seed=seed)
        assert isinstance(found, OwnData)  # folders and parquet files have labels
        return found
    folder = None if kind == "digits" else Path(place)
    return OwnData(load_dataset(kind, folder, transform, class_names=class_names or None), None)


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
