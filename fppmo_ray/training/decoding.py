"""Decode image files, one by one or in batches of which the next is decoded ahead."""

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
"""Images from files are decoded to red, green and blue."""

_Batch = tuple[Tensor, Iterator[None]]
"""uint8 (n, H, W, C) in memory, and what ends once all of it is filled."""

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


@dataclass(frozen=True)
class StreamedPixels:
    """Images on disk; while one batch is used, threads decode the next."""

    files: ImageFiles
    """Only those that are streamed."""
    device: torch.device
    threads: int | None = None
    """Of decoding; None: as many as torch has."""

    @property
    def num_channels(self) -> int:
        """Of every image."""
        return FILE_CHANNELS

    def stream(self, order: Tensor, batch_size: int) -> Iterator[Tensor]:
        """Batches from files; see ``PixelSource``."""
        return self._stream(order, batch_size, self._decode)

    def stream_random_parts(
        self, order: Tensor, seeds: Tensor, batch_size: int, crop: RandomResizedCrop
    ) -> Iterator[Tensor]:
        """Batches of random parts of the images; see ``stream``.

        Args:
            order: Positions of the images, int64 on the CPU.
            seeds: For each of them, what decides on its part; int64 on the CPU.
            batch_size: Of every batch but perhaps the last.
            crop: What parts there may be.
        """

        def decode(job: tuple[int, int]) -> ByteArray:
            return self._decode_part(job[0], crop, seed=job[1])

        return self._stream(torch.stack([order, seeds], dim=1), batch_size, decode)

    def _stream(
        self, jobs: Tensor, batch_size: int, decode: Callable[[Any], ByteArray]
    ) -> Iterator[Tensor]:
        """A row of ``jobs`` for every image, in batches; the next is begun before one is given."""
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
        # What lies in pinned memory reaches a GPU while it computes.
        batch = torch.empty(shape, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        pixels = batch.numpy()

        def fill(place: int) -> None:
            pixels[place] = decode(jobs[place])

        return batch, pool.map(fill, range(len(jobs)))  # map() starts all of it at once

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
