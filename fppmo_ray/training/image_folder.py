"""Images in folders: one folder per class, in ``train/`` and in ``test/`` or ``val/``."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np

from fppmo_ray.training.dataset import (
    CentreCrop,
    Dataset,
    ImageArrays,
    ImageFiles,
    ImageSet,
    Interpolation,
    RandomResizedCrop,
)
from fppmo_ray.training.decoding import decode_to_size

MEAN = (0.485, 0.456, 0.406)
"""Mean of ImageNet's training images, per channel."""
STD = (0.229, 0.224, 0.225)
"""Standard deviation of ImageNet's training images, per channel."""

_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})


def read_image_folder(
    path: Path, *, image_size: int, byte_limit: int
) -> tuple[ImageSet, ImageSet, list[str]]:
    """Return the training set, the test set and the class names in label order (sorted).

    Args:
        path: Folder with ``train/<class>/*`` and ``test/<class>/*`` or ``val/<class>/*``.
        image_size: Side in pixels of the square to which images are cropped.
        byte_limit: A set whose pixels take at most this many bytes is decoded into memory; a larger
            one stays on disk and is decoded when needed.

    Raises:
        ValueError: a folder is missing or empty, the test set has a class that the training set
            lacks, or an image cannot be decoded.
    """
    train, test, classes = list_image_folder(path, image_size=image_size)
    return _load_if_small(train, byte_limit), _load_if_small(test, byte_limit), classes


def list_image_folder(
    path: Path, *, image_size: int, held_out: Sequence[str] = ("test", "val")
) -> tuple[ImageFiles, ImageFiles, list[str]]:
    """Return the same sets as ``read_image_folder``, without decoding any image.

    Args:
        path: Folder with ``train/<class>/*`` and a folder of held-out images.
        image_size: Side in pixels of the square to which images are cropped.
        held_out: Possible names of that folder; the first existing one is used.

    Raises:
        ValueError: a folder is missing or empty, or the test set has a class that the training set
            lacks.
    """
    classes = _class_names(path / "train")
    test_path = next((path / name for name in held_out if (path / name).is_dir()), None)
    if test_path is None:
        raise ValueError(f"{path} needs a folder {' or '.join(held_out)} beside train")
    strangers = sorted(set(_class_names(test_path)) - set(classes))
    if strangers:
        raise ValueError(f"{test_path} has classes that {path / 'train'} lacks: {strangers}")
    train = _list_files(path / "train", classes, image_size)
    return train, _list_files(test_path, classes, image_size), classes


def _class_names(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}; expected one folder per class in it")
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    if not names:
        raise ValueError(f"{folder} holds no class folders; expected one folder per class in it")
    return names


def _list_files(folder: Path, classes: list[str], image_size: int) -> ImageFiles:
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = _images_in(folder / name)
        paths += found
        labels += [label] * len(found)
    return ImageFiles(tuple(paths), np.array(labels, dtype=np.int64), image_size, image_size)


def _images_in(class_folder: Path) -> list[Path]:
    found = sorted(path for path in class_folder.rglob("*") if path.suffix.lower() in _SUFFIXES)
    if not found:
        raise ValueError(
            f"class folder {class_folder} holds no images; add some, or remove the class from "
            "both the training and the test folder"
        )
    return found


def _load_if_small(files: ImageFiles, byte_limit: int) -> ImageSet:
    shape = (len(files), files.height, files.width, 3)
    if np.prod(shape, dtype=np.int64) > byte_limit:
        return files
    images = np.empty(shape, dtype=np.uint8)

    def load(row: int) -> None:
        path = files.paths[row]
        images[row] = decode_to_size(path, str(path), files.height, files.width)

    with ThreadPoolExecutor() as pool:
        for _ in pool.map(load, range(len(files))):
            pass
    return ImageArrays(images, files.labels)


def load_imagenet(
    path: Path, *, crop: int = 224, resize: int = 256, interpolation: Interpolation = "bilinear"
) -> Dataset:
    """List ImageNet, or a folder with its layout; images are decoded when they are needed.

    Networks are evaluated on the centre of an image whose shorter side was resized, and trained on
    random parts of it, mirrored or not. torchvision's documentation of a set of weights gives the
    sizes.

    Args:
        path: Folder with ``train/<class>/*`` and ``val/<class>/*``. Labels follow the sorted class
            names, as those of public weights do.
        crop: Side in pixels of a network's input.
        resize: Length in pixels to which the shorter side is resized, at least ``crop``.
        interpolation: Interpolation of the resizing.

    Raises:
        ValueError: a folder is missing or empty, or a size is out of its range.
    """
    if crop < 1:
        raise ValueError(f"crop must be at least 1 pixel, got {crop}")
    train, val, classes = list_image_folder(path, image_size=crop, held_out=("val",))
    view = CentreCrop(resize=resize, interpolation=interpolation)
    return Dataset(
        name="imagenet",
        train=replace(train, centre_crop=view),
        test=replace(val, centre_crop=view),
        num_classes=len(classes),
        mean=MEAN,
        std=STD,
        augmentation=RandomResizedCrop(),
    )
