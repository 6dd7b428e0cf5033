"""One part of a user's data as an image set: arrays, map-style data sets, and what is iterated."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, IterableDataset, Subset, default_collate

from fppmo_ray.training.dataset import (
    ImageArrays,
    ImageFiles,
    ImageSet,
    IntArray,
    PreparedInputs,
)
from fppmo_ray.training.prepared import split_item, to_input
from fppmo_ray.training.preprocessing import Transform

logger = logging.getLogger(__name__)

_LABEL_COLUMNS = ("label", "labels", "fine_label")
_BYTE_LIMIT = 4 * 1024**3
ALL_KINDS = (
    "a Dataset of load_dataset, a folder of images, (images, labels) as arrays, a torch data set "
    "or loader, a Hugging Face data set, or a dict of these with train, val and test"
)


@dataclass(frozen=True, eq=False)
class Unlabelled:
    """Inputs without labels, all of one shape."""

    parts: Sequence[Tensor]
    """Batches of inputs, float32."""


def image_set(data: Any, transform: Transform | None, name: str) -> ImageSet | Unlabelled:
    """Return one part of the data in the form that images are served from.

    Args:
        data: Arrays, a torch data set or loader, a Hugging Face data set, or an iterable.
        transform: How images that are no tensors yet become the network's input.
        name: The part's name, for messages.

    Raises:
        ValueError: the data is something else, is empty or has other labels, or the statistics of
            images are not given.
    """
    if isinstance(data, tuple) and len(data) == 2 and hasattr(data[0], "dtype"):
        return _of_arrays(data[0], data[1], transform)
    if isinstance(data, np.ndarray | Tensor):
        return Unlabelled([to_input(data, f"part {name}")])
    if isinstance(data, DataLoader):
        plain = data.collate_fn is default_collate
        if plain and not isinstance(data.dataset, IterableDataset):
            return image_set(data.dataset, transform, name)
        return _in_memory(data, name, batched=True)
    if hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        return _of_items(data, transform, name)
    if isinstance(data, Iterable):
        return _in_memory(data, name, batched=False)
    raise ValueError(f"part {name} of the data must be {ALL_KINDS}, got {type(data).__name__}")


def _of_arrays(images: Any, labels: Any, transform: Transform | None) -> ImageSet:
    pixels = np.asarray(images)
    classes = _checked_labels(labels, len(pixels))
    if np.issubdtype(pixels.dtype, np.floating):
        inputs = np.ascontiguousarray(pixels, dtype=np.float32)
        return PreparedInputs(inputs, classes, inputs.shape[1:])
    if isinstance(images, Tensor) and pixels.ndim == 4:
        pixels = pixels.transpose(0, 2, 3, 1)
    if pixels.ndim == 3:
        pixels = pixels[..., None]
    given = (transform or Transform()).filled()
    require_statistics(given)
    return ImageArrays(np.ascontiguousarray(pixels), classes, colour=given.colour)


def _of_items(items: Any, transform: Transform | None, name: str) -> ImageSet | Unlabelled:
    """Return a map-style data set; its items are read when they are needed."""
    if not len(items):
        raise ValueError(f"part {name} of the data has no items")
    value, label = split_item(items[0], f"item 0 of {name}")
    if label is None:
        inputs = [to_input(split_item(items[i], name)[0], name) for i in range(len(items))]
        return Unlabelled([torch.stack(inputs)])
    labels = _labels_of(items, name)
    if not is_image(value):
        shape = tuple(to_input(value, f"item 0 of {name}").shape)
        return PreparedInputs(items, labels, shape)
    given = (transform or Transform()).filled()
    require_statistics(given)
    return image_files(ItemImages(items), labels, given)


@dataclass(frozen=True, eq=False)
class ItemImages(Sequence[Any]):
    """The images of a map-style data set whose items are images of Pillow, with labels."""

    items: Any
    """The data set."""

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, position: Any) -> Any:
        return split_item(self.items[int(position)], f"item {position}")[0]


def _in_memory(batches: Iterable[Any], name: str, *, batched: bool) -> ImageSet | Unlabelled:
    """Return everything that an iterable yields, items or batches of items."""
    inputs: list[Tensor] = []
    labels: list[Any] = []
    num_bytes = 0
    for number, item in enumerate(batches):
        value, label = split_item(item, f"item {number} of {name}")
        tensor = to_input(value, f"item {number} of {name}")
        inputs.append(tensor if batched else tensor[None])
        if label is not None:
            labels += np.asarray(label).reshape(-1).tolist()
        num_bytes += tensor.numel() * 4
        if num_bytes > _BYTE_LIMIT:
            raise ValueError(
                f"part {name} of the data can only be iterated and takes more than "
                f"{_BYTE_LIMIT / 2**30:g} GiB, all of which would be held in memory; give a "
                "map-style data set or a folder of images, which are read when needed"
            )
    if not inputs:
        raise ValueError(f"part {name} of the data has no items")
    if not labels:
        return Unlabelled(inputs)
    joined = torch.cat(inputs).numpy()
    return PreparedInputs(joined, _checked_labels(labels, len(joined)), joined.shape[1:])


def _labels_of(items: Any, name: str) -> IntArray:
    """Return the labels of a map-style data set, without preparing its inputs where possible."""
    if isinstance(items, Subset):
        rows = np.asarray(items.indices, dtype=np.int64)
        return _labels_of(items.dataset, name)[rows]
    if isinstance(items, ConcatDataset):
        return np.concatenate([_labels_of(part, name) for part in items.datasets])
    for attribute in ("targets", "labels"):
        known = getattr(items, attribute, None)
        if known is not None and hasattr(known, "__len__") and len(known) == len(items):
            return _checked_labels(known, len(items))
    columns = getattr(items, "column_names", None)
    if columns is not None:  # of Hugging Face
        column = next((name for name in _LABEL_COLUMNS if name in columns), None)
        if column is not None:
            return _checked_labels(list(items.with_format(None)[column]), len(items))
    logger.info("reading the labels of %d items of %s, each once", len(items), name)
    return _checked_labels(
        [split_item(items[i], f"item {i} of {name}")[1] for i in range(len(items))], len(items)
    )


def class_names_of(items: Any) -> tuple[str, ...] | None:
    """Return the class names that a data set of torchvision or Hugging Face knows."""
    if isinstance(items, DataLoader | Subset):
        return class_names_of(items.dataset)
    names = getattr(items, "classes", None)
    features = getattr(items, "features", None)
    if names is None and isinstance(features, Mapping):
        label = next(
            (features[k] for k in ("label", "labels", "fine_label") if k in features), None
        )
        names = getattr(label, "names", None)
    if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        return None
    return tuple(names)


def _checked_labels(labels: Any, count: int) -> IntArray:
    """Return class labels as int64.

    Raises:
        ValueError: they are no whole numbers >= 0, or not as many as inputs.
    """
    try:
        array = np.asarray(labels)
    except ValueError:
        array = np.empty(0)
    if array.shape != (count,) or array.dtype.kind not in "iu" or (count and array.min() < 0):
        raise ValueError(
            f"labels must be {count} class numbers from 0 on, got {array.dtype} of shape "
            f"{array.shape}; for targets of another kind give a FunctionTask"
        )
    return array.astype(np.int64)


def require_statistics(given: Transform) -> None:
    """Refuse a transform without mean and std, which images need.

    Raises:
        ValueError: they are not given.
    """
    if given.mean is None:
        raise ValueError(
            "images must be normalised as in the network's training; give "
            "transform=Transform(mean=..., std=...), or Transform(weights_transform=...)"
        )


def is_image(value: Any) -> bool:
    """Return whether a value is an image of Pillow."""
    from PIL.Image import Image

    return isinstance(value, Image)


def image_files(images: Sequence[Any], labels: IntArray, given: Transform) -> ImageFiles:
    """Return images that are read when they are needed.

    Args:
        images: Paths, or what opens as an image.
        labels: Their classes, ``(len(images),)``.
        given: How they become the network's input.
    """
    side, colour = given.image_size or 224, given.colour or "RGB"
    return ImageFiles(images, labels, side, side, view=given.view(), colour=colour)
