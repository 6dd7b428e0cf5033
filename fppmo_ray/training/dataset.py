"""What a data set is made of: images as arrays or as files, and how they are prepared."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]
ByteArray = NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class ImageArrays:
    """Images held in memory. The arrays may be read-only; nothing here writes to them."""

    images: ByteArray
    """``(N, H, W, C)``."""
    labels: IntArray
    """``(N,)``."""

    def __post_init__(self) -> None:
        if self.images.ndim != 4 or self.images.dtype != np.uint8:
            raise ValueError(
                f"images must be uint8 of shape (N, H, W, C), got {self.images.dtype} of shape "
                f"{self.images.shape}; scale pixels to 0..255 and put channels last"
            )
        _check_label_array(self.labels, len(self.images))

    def __len__(self) -> int:
        return len(self.labels)


Interpolation = Literal["bilinear", "bicubic"]


@dataclass(frozen=True, kw_only=True)
class CentreCrop:
    """The middle of an image after its shorter side was brought to some length: torchvision's."""

    resize: int
    """Length in pixels that the shorter side is brought to, for small images too."""
    interpolation: Interpolation = "bilinear"
    """The one that the weights were trained with; also of random crops."""

    def __post_init__(self) -> None:
        if self.interpolation not in get_args(Interpolation):
            raise ValueError(
                f"interpolation must be one of {get_args(Interpolation)}, "
                f"got {self.interpolation!r}"
            )


@dataclass(frozen=True, eq=False)
class ImageFiles:
    """Images left on disk, decoded when they are needed and brought to one size."""

    paths: tuple[Path, ...]
    labels: IntArray
    """``(N,)``."""
    height: int
    width: int
    centre_crop: CentreCrop | None = None
    """None: an image of this size is taken as it is, of any other the middle; see
    ``decode_to_size``."""

    def __post_init__(self) -> None:
        _check_label_array(self.labels, len(self.paths))
        larger = max(self.height, self.width)
        if self.centre_crop is not None and self.centre_crop.resize < larger:
            raise ValueError(
                f"the shorter side must be resized to at least the {larger} pixels of the centre "
                f"crop, got {self.centre_crop.resize}"
            )

    def __len__(self) -> int:
        return len(self.labels)


ImageSet = ImageArrays | ImageFiles


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Random crop and flip of training images."""

    padding: int
    """Zero pixels added on each side before an image is cropped back to its size; 0 = no crop."""
    flip: bool
    """Whether half of the images are mirrored left to right."""


@dataclass(frozen=True, kw_only=True)
class RandomResizedCrop:
    """A random part of a training image, brought to the network's size; of files only.

    As torchvision's transform of that name, with which ImageNet's networks are trained (Szegedy et
    al. 2014, 1409.4842).
    """

    min_area: float = 0.08
    """Smallest share of the image's area, in (0, 1]."""
    max_stretch: float = 4 / 3
    """Largest ratio of the part's sides, at least 1."""
    flip: bool = True
    """Whether half of the images are mirrored left to right."""

    def __post_init__(self) -> None:
        if not (0 < self.min_area <= 1 <= self.max_stretch):
            raise ValueError(
                "min_area must be in (0, 1] and max_stretch at least 1, "
                f"got {self.min_area} and {self.max_stretch}"
            )


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A training and a test set, and how their images become a network's input.

    Pixels are scaled to [0, 1], then ``(pixel - mean) / std`` per channel; training images are
    augmented before that.
    """

    name: str
    train: ImageSet
    test: ImageSet
    num_classes: int
    mean: tuple[float, ...]
    """Per channel."""
    std: tuple[float, ...]
    """Per channel."""
    augmentation: Augmentation | RandomResizedCrop

    def __post_init__(self) -> None:
        for part in ("train", "test"):
            check_labels(getattr(self, part).labels, self.num_classes, f"{self.name}'s {part} set")
        if len(self.mean) != len(self.std) or min(self.std) <= 0:
            raise ValueError(
                f"mean and std of {self.name} need one value per channel, std above 0, "
                f"got {self.mean} and {self.std}"
            )
        if isinstance(self.augmentation, RandomResizedCrop) and isinstance(self.train, ImageArrays):
            raise ValueError(
                f"random resized crops need image files, and {self.name} holds its training images "
                "in memory, at one size; take an Augmentation instead"
            )


def _check_label_array(labels: IntArray, num_images: int) -> None:
    if labels.shape != (num_images,) or labels.dtype != np.int64:
        raise ValueError(
            f"labels of {num_images} images must be int64 of shape ({num_images},), "
            f"got {labels.dtype} of shape {labels.shape}"
        )


def check_labels(labels: IntArray, num_classes: int, source: Path | str) -> None:
    """Refuse labels outside ``0 .. num_classes - 1``.

    Raises:
        ValueError: names the first such label, its row and the source.
    """
    outside = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(outside):
        raise ValueError(
            f"label {labels[outside[0]]} at row {outside[0]} of {source} is outside the classes "
            f"0 to {num_classes - 1} ({len(outside)} such labels); check that the data set and "
            "its name belong together"
        )
