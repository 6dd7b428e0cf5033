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
from torch.utils.data import ConcatDataset, IterableDataset, Subset

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
from fppmo_ray.training.own_parts import (
    ALL_KINDS,
    ItemImages,
    Unlabelled,
    class_names_of,
    image_files,
    image_set,
    is_image,
    require_statistics,
)
from fppmo_ray.training.parquet_stream import find_parts, open_shards, shown
from fppmo_ray.training.prepared import Rows, split_item, to_input
from fppmo_ray.training.preprocessing import Transform
from fppmo_ray.training.splits import CHOOSE_SHARE, Splits, stratified_rows

logger = logging.getLogger(__name__)

_HELD_OUT = ("val", "validation", "valid")
_TEST_SHARE = 0.1
_BATCH = 250


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
    names = class_names or class_names_of(parts["train"])
    sets = {name: image_set(part, transform, name) for name, part in parts.items()}
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
        raise ValueError(f"data must be {ALL_KINDS}; there is no folder {path}")
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
    require_statistics(given)
    parts: dict[str, ImageSet] = {}
    for part in ("train", "test", *_HELD_OUT):
        if part in found and not (part != "train" and "test" in parts):
            images, labels, known = open_shards(root, part)
            names = names or known
            if part == "train" or labels.min() >= 0:  # the test parts of contests have no labels
                parts["train" if part == "train" else "test"] = image_files(images, labels, given)
    return _assemble(parts, transform, names, seed)


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
        if not is_image(value):
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
