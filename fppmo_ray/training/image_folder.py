"""Images in folders: one folder per class, in ``train/`` and in ``test/`` or ``val/``."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np

from fppmo_ray.training.dataset import (
    NUM_CHANNELS,
    Augmentation,
    Dataset,
    ImageArrays,
    ImageFiles,
    ImageSet,
    RandomResizedCrop,
)
from fppmo_ray.training.decoding import decode_view
from fppmo_ray.training.file_paths import FilePaths
from fppmo_ray.training.preprocessing import MEAN, STD, Transform

_PLAIN = Transform()
_SIDE = 224
_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})


def load_image_folder(
    path: Path,
    transform: Transform = _PLAIN,
    *,
    class_names: Sequence[str] | None = None,
    byte_limit: int = 2 * 1024**3,
) -> Dataset:
    """Read images in folders, one per class, in ``train/`` and in ``test/`` or ``val/``.

    Args:
        path: Folder with ``train/<class>/*`` and ``test/<class>/*`` or ``val/<class>/*``.
        transform: How images become a network's input. By default the centre of 224 x 224 pixels,
            normalised as for ImageNet, cropped with a padding of an eighth and mirrored in
            training.
        class_names: Class names in the order of the network's outputs; None: sorted.
        byte_limit: A set whose pixels take at most this many bytes is decoded into memory; a larger
            one stays on disk and is decoded when needed, as every set with random resized crops.

    Raises:
        ValueError: a folder is missing or empty, classes do not fit each other or ``class_names``,
            or an image cannot be decoded.
    """
    given = transform.filled()
    train, test, classes = list_image_folder(path, given, class_names=class_names)
    side = train.height
    augmentation = given.augmentation(Augmentation(padding=side // 8, flip=True))
    in_files = isinstance(augmentation, RandomResizedCrop)
    mean, std = given.statistics(MEAN, STD)
    return Dataset(
        name="image_folder",
        train=train if in_files else _load_if_small(train, byte_limit),
        test=_load_if_small(test, byte_limit),
        num_classes=len(classes),
        mean=mean,
        std=std,
        augmentation=augmentation,
        class_names=tuple(classes),
    )


def list_image_folder(
    path: Path,
    transform: Transform = _PLAIN,
    *,
    class_names: Sequence[str] | None = None,
    held_out: Sequence[str] = ("test", "val"),
) -> tuple[ImageFiles, ImageFiles, list[str]]:
    """Return the training set, the test set and the class names in label order, decoding nothing.

    Args:
        path: Folder with ``train/<class>/*`` and a folder of held-out images.
        transform: Size, crop and colour of the images.
        class_names: Class names in label order; None: sorted.
        held_out: Possible names of that folder; the first existing one is used.

    Raises:
        ValueError: a folder is missing or empty, the test set has a class that the training set
            lacks, or ``class_names`` are not the training set's.
    """
    found = _class_names(path / "train")
    classes = found if class_names is None else list(class_names)
    if sorted(classes) != found:
        raise ValueError(
            f"class_names must be the class folders of {path / 'train'} in another order, got "
            f"{_first(sorted(set(classes) - set(found)))} that are no folders and lack "
            f"{_first(sorted(set(found) - set(classes)))}"
        )
    test_path = next((path / name for name in held_out if (path / name).is_dir()), None)
    if test_path is None:
        raise ValueError(f"{path} needs a folder {' or '.join(held_out)} beside train")
    strangers = sorted(set(_class_names(test_path)) - set(classes))
    if strangers:
        raise ValueError(f"{test_path} has classes that {path / 'train'} lacks: {strangers}")
    train = _list_files(path / "train", classes, transform)
    return train, _list_files(test_path, classes, transform), classes


def _first(names: list[str]) -> str:
    return ", ".join(names[:3]) or "none"


def _class_names(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}; expected one folder per class in it")
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    if not names:
        raise ValueError(f"{folder} holds no class folders; expected one folder per class in it")
    return names


def _list_files(folder: Path, classes: list[str], transform: Transform) -> ImageFiles:
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = _images_in(folder / name)
        paths += found
        labels += [label] * len(found)
    side = transform.image_size or _SIDE
    return ImageFiles(
        FilePaths(paths),
        np.array(labels, dtype=np.int64),
        side,
        side,
        view=transform.view(),
        colour=transform.colour or "RGB",
    )


def _images_in(class_folder: Path) -> list[Path]:
    found = sorted(path for path in class_folder.rglob("*") if path.suffix.lower() in _SUFFIXES)
    if not found:
        raise ValueError(
            f"class folder {class_folder} holds no images; add some, or remove the class from "
            "both the training and the test folder"
        )
    return found


def _load_if_small(files: ImageFiles, byte_limit: int) -> ImageSet:
    shape = (len(files), files.height, files.width, NUM_CHANNELS[files.colour])
    if np.prod(shape, dtype=np.int64) > byte_limit:
        return files
    images = np.empty(shape, dtype=np.uint8)

    def load(row: int) -> None:
        path = files.paths[row]
        size = files.height, files.width
        images[row] = decode_view(path, str(path), *size, files.view, files.colour)

    with ThreadPoolExecutor() as pool:
        for _ in pool.map(load, range(len(files))):
            pass
    return ImageArrays(images, files.labels, view=files.view, colour=files.colour)


def load_imagenet(path: Path, transform: Transform = _PLAIN) -> Dataset:
    """List ImageNet, or a folder with its layout; images are decoded when they are needed.

    Args:
        path: Folder with ``train/<class>/*`` and ``val/<class>/*``. Labels follow the sorted class
            names, as those of public weights do.
        transform: How images become a network's input; ``weights_transform`` names the settings of
            public weights. By default the shorter side is resized to 256, the centre of 224 x 224
            is cut out, and training sees random resized crops.

    Raises:
        ValueError: a folder is missing or empty, or a size is out of its range.
    """
    given = transform.filled()
    if given.image_size is None and given.resize is None and not given.squash:
        given = replace(given, resize=256)
    train, val, classes = list_image_folder(path, given, held_out=("val",))
    mean, std = given.statistics(MEAN, STD)
    return Dataset(
        name="imagenet",
        train=train,
        test=val,
        num_classes=len(classes),
        mean=mean,
        std=std,
        augmentation=given.augmentation(RandomResizedCrop()),
        class_names=tuple(classes),
    )
