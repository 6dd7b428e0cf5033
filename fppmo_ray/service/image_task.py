"""The built-in task: images that belong to classes."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fppmo_ray.pruning import Tracing
from fppmo_ray.service.function_task import FunctionTask
from fppmo_ray.service.images_on_worker import ImagesOnWorker
from fppmo_ray.service.problem import Task
from fppmo_ray.service.resources import Resources
from fppmo_ray.service.settings import SearchSettings
from fppmo_ray.service.worker_protocol import digest
from fppmo_ray.training import (
    CentreCrop,
    Dataset,
    ImageArrays,
    ImageSet,
    Interface,
    PreparedInputs,
    Shard,
    Splits,
    Transform,
    example_batch,
    interface_of,
    stratified_splits,
)
from fppmo_ray.training.ddp import ENOUGH_IMAGES
from fppmo_ray.training.file_paths import FilePaths
from fppmo_ray.training.own_data import Unlabelled, own_code, own_data

_HELD_OUT_SHARE = 0.06, 0.04  # search-val and choose-val: 3,000 and 2,000 of CIFAR-10's 50,000


@dataclass(frozen=True, kw_only=True)
class ImageClassification:
    """Images, their classes, and which rows of the training images serve for what."""

    dataset: Dataset
    """Training and test images. The test part is read once, for the final figures."""
    splits: Splits
    """Rows of the training images to train on, to score on, and to choose on."""

    @property
    def measure(self) -> None:
        """None: tables show the accuracy."""
        return

    @property
    def follows_compute(self) -> bool:
        """True: all passes are computed by this package."""
        return True

    @property
    def has_images(self) -> bool:
        """True."""
        return True

    @property
    def shares_training(self) -> bool:
        """True: several processes can each take a part of every batch."""
        return True

    def inputs(self) -> tuple[Tensor, ...]:
        """Return a batch of one image, on the CPU."""
        return (example_batch(self.dataset),)

    def num_images(self) -> dict[str, int]:
        """Return how many images there are to train, score, choose and test on."""
        splits = self.splits
        rows = splits.search_train, splits.search_val, splits.choose_val, self.dataset.test.labels
        names = ("train", "score", "choose", "test")
        return {name: len(part) for name, part in zip(names, rows, strict=True)}

    def first_lines(self) -> list[str]:
        """Return how many images there are, how they become inputs, and the classes' names."""
        dataset = self.dataset
        counts = (f"{count:,}" for count in self.num_images().values())
        interface = self.interface()
        names = interface.class_names
        return [
            "{}: {} images to train on, {} to score on, {} to choose on, {} to test on".format(
                dataset.name, *counts
            ),
            "images: prepared by the data set itself"
            if interface.preprocessing is None
            else f"images: {interface.preprocessing}; training: {dataset.augmentation}",
            f"{dataset.num_classes} classes, in the order of the network's outputs: "
            + ("without names" if names is None else listed(names)),
        ]

    def interface(self) -> Interface:
        """Return preprocessing and class names."""
        return interface_of(self.dataset)

    def identity(self) -> dict[str, Any]:
        """Return a digest of images, labels, preparation and splits."""
        return {"data": digest_data(self.dataset, self.splits)}

    def functions(self) -> tuple[Callable[..., Any] | None, ...]:
        """Return the data sets whose code is the user's own, which has to travel to the workers."""
        parts = self.dataset.train, self.dataset.test
        return tuple(item for part in parts for item in own_code(part))

    def checked_settings(self, settings: SearchSettings, resources: Resources) -> SearchSettings:
        """Return the settings unchanged.

        Args:
            settings: The user's settings.
            resources: Where the search runs.

        Raises:
            ValueError: the splits name rows that the data set does not have, or a batch cannot be
                divided evenly among the workers that fine-tune together.
        """
        _check_rows(self.splits, len(self.dataset.train))
        shard = Shard(0, resources.fine_tune_workers)
        part = shard.batch_size(settings.fine_tune.batch_size)
        if shard.count > 1 and part < ENOUGH_IMAGES and resources.device_type == "cpu":
            enough = ENOUGH_IMAGES * shard.count
            warnings.warn(
                f"each of {shard.count} fine_tune_workers has {part} images of a batch, too few "
                f"for the statistics of batch norms; give a batch_size of {enough} and a learning "
                "rate that is scaled with it, or fewer fine_tune_workers",
                stacklevel=2,
            )
        return settings

    @torch.no_grad()
    def check_network(self, network: nn.Module) -> None:
        """Refuse a network that does not return one logit per class.

        Args:
            network: The dense network on the CPU.

        Raises:
            ValueError: its output for one image has another type or shape.
        """
        dataset, was_training = self.dataset, network.training
        logits = network.eval()(example_batch(dataset))
        network.train(was_training)
        if not isinstance(logits, Tensor) or logits.shape != (1, dataset.num_classes):
            got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(
                f"the network must return logits of shape (N, {dataset.num_classes}) for data set "
                f"{dataset.name}, got {got} for one image"
            )

    def open(
        self, tracing: Tracing, settings: SearchSettings, device: torch.device, *, threads: int
    ) -> ImagesOnWorker:
        """Return the task with its images on a worker's device; see ``Task.open``."""
        return ImagesOnWorker(self.dataset, self.splits, tracing, settings, device, threads=threads)


def task_of(
    data: Any,
    splits: Splits | None = None,
    *,
    transform: Transform | None = None,
    class_names: Sequence[str] | None = None,
    seed: int = 0,
) -> Task:
    """Return the task of whatever data a caller has.

    Args:
        data: A task or a data set, or anything that ``own_data`` takes. Inputs without labels make
            a task in which pruned networks are compared with the dense one.
        splits: Rows of the training images to train, score and choose on, if the caller names them.
        transform: How images that are no tensors yet become the network's input.
        class_names: Names of the classes in the order of the network's outputs.
        seed: Seed of the default splits, >= 0.

    Raises:
        ValueError: the data is something else, or an argument does not go with it.
    """
    if not isinstance(data, Dataset) and hasattr(data, "checked_settings"):
        if splits is not None:
            raise ValueError("splits divide a data set; a task chooses the data it looks at itself")
        task: Task = data
        return task
    if isinstance(data, Dataset):
        return image_classification(data, splits, seed=seed)
    found = own_data(data, transform, class_names=class_names, seed=seed)
    if isinstance(found, Unlabelled):
        parts = found.parts
        return FunctionTask(example_inputs=parts[0][:1], images=lambda: parts)
    return image_classification(found.dataset, splits or found.splits, seed=seed)


def image_classification(
    dataset: Dataset, splits: Splits | None = None, *, seed: int = 0
) -> ImageClassification:
    """Return the task of a data set.

    Args:
        dataset: Images and classes.
        splits: Rows to train, score and choose on; by default 90, 6 and 4 % of every class.
        seed: Seed of the default splits, >= 0.
    """
    if splits is None:
        search_val, choose_val = _HELD_OUT_SHARE
        splits = stratified_splits(
            dataset.train.labels, search_val=search_val, choose_val=choose_val, seed=seed
        )
    return ImageClassification(dataset=dataset, splits=splits)


def listed(names: Sequence[str], num_shown: int = 12) -> str:
    """Return names with commas, the middle ones left out where there are many.

    Args:
        names: The names.
        num_shown: How many are shown at most.
    """
    if len(names) <= num_shown:
        return ", ".join(names)
    return f"{', '.join(names[: num_shown - 1])}, ..., {names[-1]}"


def _check_rows(splits: Splits, num_images: int) -> None:
    for name in ("search_train", "search_val", "choose_val"):
        rows = getattr(splits, name)
        if rows.min() < 0 or rows.max() >= num_images:
            raise ValueError(
                f"rows of {name} must be in [0, {num_images - 1}], those of the training images, "
                f"got {rows.min()} to {rows.max()}"
            )


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


def _digest_images(images: ImageSet) -> str:
    """Return the digest of images; of those that are read when they are needed, what is cheap."""
    if isinstance(images, ImageArrays):
        return digest({"images": images.images, "labels": images.labels})
    if isinstance(images, PreparedInputs):
        in_memory = isinstance(images.items, np.ndarray)
        known = {"items": images.items} if in_memory else {}
        return digest({"labels": images.labels, **known})
    names = _names(images.paths)
    how: tuple[object, ...] = (images.height, images.width)
    # With the defaults, digests stay those of older versions.
    how += () if images.view == CentreCrop() else (images.view,)
    how += () if images.colour == "RGB" else (images.colour,)
    text = repr((*how, names))
    return digest({"labels": images.labels}) + hashlib.sha256(text.encode()).hexdigest()


def _names(paths: Sequence[Any]) -> list[str]:
    """Return what is cheap to know of images: their file names below a common folder, if any."""
    if not isinstance(paths, tuple | FilePaths):
        return [f"{len(paths)} images"]
    files = paths if isinstance(paths, FilePaths) else FilePaths(paths)
    return files.relative_names()  # the data may be in another folder than before
