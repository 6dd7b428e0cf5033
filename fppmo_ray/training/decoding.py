"""Encoded images to pixels."""

from __future__ import annotations

import io
import math
import random
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fppmo_ray.training.image_sets import (
    ByteArray,
    CentreCrop,
    Interpolation,
    RandomResizedCrop,
)

if TYPE_CHECKING:
    from PIL.Image import Image

_RESIZE_TO_CROP = 256 / 224  # the shorter side before the centre crop: the usual ImageNet protocol


_ATTEMPTS = 10  # at a part that lies within the image


def decode(source: bytes | Path, name: str) -> ByteArray:
    """An encoded image as RGB pixels ``(H, W, 3)``.

    Raises:
        ValueError: it cannot be decoded; says ``name``.
    """
    return np.array(_open(source, name))


def decode_to_size(source: bytes | Path, name: str, height: int, width: int) -> ByteArray:
    """An encoded image as RGB pixels ``(height, width, 3)``.

    An image of that very size is taken as it is. Any other is resized so that the crop is the
    middle 224 / 256 of its tighter side, and cropped in the centre.

    Raises:
        ValueError: it cannot be decoded; says ``name``.
    """
    image = _open(source, name)
    if (image.height, image.width) == (height, width):
        return np.array(image)
    scale = _RESIZE_TO_CROP * max(height / image.height, width / image.width)
    scaled = round(image.width * scale), round(image.height * scale)
    left, top = (scaled[0] - width) // 2, (scaled[1] - height) // 2
    resized = _resized(image, *scaled, "bilinear")
    return np.array(resized.crop((left, top, left + width, top + height)))


def decode_centre(
    source: bytes | Path, name: str, height: int, width: int, crop: CentreCrop
) -> ByteArray:
    """The middle of an encoded image, RGB ``(height, width, 3)``, to the pixel as in torchvision.

    Args:
        source: The encoded image.
        name: For messages.
        height: At most ``crop.resize``.
        width: The same.
        crop: How long the shorter side is before the cut.

    Raises:
        ValueError: it cannot be decoded; says ``name``.
    """
    image = _open(source, name)
    shorter = min(image.width, image.height)
    scaled = [crop.resize * side // shorter for side in (image.width, image.height)]
    left, top = round((scaled[0] - width) / 2), round((scaled[1] - height) / 2)
    resized = _resized(image, scaled[0], scaled[1], crop.interpolation)
    return np.array(resized.crop((left, top, left + width, top + height)))


def decode_random_part(
    source: bytes | Path,
    name: str,
    height: int,
    width: int,
    crop: RandomResizedCrop,
    *,
    seed: int,
    interpolation: Interpolation = "bilinear",
) -> ByteArray:
    """A random part of an encoded image, brought to RGB ``(height, width, 3)``.

    Args:
        source: The encoded image.
        name: For messages.
        height: Of the result.
        width: Of the result.
        crop: What parts there may be.
        seed: Decides on the part and on mirroring.
        interpolation: How pixels are resized.

    Raises:
        ValueError: it cannot be decoded; says ``name``.
    """
    image = _open(source, name)
    rng = random.Random(seed)
    part = image.crop(random_box(image.width, image.height, crop, rng))
    pixels = np.array(_resized(part, width, height, interpolation))
    return pixels[:, ::-1] if crop.flip and rng.random() < 0.5 else pixels


def random_box(
    width: int, height: int, crop: RandomResizedCrop, rng: random.Random
) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of a random part of an image, as torchvision draws them.

    Area and the logarithm of the ratio of sides are uniform. Where ten parts in a row do not fit
    into the image, it is the largest part in the middle that is not too long.
    """
    for _ in range(_ATTEMPTS):
        area = width * height * rng.uniform(crop.min_area, 1)
        ratio = crop.max_stretch ** rng.uniform(-1, 1)
        part_width, part_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < part_width <= width and 0 < part_height <= height:
            left = rng.randrange(width - part_width + 1)
            top = rng.randrange(height - part_height + 1)
            return left, top, left + part_width, top + part_height
    part_width = min(width, round(height * crop.max_stretch))
    part_height = min(height, round(width * crop.max_stretch))
    left, top = (width - part_width) // 2, (height - part_height) // 2
    return left, top, left + part_width, top + part_height


def _open(source: bytes | Path, name: str) -> Image:
    """The whole image in memory, as RGB."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            image.load()
            return image if image.mode == "RGB" else image.convert("RGB")
    # Pillow's decoders raise SyntaxError on some broken files and OSError on the others.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot decode {name}: {error}; replace or remove the image") from error


def _resized(image: Image, width: int, height: int, interpolation: Interpolation) -> Image:
    from PIL.Image import Resampling

    how = {"bilinear": Resampling.BILINEAR, "bicubic": Resampling.BICUBIC}[interpolation]
    return image.resize((width, height), how)
