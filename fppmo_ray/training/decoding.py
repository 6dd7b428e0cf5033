"""Decode image files: one image at a time, or batches, with the next batch decoded ahead."""

from __future__ import annotations

import io
import math
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from fppmo_ray.training.dataset import (
    NUM_CHANNELS,
    ByteArray,
    Colour,
    ImageFiles,
    Interpolation,
    RandomResizedCrop,
    Squash,
    View,
)
from fppmo_ray.training.prepared import KeptArrays

if TYPE_CHECKING:
    from PIL.Image import Image

ImageSource: TypeAlias = "bytes | Path | Image"
"""An encoded image, its file, or an image that Pillow has opened."""

_Batch = tuple[Tensor, Iterator[None]]
"""Pixels uint8 (n, H, W, C) being filled, and an iterator that ends when all are filled."""

_RESIZE_TO_CROP = 256 / 224  # shorter side over the centre crop: the usual ImageNet protocol
_INTEGERS_ARE_16_BIT = ("PNG", "PPM")  # whose deepest pixels have 16 bits
_FORMATS = "BMP", "JPEG", "PNG", "PPM", "TIFF", "WEBP"  # others run programs (EPS: Ghostscript)
_MAX_PIXELS = 2**26  # of an image, as it is or resized: 200 MB in RGB
_ATTEMPTS = 10  # draws of a part before the centre is taken


def decode(source: ImageSource, name: str, colour: Colour = "RGB") -> ByteArray:
    """Decode an image to pixels ``(H, W, C)``.

    Args:
        source: Encoded image, its file, or an image of Pillow.
        name: Name of the image in the error message.
        colour: Order of the channels.

    Raises:
        ValueError: the image cannot be decoded.
    """
    return _pixels(_open(source, name, colour), colour)


def decode_view(
    source: ImageSource,
    name: str,
    height: int,
    width: int,
    view: View,
    colour: Colour = "RGB",
) -> ByteArray:
    """Decode the part of an image that networks are evaluated on, ``(height, width, C)``.

    With a ``resize``, a centre crop is pixel-equal to torchvision's.

    Args:
        source: Encoded image, its file, or an image of Pillow.
        name: Name of the image in the error message.
        height: Height of the result in pixels.
        width: Width of the result in pixels.
        view: The part, and the interpolation.
        colour: Order of the channels.

    Raises:
        ValueError: the image cannot be decoded.
    """
    image = _open(source, name, colour)
    if isinstance(view, Squash):
        return _pixels(_resized(image, name, width, height, view.interpolation), colour)
    if view.resize is not None:
        shorter = min(image.width, image.height)
        scaled = [view.resize * side // shorter for side in (image.width, image.height)]
        left, top = round((scaled[0] - width) / 2), round((scaled[1] - height) / 2)
    elif (image.height, image.width) == (height, width):
        return _pixels(image, colour)
    else:
        scale = _RESIZE_TO_CROP * max(height / image.height, width / image.width)
        scaled = [round(image.width * scale), round(image.height * scale)]
        left, top = (scaled[0] - width) // 2, (scaled[1] - height) // 2
    resized = _resized(image, name, scaled[0], scaled[1], view.interpolation)
    return _pixels(resized.crop((left, top, left + width, top + height)), colour)


def decode_random_part(
    source: ImageSource,
    name: str,
    height: int,
    width: int,
    crop: RandomResizedCrop,
    *,
    seed: int,
    interpolation: Interpolation = "bilinear",
    colour: Colour = "RGB",
) -> ByteArray:
    """Decode a random part of an image, resized to ``(height, width, C)``.

    Args:
        source: Encoded image, its file, or an image of Pillow.
        name: Name of the image in the error message.
        height: Height of the result in pixels.
        width: Width of the result in pixels.
        crop: Range of the parts.
        seed: Random seed that decides on the part and on mirroring.
        interpolation: Interpolation of the resizing.
        colour: Order of the channels.

    Raises:
        ValueError: the image cannot be decoded.
    """
    image = _open(source, name, colour)
    rng = random.Random(seed)
    part = image.crop(random_box(image.width, image.height, crop, rng))
    pixels = _pixels(_resized(part, name, width, height, interpolation), colour)
    return pixels[:, ::-1] if crop.flip and rng.random() < 0.5 else pixels


def random_box(
    width: int, height: int, crop: RandomResizedCrop, rng: random.Random
) -> tuple[int, int, int, int]:
    """Draw a part of an image as torchvision does: left, top, right and bottom in pixels.

    Area and the logarithm of the side ratio are uniform. If ten parts in a row do not fit into the
    image, the result is the largest centred part whose sides keep to ``max_stretch``.

    Args:
        width: Width of the image in pixels.
        height: Height of the image in pixels.
        crop: Range of the parts.
        rng: Source of randomness.
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


def _open(source: ImageSource, name: str, colour: Colour) -> Image:
    """Return the whole image in memory, of mode RGB or L."""
    from PIL import Image

    mode = "L" if colour == "grey" else "RGB"
    try:
        if isinstance(source, Image.Image):  # a data set has opened it, but not decoded it yet
            _require_size(source)
            return _in_8_bits(source).convert(mode)
        file = io.BytesIO(source) if isinstance(source, bytes) else source
        with Image.open(file, formats=_FORMATS) as image:
            _require_size(image)
            image.load()
            return _in_8_bits(image).convert(mode)
    # Pillow's decoders raise SyntaxError on some broken files and OSError on the others.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot decode {name}: {error}; replace or remove the image") from error


def _require_size(image: Image) -> None:
    """Refuse an image that would take all memory; the size is known before anything is decoded."""
    if image.width * image.height > _MAX_PIXELS:
        raise ValueError(
            f"it has {image.width} x {image.height} pixels, expected at most {_MAX_PIXELS}"
        )


def _in_8_bits(image: Image) -> Image:
    """Return an image whose pixels are bytes; Pillow's conversion clips deeper pixels to white.

    Raises:
        ValueError: the pixels are floats or 32-bit integers, whose range the file does not tell.
    """
    from PIL import Image

    is_16_bit = image.mode.startswith("I;16") or (
        image.mode == "I" and image.format in _INTEGERS_ARE_16_BIT
    )
    if is_16_bit:
        # 65535 / 257 = 255, so white stays white.
        return Image.fromarray(np.round(np.asarray(image) / 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        kind = "32-bit integers" if image.mode == "I" else "floats"
        raise ValueError(
            f"its pixels are {kind}, and which of them is white is unknown; scale them to 8 or 16 "
            "bits"
        )
    return image


def _pixels(image: Image, colour: Colour) -> ByteArray:
    """Return the pixels ``(H, W, C)`` of an image of mode RGB or L."""
    pixels: ByteArray = np.array(image)
    if colour == "grey":
        return pixels[:, :, None]
    return pixels[:, :, ::-1] if colour == "BGR" else pixels


def _resized(
    image: Image, name: str, width: int, height: int, interpolation: Interpolation
) -> Image:
    from PIL.Image import Resampling

    if width * height > _MAX_PIXELS:
        raise ValueError(
            f"cannot resize {name}: its {image.width} x {image.height} pixels would become "
            f"{width} x {height}, expected at most {_MAX_PIXELS}; replace or remove the image"
        )
    how = {"bilinear": Resampling.BILINEAR, "bicubic": Resampling.BICUBIC}[interpolation]
    return image.resize((width, height), how)


@dataclass(frozen=True)
class StreamedPixels:
    """Batches of image files; threads decode the next batch while the current one is used."""

    files: ImageFiles
    """The images that are streamed."""
    device: torch.device
    """Device on which the batches are needed."""
    threads: int | None = None
    """Number of decoding threads; None takes as many as torch has."""
    kept: KeptArrays | None = None
    """Images that ``stream`` has decoded; None: it decodes each of them again."""

    @property
    def num_channels(self) -> int:
        """Number of channels of an image."""
        return NUM_CHANNELS[self.files.colour]

    def stream(self, order: Tensor, batch_size: int) -> Iterator[Tensor]:
        """Yield batches of the decoded images; see ``PixelSource.stream``.

        Args:
            order: Positions of the images, int64 on the CPU.
            batch_size: Images per batch; the last batch may be smaller.
        """
        kept = self.kept
        if kept is None:
            return self._stream(order, batch_size, self._decode)
        return self._stream(order, batch_size, lambda position: kept.get(position, self._decode))

    def stream_random_parts(
        self, order: Tensor, seeds: Tensor, batch_size: int, crop: RandomResizedCrop
    ) -> Iterator[Tensor]:
        """Yield batches of random parts of the images; see ``stream``.

        Args:
            order: Positions of the images, int64 on the CPU.
            seeds: Random seed of each image's part, int64 on the CPU.
            batch_size: Images per batch; the last batch may be smaller.
            crop: Range of the parts.
        """

        def decode(job: tuple[int, int]) -> ByteArray:
            return self._decode_part(job[0], crop, seed=job[1])

        return self._stream(torch.stack([order, seeds], dim=1), batch_size, decode)

    def _stream(
        self, jobs: Tensor, batch_size: int, decode: Callable[[Any], ByteArray]
    ) -> Iterator[Tensor]:
        """Decode one image per row of ``jobs``; start a batch before yielding the one before."""
        with ThreadPoolExecutor(self.threads or torch.get_num_threads()) as pool:
            try:
                ahead: _Batch | None = None
                for part in torch.split(jobs, batch_size):
                    current, ahead = ahead, self._begin(pool, part.tolist(), decode)
                    if current is not None:
                        yield self._finish(current)
                if ahead is not None:
                    yield self._finish(ahead)
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _begin(
        self, pool: ThreadPoolExecutor, jobs: list[Any], decode: Callable[[Any], ByteArray]
    ) -> _Batch:
        shape = (len(jobs), self.files.height, self.files.width, self.num_channels)
        # Pinned memory can be copied to a GPU while the GPU computes.
        batch = torch.empty(shape, dtype=torch.uint8, pin_memory=self.device.type != "cpu")
        pixels = batch.numpy()

        def fill(place: int) -> None:
            pixels[place] = decode(jobs[place])

        return batch, pool.map(fill, range(len(jobs)))  # map() starts all jobs at once

    def _finish(self, batch: _Batch) -> Tensor:
        pixels, filled = batch
        for _ in filled:
            pass
        return pixels.to(self.device, non_blocking=True).permute(0, 3, 1, 2).contiguous()

    def _decode(self, position: int) -> ByteArray:
        files, path = self.files, self.files.paths[position]
        return decode_view(path, str(path), files.height, files.width, files.view, files.colour)

    def _decode_part(self, position: int, crop: RandomResizedCrop, seed: int) -> ByteArray:
        files, path = self.files, self.files.paths[position]
        return decode_random_part(
            *(path, str(path), files.height, files.width, crop),
            seed=seed,
            interpolation=files.view.interpolation,
            colour=files.colour,
        )
