"""Encoded images to pixels."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from fppmo_ray.training.image_sets import ByteArray

_RESIZE_TO_CROP = 256 / 224  # the shorter side before the centre crop: the usual ImageNet protocol


def decode(source: bytes | Path, name: str) -> ByteArray:
    """An encoded image as RGB pixels ``(H, W, 3)``.

    Raises:
        ValueError: it cannot be decoded; says ``name``.
    """
    return _pixels(source, name, None)


def decode_to_size(source: bytes | Path, name: str, height: int, width: int) -> ByteArray:
    """An encoded image as RGB pixels ``(height, width, 3)``.

    An image of that very size is taken as it is. Any other is resized so that the crop is the
    middle 224 / 256 of its tighter side, and cropped in the centre.

    Raises:
        ValueError: it cannot be decoded; says ``name``.
    """
    return _pixels(source, name, (height, width))


def _pixels(source: bytes | Path, name: str, size: tuple[int, int] | None) -> ByteArray:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            image.load()
            rgb = image if image.mode == "RGB" else image.convert("RGB")
    # Pillow's decoders raise SyntaxError on some broken files and OSError on the others.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot decode {name}: {error}; replace or remove the image") from error
    if size is None or (rgb.height, rgb.width) == size:
        return np.array(rgb)
    height, width = size
    scale = _RESIZE_TO_CROP * max(height / rgb.height, width / rgb.width)
    scaled_width, scaled_height = round(rgb.width * scale), round(rgb.height * scale)
    left, top = (scaled_width - width) // 2, (scaled_height - height) // 2
    resized = rgb.resize((scaled_width, scaled_height), Image.Resampling.BILINEAR)
    return np.array(resized.crop((left, top, left + width, top + height)))
