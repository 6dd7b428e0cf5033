"""Types of a data set: images in memory or in files, and how they are augmented and normalised."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]
ByteArray = NDArray[np.uint8]


Interpolation = Literal["bilinear", "bicubic"]
Colour = Literal["RGB", "BGR", "grey"]
"""Order of an image's channels; ``grey`` is a single channel."""

NUM_CHANNELS: dict[Colour, int] = {"RGB": 3, "BGR": 3, "grey": 1}


def _check_interpolation(interpolation: str) -> None:
    if interpolation not in get_args(Interpolation):
        raise ValueError(
            f"interpolation must be one of {get_args(Interpolation)}, got {interpolation!r}"
        )


@dataclass(frozen=True, kw_only=True)
class CentreCrop:
    """The centre of an image whose shorter side was resized first, as in torchvision's presets."""

    resize: int | None = None
    """Length in pixels to which the shorter side is resized, also if the image is smaller. None
    keeps an image that has the network's size already, and resizes any other so that the crop is
    224 / 256 of its tighter side."""
    interpolation: Interpolation = "bilinear"
    """Interpolation that the weights were trained with; random crops use it too."""

    def __post_init__(self) -> None:
        _check_interpolation(self.interpolation)


@dataclass(frozen=True, kw_only=True)
class Squash:
    """The whole image, resized to the network's size; its sides may be stretched differently."""

    interpolation: Interpolation = "bilinear"
    """Interpolation that the weights were trained with; random crops use it too."""

    def __post_init__(self) -> None:
        _check_interpolation(self.interpolation)


View = CentreCrop | Squash
"""The part of an image that a network sees in evaluation."""


@dataclass(frozen=True, eq=False)
class ImageArrays:
    """Images in memory. The arrays may be read-only; this package never writes to them."""

    images: ByteArray
    """Pixels, uint8 ``(N, H, W, C)``."""
    labels: IntArray
    """Class labels, int64 ``(N,)``."""
    view: View = CentreCrop()
    """The part of an image file that the pixels are, for the record."""
    colour: Colour | None = None
    """Order of the channels, for the record; None: RGB, or grey with a single channel."""

    def __post_init__(self) -> None:
        if self.images.ndim != 4 or self.images.dtype != np.uint8:
            raise ValueError(
                f"images must be uint8 of shape (N, H, W, C), got {self.images.dtype} of shape "
                f"{self.images.shape}; scale pixels to 0..255 and put channels last"
            )
        _check_label_array(self.labels, len(self.images))

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, eq=False)
class ImageFiles:
    """Images on disk, decoded when they are needed and resized to one size."""

    paths: Sequence[Any]
    """The image files; or encoded images or images of Pillow, which may be read when they are asked
    for."""
    labels: IntArray
    """Class labels, int64 ``(N,)``."""
    height: int
    """Height of the decoded images in pixels."""
    width: int
    """Width of the decoded images in pixels."""
    view: View = CentreCrop()
    """The part of an image that is decoded for evaluation."""
    colour: Colour = "RGB"
    """Order of the channels."""

    def __post_init__(self) -> None:
        _check_label_array(self.labels, len(self.paths))
        larger = max(self.height, self.width)
        resize = self.view.resize if isinstance(self.view, CentreCrop) else None
        if resize is not None and resize < larger:
            raise ValueError(
                f"the shorter side must be resized to at least the {larger} pixels of the centre "
                f"crop, got {resize}"
            )

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, eq=False)
class PreparedInputs:
    """Inputs that the caller's own code has prepared; they are neither normalised nor augmented."""

    items: Any
    """Inputs in memory, float32 ``(N, ...)``, or a map-style data set: ``items[row]`` is an input,
    a pair (input, label) or a mapping, with all augmentation that training should see."""
    labels: IntArray
    """Class labels, int64 ``(N,)``."""
    shape: tuple[int, ...]
    """Shape of an input, without a batch axis."""

    def __post_init__(self) -> None:
        _check_label_array(self.labels, len(self.items))

    def __len__(self) -> int:
        return len(self.labels)


ImageSet = ImageArrays | ImageFiles | PreparedInputs


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Random crops and flips of training images."""

    padding: int
    """Zero pixels added on each side before an image is cropped to its size again; 0 does not
    crop."""
    flip: bool
    """Whether half of the images are mirrored left to right."""

    def __str__(self) -> str:
        crop = f"crops after padding with {self.padding}" if self.padding else "no crops"
        return f"{crop}, {'mirrored or not' if self.flip else 'never mirrored'}"


@dataclass(frozen=True, kw_only=True)
class RandomResizedCrop:
    """A random part of a training image, resized to the network's input size; for image files only.

    This is torchvision's transform of the same name, with which networks for ImageNet are trained
    (Szegedy et al. 2014, 1409.4842).
    """

    min_area: float = 0.08
    """Smallest share of the image's area, in (0, 1]."""
    max_stretch: float = 4 / 3
    """Largest ratio of the part's sides, >= 1."""
    flip: bool = True
    """Whether half of the images are mirrored left to right."""

    def __str__(self) -> str:
        mirrored = "mirrored or not" if self.flip else "never mirrored"
        return f"random resized crops of {self.min_area:g} to 1 of the area, {mirrored}"

    def __post_init__(self) -> None:
        if not (0 < self.min_area <= 1 <= self.max_stretch):
            raise ValueError(
                "min_area must be in (0, 1] and max_stretch at least 1, "
                f"got {self.min_area} and {self.max_stretch}"
            )


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A training and a test set, and how their images become a network's input.

    Training images are augmented; then pixels are scaled to [0, 1] and normalised per channel:
    ``(pixel - mean) / std``.
    """

    name: str
    """Name of the data set, for messages and records."""
    train: ImageSet
    """The training set."""
    test: ImageSet
    """The test set."""
    num_classes: int
    """Number of classes; labels are in ``0 .. num_classes - 1``."""
    mean: tuple[float, ...]
    """Mean of each channel, of pixels in [0, 1]."""
    std: tuple[float, ...]
    """Standard deviation of each channel, > 0."""
    augmentation: Augmentation | RandomResizedCrop
    """Random changes of training images."""
    class_names: tuple[str, ...] | None = None
    """Name of each class, in the order of the labels; None where they have no names."""

    def __post_init__(self) -> None:
        if self.class_names is not None and len(self.class_names) != self.num_classes:
            raise ValueError(
                f"{self.name} has {self.num_classes} classes, got {len(self.class_names)} class "
                "names; give one for each label, in the order of the labels"
            )
        for part in ("train", "test"):
            check_labels(getattr(self, part).labels, self.num_classes, f"{self.name}'s {part} set")
        is_prepared = isinstance(self.train, PreparedInputs)
        if not is_prepared and (len(self.mean) != len(self.std) or min(self.std) <= 0):
            raise ValueError(
                f"mean and std of {self.name} need one value per channel, std above 0, "
                f"got {self.mean} and {self.std}"
            )
        in_files = isinstance(self.train, ImageFiles)
        if isinstance(self.augmentation, RandomResizedCrop) and not in_files:
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

    Args:
        labels: Class labels, int64 ``(N,)``.
        num_classes: Number of classes.
        source: Where the labels come from, for the error message.

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
