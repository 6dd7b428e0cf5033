"""Decode image files: one image at a time, or batches, with the next batch decoded ahead."""

from __future__ import annotations

import io
import math
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fppmo_ray.training.dataset import (
    ByteArray,
    CentreCrop,
    ImageFiles,
    Interpolation,
    RandomResizedCrop,
)

if TYPE_CHECKING:
    from PIL.Image import Image

FILE_CHANNELS = 3
"""Channels of an image from a file: red, green and blue."""

_Batch = tuple[Tensor, Iterator[None]]
"""Pixels uint8 (n, H, W, C) being filled, and an iterator that ends when all are filled."""

_RESIZE_TO_CROP = 256 / 224  # shorter side over the centre crop: the usual ImageNet protocol
_ATTEMPTS = 10  # draws of a part before the centre is taken


def decode(source: bytes | Path, name: str) -> ByteArray:
    """Decode an image to RGB pixels ``(H, W, 3)``.

    Args:
        source: Encoded image, or its file.
        name: Name of the image in the error message.

    Raises:
        ValueError: the image cannot be decoded.
    """
    return np.array(_open(source, name))


def decode_to_size(source: bytes | Path, name: str, height: int, width: int) -> ByteArray:
    """Decode an image to RGB pixels of a given size, ``(height, width, 3)``.

    An image of that size is not changed. Any other is resized so that the crop is 224 / 256 of its
    tighter side, and cropped in the centre.

    Args:
        source: Encoded image, or its file.
        name: Name of the image in the error message.
        height: Height of the result in pixels.
        width: Width of the result in pixels.

    Raises:
        ValueError: the image cannot be decoded.
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
    """Decode the centre of an image to RGB ``(height, width, 3)``, pixel-equal to torchvision's.

    Args:
        source: Encoded image, or its file.
        name: Name of the image in the error message.
        height: Height of the result in pixels, at most ``crop.resize``.
        width: Width of the result in pixels, at most ``crop.resize``.
        crop: Length of the shorter side before the crop, and the interpolation.

    Raises:
        ValueError: the image cannot be decoded.
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
    """Decode a random part of an image, resized to RGB ``(height, width, 3)``.

    Args:
        source: Encoded image, or its file.
        name: Name of the image in the error message.
        height: Height of the result in pixels.
        width: Width of the result in pixels.
        crop: Range of the parts.
        seed: Random seed that decides on the part and on mirroring.
        interpolation: Interpolation of the resizing.

    Raises:
        ValueError: the image cannot be decoded.
    """
    image = _open(source, name)
    rng = random.Random(seed)
    part = image.crop(random_box(image.width, image.height, crop, rng))
    pixels = np.array(_resized(part, width, height, interpolation))
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


def _open(source: bytes | Path, name: str) -> Image:
    """Return the whole image in memory, as RGB."""
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


@dataclass(frozen=True)
class StreamedPixels:
    """Batches of image files; threads decode the next batch while the current one is used."""

    files: ImageFiles
    """The images that are streamed."""
    device: torch.device
    """Device on which the batches are needed."""
    threads: int | None = None
    """Number of decoding threads; None takes as many as torch has."""

    @property
    def num_channels(self) -> int:
        """Number of channels of an image."""
        return FILE_CHANNELS

    def stream(self, order: Tensor, batch_size: int) -> Iterator[Tensor]:
        """Yield batches of the decoded images; see ``PixelSource.stream``.

        Args:
            order: Positions of the images, int64 on the CPU.
            batch_size: Images per batch; the last batch may be smaller.
        """
        return self._stream(order, batch_size, self._decode)

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
        shape = (len(jobs), self.files.height, self.files.width, FILE_CHANNELS)
        # Pinned memory can be copied to a GPU while the GPU computes.
        batch = torch.empty(shape, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
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
        size = files.height, files.width
        if files.centre_crop is None:
            return decode_to_size(path, str(path), *size)
        return decode_centre(path, str(path), *size, files.centre_crop)

    def _decode_part(self, position: int, crop: RandomResizedCrop, seed: int) -> ByteArray:
        files, path = self.files, self.files.paths[position]
        how = "bilinear" if files.centre_crop is None else files.centre_crop.interpolation
        return decode_random_part(
            *(path, str(path), files.height, files.width, crop), seed=seed, interpolation=how
        )
