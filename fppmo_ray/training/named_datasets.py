"""Read data sets by name: digits, CIFAR-10, CIFAR-100, or a folder of images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from fppmo_ray.training.dataset import Augmentation, Dataset, ImageArrays
from fppmo_ray.training.image_folder import load_image_folder
from fppmo_ray.training.parquet import find_shards, read_parquet_images
from fppmo_ray.training.preprocessing import MEAN, STD, Transform
from fppmo_ray.training.splits import stratified_rows

DatasetName = Literal["digits", "cifar10", "cifar100", "image_folder"]
"""Names that ``load_dataset`` accepts."""

_PLAIN = Transform()
_CIFAR10_NAMES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)
_CIFAR_CLASSES = {"cifar10": 10, "cifar100": 100}
_CIFAR_FOLDERS = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}
_CIFAR_SIDE = 32


def load_dataset(
    name: DatasetName,
    path: str | Path | None = None,
    transform: Transform = _PLAIN,
    *,
    class_names: Sequence[str] | None = None,
    byte_limit: int = 2 * 1024**3,
) -> Dataset:
    """Read a data set from disk (``digits`` comes with scikit-learn).

    Args:
        name: ``digits``: 1,797 handwritten digits of 8 x 8 pixels. ``cifar10`` and ``cifar100``:
            parquet files as on the Hugging Face hub, or torchvision's folder. ``image_folder``:
            ``train/<class>/*`` and ``test/<class>/*`` or ``val/<class>/*``.
        path: Folder of the data set; None for ``digits``.
        transform: How images become a network's input. By default each set's own normalisation
            and augmentation; ``cifar10``, ``cifar100`` and ``image_folder`` have ImageNet's mean
            and std. A network trained with others must be given them.
        class_names: Class names in the order of the network's outputs, for an ``image_folder``;
            None: sorted.
        byte_limit: An ``image_folder`` set with more bytes of pixels stays on disk.

    Raises:
        ValueError: the name is unknown, or the files at ``path`` are missing or broken.
    """
    if name not in get_args(DatasetName):
        raise ValueError(f"data set must be one of {get_args(DatasetName)}, got {name!r}")
    if class_names is not None and name != "image_folder":
        raise ValueError(f"{name} has class names of its own; leave class_names out")
    if name == "digits":
        return _with_transform(_digits(), transform)
    path = None if path is None else Path(path)
    if path is None or not path.is_dir():
        raise ValueError(f"data set {name} needs the folder that holds it, got {path}")
    if name == "image_folder":
        return load_image_folder(path, transform, class_names=class_names, byte_limit=byte_limit)
    return _with_transform(_cifar(name, path), transform)


def _with_transform(dataset: Dataset, transform: Transform) -> Dataset:
    """Return a data set in memory with the normalisation and augmentation of a transform.

    Raises:
        ValueError: the transform asks for another size, crop or colour.
    """
    given = transform.filled()
    side = dataset.train.images.shape[1] if isinstance(dataset.train, ImageArrays) else None
    asked = {
        "image_size": given.image_size not in (None, side),
        "resize": given.resize is not None,
        "squash": given.squash,
        "interpolation": given.interpolation is not None,
        "colour": given.colour is not None,
    }
    if any(asked.values()):
        names = ", ".join(name for name, is_asked in asked.items() if is_asked)
        raise ValueError(
            f"images of {dataset.name} have {side} x {side} pixels and are kept so; leave out "
            f"{names}, or write the images to folders and read them as image_folder"
        )
    mean, std = given.mean or dataset.mean, given.std or dataset.std
    augmentation = given.augmentation(dataset.augmentation)
    return replace(dataset, mean=mean, std=std, augmentation=augmentation)


def _digits() -> Dataset:
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    images = np.round(pixels * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
    labels = labels.astype(np.int64)
    test = stratified_rows(labels, len(labels) // 5, np.random.default_rng(0))
    train = np.setdiff1d(np.arange(len(labels)), test)
    shares = images[train] / 255
    return Dataset(
        name="digits",
        train=ImageArrays(images[train], labels[train]),
        test=ImageArrays(images[test], labels[test]),
        num_classes=10,
        mean=(float(shares.mean()),),
        std=(float(shares.std()),),
        # A shift by 1 of 8 pixels is that of 4 in 32; mirrored digits are no digits.
        augmentation=Augmentation(padding=1, flip=False),
        class_names=tuple(map(str, range(10))),
    )


def _cifar(name: Literal["cifar10", "cifar100"], path: Path) -> Dataset:
    train, test = _cifar_part(name, path, "train"), _cifar_part(name, path, "test")
    return Dataset(
        name=name,
        train=train,
        test=test,
        num_classes=_CIFAR_CLASSES[name],
        mean=MEAN,  # of ImageNet: the public CIFAR ResNets (akamaster) were trained with them
        std=STD,
        augmentation=Augmentation(padding=4, flip=True),  # He et al. 2016, section 4.2
        class_names=_CIFAR10_NAMES if name == "cifar10" else None,
    )


def _cifar_part(
    name: Literal["cifar10", "cifar100"], path: Path, part: Literal["train", "test"]
) -> ImageArrays:
    num_classes, folder = _CIFAR_CLASSES[name], _CIFAR_FOLDERS[name]
    shards = find_shards(path, part)
    if shards:
        return read_parquet_images(
            shards, num_classes=num_classes, height=_CIFAR_SIDE, width=_CIFAR_SIDE
        )
    root = path.parent if path.name == folder else path
    if not (root / folder).is_dir():
        raise ValueError(f"expected {part}-*.parquet or the folder {folder} in {path}, found none")
    return _torchvision_cifar(name, root, train=part == "train")


def _torchvision_cifar(
    name: Literal["cifar10", "cifar100"], root: Path, *, train: bool
) -> ImageArrays:
    """Read torchvision's CIFAR files, which it unpickles only after comparing their checksums."""
    from torchvision.datasets import CIFAR10, CIFAR100

    try:
        data = {"cifar10": CIFAR10, "cifar100": CIFAR100}[name](root, train=train, download=False)
    except RuntimeError as error:
        raise ValueError(
            f"{root / _CIFAR_FOLDERS[name]} is incomplete or corrupt; fetch it again"
        ) from error
    return ImageArrays(data.data, np.array(data.targets, dtype=np.int64))
