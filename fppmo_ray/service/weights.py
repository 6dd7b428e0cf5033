"""Weights as numpy arrays, which Ray carries without a copy, and digests of weights and data."""

from __future__ import annotations

import hashlib
import os

import numpy as np
import torch
from torch import nn

from fppmo_ray.training import Dataset, ImageArrays, ImageFiles, Splits

Arrays = dict[str, np.ndarray]


def to_arrays(network: nn.Module) -> Arrays:
    """Return the state dict as numpy arrays, which Ray hands to workers without a copy."""
    return {name: tensor.detach().cpu().numpy() for name, tensor in network.state_dict().items()}


def load_arrays(network: nn.Module, arrays: Arrays) -> None:
    """Copy arrays into the network, in place.

    Args:
        network: The network.
        arrays: Its state dict; may be read-only, as arrays from Ray are.
    """
    network.load_state_dict({name: torch.tensor(array) for name, array in arrays.items()})


def digest(arrays: Arrays) -> str:
    """Return the SHA-256 of names, shapes, types and bytes."""
    sha = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        sha.update(f"{name}{array.shape}{array.dtype}".encode())
        sha.update(array.tobytes())
    return sha.hexdigest()


def digest_data(dataset: Dataset, splits: Splits) -> str:
    """Return the SHA-256 of images, labels, preparation and splits.

    Args:
        dataset: The data. Of images that are streamed from files, the paths count.
        splits: Rows of the training images.
    """
    sha = hashlib.sha256()
    preparation = (dataset.num_classes, dataset.mean, dataset.std, dataset.augmentation)
    sha.update(repr(preparation).encode())
    for images in (dataset.train, dataset.test):
        sha.update(_digest_images(images).encode())
    for rows in (splits.search_train, splits.search_val, splits.choose_val):
        sha.update(np.ascontiguousarray(rows).tobytes())
    return sha.hexdigest()


def _digest_images(images: ImageArrays | ImageFiles) -> str:
    if isinstance(images, ImageArrays):
        return digest({"images": images.images, "labels": images.labels})
    root = os.path.commonpath(images.paths)  # the data may be in another folder than before
    names = [str(path.relative_to(root)) for path in images.paths]
    how: tuple[object, ...] = (images.height, images.width)
    if images.centre_crop is not None:  # without a crop, digests stay those of older versions
        how += (images.centre_crop,)
    text = repr((*how, names))
    return digest({"labels": images.labels}) + hashlib.sha256(text.encode()).hexdigest()
