"""Data sets of what users have: arrays, torch data sets and loaders, Hugging Face data, folders."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, IterableDataset, Subset, default_collate

from fppmo_ray.training.dataset import (
    Augmentation,
    Dataset,
    ImageArrays,
    ImageFiles,
    ImageSet,
    IntArray,
    PreparedInputs,
)
from fppmo_ray.training.image_folder import load_image_folder
from fppmo_ray.training.images import open_images
from fppmo_ray.training.parquet_stream import find_parts, open_shards, shown
from fppmo_ray.training.prepared import Rows, split_item, to_input
from fppmo_ray.training.preprocessing import Transform
from fppmo_ray.training.splits import CHOOSE_SHARE, Splits, stratified_rows

logger = logging.getLogger(__name__)

_HELD_OUT = ("val", "validation", "valid")
_LABEL_COLUMNS = ("label", "labels", "fine_label")
_TEST_SHARE = 0.1
_BATCH = 250
_BYTE_LIMIT = 4 * 1024**3
_ALL_KINDS = (
    "a Dataset of load_dataset, a folder of images, (images, labels) as arrays, a torch data set "
    "or loader, a Hugging Face data set, or a dict of these with train, val and test"
)


@dataclass(frozen=True, eq=False)
class Unlabelled:
    """Inputs without labels, all of one shape."""

    parts: Sequence[Tensor]
    """Batches of inputs, float32."""


@dataclass(frozen=True, eq=False)
class OwnData:
    """A data set made of the caller's data, and which rows serve for what, if the caller says."""

    dataset: Dataset
    """The data set."""
    splits: Splits | None
    """The rows; None: they are drawn from the training set."""


def own_data(
    data: Any,
    transform: Transform | None = None,
    *,
    class_names: Sequence[str] | None = None,
    seed: int = 0,
) -> OwnData | Unlabelled:
    """Return a data set of what the caller has.

    Args:
        data: A folder of images; a folder or URI (``s3://bucket/path``, ``gs://...``) of parquet
            files with encoded images, as on the Hugging Face hub, which are read when they are
            needed; arrays ``(images, labels)``: uint8 ``(N, H, W, C)`` to be
            normalised, or floats ``(N, C, H, W)`` as the network takes them; a torch data set
            (map-style or iterable) or DataLoader, or a Hugging Face data set, of pairs (input,
            label) or of inputs alone. A dict has the parts ``train`` and, where there are any,
            ``val`` and ``test``. Without ``val``, held-out rows are drawn from ``train``; without
            ``test``, a tenth of ``train`` is set aside for it. What can only be iterated is kept
            in memory.
        transform: How images that are no tensors yet become the network's input.
        class_names: Names of the classes in the order of the network's outputs.
        seed: Seed of the rows that are set aside, >= 0.

    Returns:
        The data set, or the inputs if they have no labels.

    Raises:
        ValueError: the data is something else, does not fit in memory, or its transform is unknown.
    """
    if isinstance(data, str | Path):
        if "://" in str(data) or _has_shards(Path(data)):
            return _shards(str(data), transform, class_names, seed)
        return OwnData(_folder(data, transform, class_names), None)
    parts = dict(data) if isinstance(data, Mapping) else {"train": data}
    if "train" not in parts:
        raise ValueError(f"data must have a part train, got {', '.join(map(str, parts))}")
    names = class_names or _class_names(parts["train"])
    sets = {name: _image_set(part, transform, name) for name, part in parts.items()}
    train = sets["train"]
    if isinstance(train, Unlabelled):
        return train
    labelled: dict[str, ImageSet] = {}
    for name, part in sets.items():
        if isinstance(part, Unlabelled):
            raise ValueError(f"part {name} of the data has no labels and train has; give both")
        labelled[name] = part
    return _assemble(labelled, transform, names, seed)


def _folder(path: str | Path, transform: Transform | None, names: Sequence[str] | None) -> Dataset:
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(f"data must be {_ALL_KINDS}; there is no folder {path}")
    return load_image_folder(folder, transform or Transform(), class_names=names)


def _has_shards(folder: Path) -> bool:
    return folder.is_dir() and not (folder / "train").is_dir() and bool(find_parts(str(folder)))


def _shards(
    root: str, transform: Transform | None, names: Sequence[str] | None, seed: int
) -> OwnData:
    """Return the data set of parquet files, of which only labels are read yet."""
    found = find_parts(root)
    if "train" not in found:
        raise ValueError(
            f"{shown(root)} must hold parquet files train-*.parquet, found "
            f"{', '.join(f'{part}-*' for part in found) or 'none'}"
        )
    given = (transform or Transform()).filled()
    _require_statistics(given)
    parts: dict[str, ImageSet] = {}
    for part in ("train", "test", *_HELD_OUT):
        if part in found and not (part != "train" and "test" in parts):
            images, labels, known = open_shards(root, part)
            names = names or known
            if part == "train" or labels.min() >= 0:  # the test parts of contests have no labels
                parts["train" if part == "train" else "test"] = _files(images, labels, given)
    return _assemble(parts, transform, names, seed)


def _files(images: Sequence[Any], labels: IntArray, given: Transform) -> ImageFiles:
    side, colour = given.image_size or 224, given.colour or "RGB"
    return ImageFiles(images, labels, side, side, view=given.view(), colour=colour)


def _assemble(
    parts: dict[str, ImageSet],
    transform: Transform | None,
    names: Sequence[str] | None,
    seed: int,
) -> OwnData:
    """Return train and test sets, with held-out rows behind the training rows if there are any."""
    train = parts["train"]
    held_out = next((parts[name] for name in _HELD_OUT if name in parts), None)
    test = parts.get("test")
    rng = np.random.default_rng([seed, len(train)])
    if test is None:
        rows = stratified_rows(train.labels, max(1, round(_TEST_SHARE * len(train))), rng)
        logger.info("no test part: %d of %d images are set aside for it", len(rows), len(train))
        test = _take(train, rows)
        train = _take(train, np.setdiff1d(np.arange(len(train)), rows))
    splits = None
    if held_out is not None:
        rows = len(train) + np.arange(len(held_out))
        count = max(1, round(CHOOSE_SHARE * len(rows)))
        choose = stratified_rows(held_out.labels, count, rng) + len(train)
        splits = Splits(
            search_train=np.arange(len(train)),
            search_val=np.setdiff1d(rows, choose),
            choose_val=choose,
        )
        train = _join(train, held_out)
    labels = np.concatenate([train.labels, test.labels])
    given = (transform or Transform()).filled()
    prepared = isinstance(train, PreparedInputs)
    if prepared and transform is not None and transform != Transform():
        raise ValueError(
            "a transform prepares images, and the data is prepared already (tensors of floats); "
            "leave the transform out"
        )
    side = 0 if isinstance(train, PreparedInputs) else _side(train)
    default = Augmentation(padding=0 if prepared else side // 8, flip=not prepared)
    dataset = Dataset(
        name="own data",
        train=train,
        test=test,
        num_classes=int(labels.max()) + 1 if names is None else len(names),
        mean=given.mean or (),
        std=given.std or (),
        augmentation=default if prepared else given.augmentation(default),
        class_names=None if names is None else tuple(names),
    )
    return OwnData(dataset, splits)


def _side(images: ImageArrays | ImageFiles) -> int:
    return images.height if isinstance(images, ImageFiles) else images.images.shape[1]


def _image_set(data: Any, transform: Transform | None, name: str) -> ImageSet | Unlabelled:
    """Return one part of the data in the form that images are served from."""
    if isinstance(data, tuple) and len(data) == 2 and hasattr(data[0], "dtype"):
        return _of_arrays(data[0], data[1], transform)
    if isinstance(data, np.ndarray | Tensor):
        return Unlabelled([to_input(data, f"part {name}")])
    if isinstance(data, DataLoader):
        plain = data.collate_fn is default_collate
        if plain and not isinstance(data.dataset, IterableDataset):
            return _image_set(data.dataset, transform, name)
        return _in_memory(data, name, batched=True)
    if hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        return _of_items(data, transform, name)
    if isinstance(data, Iterable):
        return _in_memory(data, name, batched=False)
    raise ValueError(f"part {name} of the data must be {_ALL_KINDS}, got {type(data).__name__}")


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
    _require_statistics(given)
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
    if not _is_image(value):
        shape = tuple(to_input(value, f"item 0 of {name}").shape)
        return PreparedInputs(items, labels, shape)
    given = (transform or Transform()).filled()
    _require_statistics(given)
    return _files(ItemImages(items), labels, given)


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


def _class_names(items: Any) -> tuple[str, ...] | None:
    """Return the class names that a data set of torchvision or Hugging Face knows."""
    if isinstance(items, DataLoader | Subset):
        return _class_names(items.dataset)
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


def _require_statistics(given: Transform) -> None:
    if given.mean is None:
        raise ValueError(
            "images must be normalised as in the network's training; give "
            "transform=Transform(mean=..., std=...), or Transform(weights_transform=...)"
        )


def _is_image(value: Any) -> bool:
    from PIL.Image import Image

    return isinstance(value, Image)


def _take(images: ImageSet, rows: IntArray) -> ImageSet:
    labels = images.labels[rows]
    if isinstance(images, ImageArrays):
        return replace(images, images=images.images[rows], labels=labels)
    if isinstance(images, ImageFiles):
        return replace(images, paths=Rows(images.paths, rows.tolist()), labels=labels)
    if isinstance(images.items, np.ndarray):
        return replace(images, items=images.items[rows], labels=labels)
    return replace(images, items=Rows(images.items, rows.tolist()), labels=labels)


def _join(first: ImageSet, second: ImageSet) -> ImageSet:
    labels = np.concatenate([first.labels, second.labels])
    if isinstance(first, ImageArrays) and isinstance(second, ImageArrays):
        return replace(first, images=np.concatenate([first.images, second.images]), labels=labels)
    if isinstance(first, ImageFiles) and isinstance(second, ImageFiles):
        paths: Any = ConcatDataset([first.paths, second.paths])  # type: ignore[list-item]
        return replace(first, paths=paths, labels=labels)
    if isinstance(first, PreparedInputs) and isinstance(second, PreparedInputs):
        both = first.items, second.items
        in_memory = all(isinstance(items, np.ndarray) for items in both)
        items: Any = np.concatenate(both) if in_memory else ConcatDataset(both)
        return replace(first, items=items, labels=labels)
    raise ValueError("train and val must be of the same kind, such as two torch data sets")


def own_code(images: ImageSet) -> list[Any]:
    """Return the caller's data sets and transforms inside an image set, for their classes."""
    found: list[Any] = []
    waiting: list[Any] = [getattr(images, "items", getattr(images, "paths", None))]
    while waiting:
        item = waiting.pop()
        if isinstance(item, Rows):
            waiting.append(item.source)
        elif isinstance(item, ItemImages):
            waiting.append(item.items)
        elif isinstance(item, Subset):
            waiting.append(item.dataset)
        elif isinstance(item, ConcatDataset):
            waiting += item.datasets
        elif hasattr(item, "__getitem__") and not isinstance(item, np.ndarray | tuple):
            found += [item, *(part for part in vars(item).values() if callable(part))]
    return found


def own_batches(data: Any, transform: Transform | None, num_images: int) -> Iterator[Any]:
    """Yield a few inputs of the caller's data in batches, with labels where there are any.

    Args:
        data: See ``own_data``; of a dict, the part ``train``.
        transform: How images that are no tensors yet become the network's input.
        num_images: How many inputs are drawn at most, at random.
    """
    if isinstance(data, Mapping):
        data = data.get("train", data)
    if isinstance(data, IterableDataset):
        yield from _batched(islice(data, num_images))
        return
    if hasattr(data, "__getitem__") and not isinstance(data, str | np.ndarray | tuple):
        value, _ = split_item(data[0], "item 0")
        if not _is_image(value):
            yield from _batched(data[int(row)] for row in _few(len(data), num_images))
            return
    found = own_data(data, transform)
    if isinstance(found, Unlabelled):
        inputs = torch.cat([*found.parts])
        yield from torch.split(inputs[_few(len(inputs), num_images)], _BATCH)
        return
    dataset = found.dataset
    rows = _few(len(dataset.train), num_images)
    yield from open_images(dataset.train, rows, dataset).batches(_BATCH)


def _batched(items: Iterable[Any]) -> Iterator[Any]:
    """Yield batches of inputs, and of their labels if these are class numbers."""
    pairs = [split_item(item, f"item {number}") for number, item in enumerate(items)]
    inputs = [to_input(value, f"item {number}") for number, (value, _) in enumerate(pairs)]
    classes = [label for _, label in pairs]
    has_classes = all(isinstance(label, int | np.integer) for label in classes)
    for start in range(0, len(inputs), _BATCH):
        batch = torch.stack(inputs[start : start + _BATCH])
        yield (batch, torch.tensor(classes[start : start + _BATCH])) if has_classes else batch


def _few(available: int, wanted: int) -> IntArray:
    """Return sorted row numbers, drawn at random because data is often sorted by class."""
    return np.sort(np.random.default_rng(0).permutation(available)[:wanted])


__all__ = ["OwnData", "Unlabelled", "own_batches", "own_code", "own_data"]
