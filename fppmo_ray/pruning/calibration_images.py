"""The images that ``prune`` takes: tensors, batches of them, or data to draw from."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from fppmo_ray.pruning.conditions import cast, precision_of
from fppmo_ray.pruning.network_io import ExampleInputs
from fppmo_ray.training import Transform
from fppmo_ray.training.inputs import checked_batches
from fppmo_ray.training.own_data import own_batches

CalibrationImages = Tensor | Iterable[Any]
"""Normalised images (N, C, H, W), or batches of them, each a tensor or a tuple such as (images,
labels); or any data that ``fppmo_ray.training.own_data`` takes."""

_RECALIBRATION_BATCH = 250


def calibration_batches(
    images: CalibrationImages,
    network: nn.Module,
    example_inputs: ExampleInputs,
    transform: Transform | None,
    num_images: int,
) -> list[tuple[Tensor, Any]]:
    """Return all images in batches of about equal size on the network's device, with their labels.

    Args:
        images: Normalised images, batches of them, or data to draw from.
        network: The network that they are for.
        example_inputs: What its forward takes, with a batch axis: one tensor.
        transform: How images that are no tensors yet become the network's input.
        num_images: How many are drawn at random from data that is no tensor and no list of batches.

    Raises:
        ValueError: there are none, they are something else than images, or do not fit the network.
    """
    examples = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
    if len(examples) != 1:
        raise ValueError(
            f"expected a network whose forward takes one tensor, got {len(examples)} example "
            "inputs; wrap it in a module that takes one"
        )
    if _is_own_data(images):
        images = own_batches(images, transform, num_images)
    if isinstance(images, Tensor):
        parts = -(-len(images) // _RECALIBRATION_BATCH) if len(images) else 0
        given: Iterable[Any] = images.tensor_split(parts) if parts else ()
    else:
        given = images
    device, precision = next(network.parameters()).device, precision_of(network)
    return [
        (cast(inputs, precision), labels.to(device) if isinstance(labels, Tensor) else labels)
        for (inputs,), labels in checked_batches(given, examples, device)
    ]


def _is_own_data(images: Any) -> bool:
    """Return whether images are data to draw from, and not a tensor or batches."""
    is_pair = isinstance(images, tuple) and len(images) == 2 and isinstance(images[0], np.ndarray)
    is_set = hasattr(images, "__getitem__") and not isinstance(images, Tensor | list | tuple)
    return is_pair or is_set or isinstance(images, str | Path | np.ndarray | IterableDataset)
