"""Read data sets by name: digits, CIFAR-10, CIFAR-100, or a folder of images."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

import numpy as np

from fppmo_ray.training.dataset import Augmentation, Dataset, ImageArrays
from fppmo_ray.training.image_folder import MEAN, STD, read_image_folder
from fppmo_ray.training.parquet import find_shards, read_parquet_images
from fppmo_ray.training.splits import stratified_rows

DatasetName = Literal["digits", "cifar10", "cifar100", "image_folder"]
"""Names that ``load_dataset`` accepts."""

_CIFAR_CLASSES = {"cifar10": 10, "cifar100": 100}
_CIFAR_FOLDERS = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}
_CIFAR_SIDE = 32


def load_dataset(
    name: DatasetName,
    path: Path | None = None,
    *,
    image_size: int = 224,
    byte_limit: int = 2 * 1024**3,
) -> Dataset:
    """Read a data set from disk (``digits`` comes with scikit-learn).

    Args:
        name: ``digits``: 1,797 handwritten digits of 8 x 8 pixels. ``cifar10`` and ``cifar100``:
            parquet files as on the Hugging Face hub, or torchvision's folder. ``image_folder``:
            ``train/<class>/*`` and ``test/<class>/*`` or ``val/<class>/*``.
        path: Folder of the data set; None for ``digits``.
        image_size: Side in pixels to which the images of an ``image_folder`` are cropped.
        byte_limit: An ``image_folder`` set with more bytes of pixels stays on disk.

    Raises:
        ValueError: the name is unknown, or the files at ``path`` are missing or broken.
    """
    if name not in get_args(DatasetName):
        raise ValueError(f"data set must be one of {get_args(DatasetName)}, got {name!r}")
    if name == "digits":
        return _digits()
    if path is None or not path.is_dir():
        raise ValueError(f"data set {name} needs the folder that holds it, got {path}")
    if name == "image_folder":
        return _image_folder(path, image_size, byte_limit)
    return _cifar(name, path)


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


def _image_folder(path: Path, image_size: int, byte_limit: int) -> Dataset:
    if image_size < 1:
        raise ValueError(f"image_size must be at least 1 pixel, got {image_size}")
    train, test, classes = read_image_folder(path, image_size=image_size, byte_limit=byte_limit)
    return Dataset(
        name="image_folder",
        train=train,
        test=test,
        num_classes=len(classes),
        mean=MEAN,
        std=STD,
        augmentation=Augmentation(padding=image_size // 8, flip=True),
    )
