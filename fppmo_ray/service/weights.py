"""Networks on their way through Ray: weights as numpy arrays, and digests that tell them apart."""

from __future__ import annotations

import hashlib
import os

import numpy as np
import torch
from torch import nn

from fppmo_ray.training import Dataset, ImageArrays, ImageFiles, Splits

Arrays = dict[str, np.ndarray]


def to_arrays(network: nn.Module) -> Arrays:
    """The state dict as numpy arrays, which Ray hands to workers without a copy."""
    return {name: tensor.detach().cpu().numpy() for name, tensor in network.state_dict().items()}


def load_arrays(network: nn.Module, arrays: Arrays) -> None:
    """Copy the arrays into the network, in place: Ray's are read-only, training is not."""
    network.load_state_dict({name: torch.tensor(array) for name, array in arrays.items()})


def digest(arrays: Arrays) -> str:
    """SHA-256 over names, shapes and bytes."""
    sha = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        sha.update(f"{name}{array.shape}{array.dtype}".encode())
        sha.update(array.tobytes())
    return sha.hexdigest()


def digest_data(dataset: Dataset, splits: Splits) -> str:
    """SHA-256 of images (their paths, where they are streamed), labels, preparation and splits."""
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
    root = os.path.commonpath(images.paths)  # the data may have moved as a whole
    names = [str(path.relative_to(root)) for path in images.paths]
    how: tuple[object, ...] = (images.height, images.width)
    if images.centre_crop is not None:  # digests of other files are older than it
        how += (images.centre_crop,)
    text = repr((*how, names))
    return digest({"labels": images.labels}) + hashlib.sha256(text.encode()).hexdigest()
