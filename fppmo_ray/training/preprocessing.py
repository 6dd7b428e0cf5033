"""How image files become a network's input: what the caller may choose, and the record of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, get_args

import torch
from torch import Tensor

from fppmo_ray.training.dataset import (
    NUM_CHANNELS,
    Augmentation,
    CentreCrop,
    Colour,
    Dataset,
    ImageArrays,
    Interpolation,
    PreparedInputs,
    RandomResizedCrop,
    Squash,
    View,
)
from fppmo_ray.training.decoding import ImageSource, decode_view
from fppmo_ray.training.images import normalise
from fppmo_ray.training.weight_transforms import settings_of_weights

MEAN = (0.485, 0.456, 0.406)
"""Mean of ImageNet's training images, per channel."""
STD = (0.229, 0.224, 0.225)
"""Standard deviation of ImageNet's training images, per channel."""


@dataclass(frozen=True, kw_only=True)
class Transform:
    """The way from an image to a network's input, which must be that of the network's training.

    A field that is None is decided by ``weights_transform``, or else by the data set.
    """

    weights_transform: str | None = None
    """Weights whose published settings decide what is not given here:
    ``torchvision:ResNet50_Weights.IMAGENET1K_V2`` or ``timm:resnet50.a1_in1k``. Nothing is
    downloaded."""
    mean: tuple[float, ...] | None = None
    """Mean of each channel, of pixels in [0, 1]: 0.5 0.5 0.5."""
    std: tuple[float, ...] | None = None
    """Standard deviation of each channel, of pixels in [0, 1], > 0."""
    image_size: int | None = None
    """Side in pixels of the square that a network sees."""
    resize: int | None = None
    """Length in pixels to which the shorter side is resized before the centre is cut out. None: an
    image that has the network's size is kept, any other is resized to 8/7 of that size."""
    squash: bool = False
    """Whether the whole image is resized to the square instead of cut, as by torchvision's
    ``Resize((224, 224))``."""
    interpolation: Interpolation | None = None
    """``bilinear`` or ``bicubic``."""
    colour: Colour | None = None
    """Order of the channels: ``RGB``, ``BGR`` (OpenCV), or ``grey`` for networks with one channel.
    """
    padding: int | None = None
    """Augmentation: zero pixels on each side before a training image is cropped to its size again;
    0 does not crop."""
    flip: bool | None = None
    """Augmentation: whether half of the training images are mirrored left to right."""
    min_area: float | None = None
    """Augmentation: smallest share of a training image's area in random resized crops, in (0, 1],
    for images that stay in files; torchvision trains with 0.08. 0 crops by ``padding`` instead."""

    def __post_init__(self) -> None:
        if (self.mean is None) != (self.std is None):
            raise ValueError(
                f"mean and std belong together, got {self.mean} and {self.std}; give both"
            )
        if self.image_size is not None and self.image_size < 1:
            raise ValueError(f"image_size must be at least 1 pixel, got {self.image_size}")
        if self.colour is not None and self.colour not in NUM_CHANNELS:
            raise ValueError(f"colour must be one of {get_args(Colour)}, got {self.colour!r}")
        if self.squash and self.resize is not None:
            raise ValueError(
                f"squash resizes the whole image and resize = {self.resize} cuts its centre; give "
                "one of them"
            )
        if self.padding is not None and self.padding < 0:
            raise ValueError(f"padding must be at least 0 pixels, got {self.padding}")
        if self.padding and self.min_area:
            raise ValueError(
                f"padding = {self.padding} and min_area = {self.min_area} are two ways to crop; "
                "give one of them"
            )

    def filled(self) -> Transform:
        """Return the transform with the settings of ``weights_transform`` in place of None.

        Raises:
            ValueError: there are no such weights, or they have no settings.
        """
        if self.weights_transform is None:
            return self
        published = transform_of(self.weights_transform)
        given = {
            field.name: value
            for field in fields(self)
            if field.name != "weights_transform"
            and (value := getattr(self, field.name)) is not None
        }
        if self.squash:
            published = replace(published, resize=None)
        else:
            given["squash"] = published.squash and self.resize is None
        return replace(published, **given)

    def view(self) -> View:
        """Return the part of an image that networks are evaluated on."""
        how: Any = {"interpolation": self.interpolation or "bilinear"}
        return Squash(**how) if self.squash else CentreCrop(resize=self.resize, **how)

    def augmentation(
        self, default: Augmentation | RandomResizedCrop
    ) -> Augmentation | RandomResizedCrop:
        """Return the random changes of training images.

        Args:
            default: Those of the data set, for what is not given.
        """
        flip = default.flip if self.flip is None else self.flip
        by_area = self.min_area is None and isinstance(default, RandomResizedCrop)
        if self.min_area or (by_area and self.padding is None):
            area = default if isinstance(default, RandomResizedCrop) else RandomResizedCrop()
            return replace(area, min_area=self.min_area or area.min_area, flip=flip)
        padding = default.padding if isinstance(default, Augmentation) else 0
        return Augmentation(padding=padding if self.padding is None else self.padding, flip=flip)

    def statistics(
        self, mean: tuple[float, ...], std: tuple[float, ...]
    ) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return mean and standard deviation of the channels.

        Args:
            mean: The data set's mean, where none is given.
            std: The data set's standard deviation.

        Raises:
            ValueError: their number is not that of the channels.
        """
        mean, std = self.mean or mean, self.std or std
        channels = NUM_CHANNELS[self.colour or "RGB"]
        if self.mean is None and len(mean) != channels:
            raise ValueError(
                f"images of colour {self.colour} have {channels} channel; give mean and std of it"
            )
        return mean, std


def transform_of(weights: object) -> Transform:
    """Return the evaluation transform of pretrained weights, or of a training loop of your own.

    Args:
        weights: Weights of torchvision (``ResNet50_Weights.DEFAULT``) or the transform of such
            weights, a network or ``pretrained_cfg`` of timm, or the name of either:
            ``torchvision:ResNet50_Weights.IMAGENET1K_V2``, ``timm:resnet50.a1_in1k``; or
            torchvision's ``Compose`` of ``Resize``, ``CenterCrop``, ``ToTensor`` and ``Normalize``,
            with which networks are evaluated.

    Raises:
        ValueError: there are no such weights, they have no settings, or a ``Compose`` does anything
            else.
    """
    return Transform(**settings_of_weights(weights))


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """The whole way from an image to a network's input."""

    height: int
    """Height of the network's images in pixels."""
    width: int
    """Width of the network's images in pixels."""
    colour: Colour
    """Order of the channels."""
    view: View
    """The part of an image that the network sees."""
    mean: tuple[float, ...]
    """Mean of each channel, of pixels in [0, 1]."""
    std: tuple[float, ...]
    """Standard deviation of each channel."""

    def __call__(self, image: ImageSource) -> Tensor:
        """Return the network's input of an image, float32 ``(1, C, H, W)``.

        Args:
            image: An image file, its encoded bytes, or an image of Pillow.

        Raises:
            ValueError: the image cannot be decoded.
        """
        name = "the image" if isinstance(image, bytes) else str(image)
        pixels = decode_view(image, name, self.height, self.width, self.view, self.colour)
        mean, std = torch.tensor([self.mean, self.std])
        batch = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None]
        return normalise(batch, mean.reshape(1, -1, 1, 1), std.reshape(1, -1, 1, 1))

    def __str__(self) -> str:
        if isinstance(self.view, Squash):
            cut = f"squashed to {self.height} x {self.width}"
        else:
            resize = self.view.resize
            before = "" if resize is None else f"shorter side {resize}, "
            cut = f"{before}centre {self.height} x {self.width}"
        numbers = (" ".join(f"{number:.4g}" for number in part) for part in (self.mean, self.std))
        return "{} {} {}, mean {}, std {}".format(
            self.colour, cut, self.view.interpolation, *numbers
        )

    def to_json(self) -> dict[str, Any]:
        """Return the record as plain data, as exported files carry it."""
        return {
            "colour": self.colour,
            "height": self.height,
            "width": self.width,
            "crop": "squash" if isinstance(self.view, Squash) else "centre",
            "resize": None if isinstance(self.view, Squash) else self.view.resize,
            "interpolation": self.view.interpolation,
            "scale": 1 / 255,
            "mean": list(self.mean),
            "std": list(self.std),
        }


def preprocessing_of(dataset: Dataset) -> Preprocessing | None:
    """Return how a data set's images become a network's input; None where the caller does it."""
    images = dataset.train
    if isinstance(images, PreparedInputs):
        return None
    if isinstance(images, ImageArrays):
        height, width, channels = images.images.shape[1:]
        colour = images.colour or ("grey" if channels == 1 else "RGB")
    else:
        height, width, colour = images.height, images.width, images.colour
    return Preprocessing(
        height=height,
        width=width,
        colour=colour,
        view=images.view,
        mean=dataset.mean,
        std=dataset.std,
    )


@dataclass(frozen=True, kw_only=True)
class Interface:
    """What a network expects and answers; it is handed out beside the weights."""

    preprocessing: Preprocessing | None = None
    """The way from an image to an input; None where only the caller's own code knows it."""
    class_names: tuple[str, ...] | None = None
    """Name of each class, in the order of the logits; None where they have no names."""

    def to_json(self) -> dict[str, Any]:
        """Return what is known as plain data, in one flat object."""
        data = {} if self.preprocessing is None else self.preprocessing.to_json()
        return data if self.class_names is None else {**data, "class_names": [*self.class_names]}


def interface_of(
    source: Dataset | Transform, class_names: Sequence[str] | None = None
) -> Interface:
    """Return what a network expects and answers, for ``export_network``.

    Args:
        source: The data set that the network is for, as of ``load_dataset``; or the transform of a
            training loop of your own, with mean, std and image_size: see ``transform_of``.
        class_names: Names of the classes in the order of the network's outputs; None: those of the
            data set.

    Raises:
        ValueError: the transform lacks the mean, the std or the size.
    """
    if not isinstance(source, Transform):
        names = source.class_names if class_names is None else tuple(class_names)
        return Interface(preprocessing=preprocessing_of(source), class_names=names)
    given = source.filled()
    if given.mean is None or given.std is None or given.image_size is None:
        raise ValueError(
            "a transform says how images become an input by mean, std and image_size, got "
            f"{given.mean}, {given.std} and {given.image_size}; give all three"
        )
    mean, std = given.statistics(given.mean, given.std)
    preprocessing = Preprocessing(
        height=given.image_size,
        width=given.image_size,
        colour=given.colour or "RGB",
        view=given.view(),
        mean=mean,
        std=std,
    )
    return Interface(
        preprocessing=preprocessing,
        class_names=None if class_names is None else tuple(class_names),
    )


def interface_from_json(data: Mapping[str, Any]) -> Interface:
    """Return the record that ``Interface.to_json`` described; other entries are ignored.

    Raises:
        ValueError: an entry is missing or does not fit.
    """
    names = data.get("class_names")
    class_names = None if names is None else tuple(map(str, names))
    if "mean" not in data:
        return Interface(class_names=class_names)
    try:
        how: Any = {"interpolation": data["interpolation"]}
        squash = data["crop"] == "squash"
        preprocessing = Preprocessing(
            height=int(data["height"]),
            width=int(data["width"]),
            colour=data["colour"],
            view=Squash(**how) if squash else CentreCrop(resize=data["resize"], **how),
            mean=tuple(data["mean"]),
            std=tuple(data["std"]),
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"the record of a network's input does not fit: {error!r}") from error
    return Interface(preprocessing=preprocessing, class_names=class_names)
