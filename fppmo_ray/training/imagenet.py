"""Folders of images, prepared as torchvision's networks for ImageNet were trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from fppmo_ray.training.image_folder import list_image_folder
from fppmo_ray.training.image_sets import (
    CentreCrop,
    Dataset,
    Interpolation,
    RandomResizedCrop,
)

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
"""Of ImageNet's training images, per channel."""


def load_imagenet(
    path: Path, *, crop: int = 224, resize: int = 256, interpolation: Interpolation = "bilinear"
) -> Dataset:
    """ImageNet, or any folder like it; its files are listed, and decoded when they are needed.

    Networks see the middle of an image after its shorter side was resized; they train on random
    parts of it, mirrored or not. torchvision's documentation of a set of weights tells the sizes.

    Args:
        path: Holds ``train/<class>/*`` and ``val/<class>/*``. Labels follow the sorted names of
            the classes, as those of public weights do.
        crop: Side in pixels of what a network sees.
        resize: Length in pixels that the shorter side is brought to, at least ``crop``.
        interpolation: How pixels are resized.

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
