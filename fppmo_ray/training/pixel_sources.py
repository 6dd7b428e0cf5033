"""Where a batch's pixels come from: device memory, or files decoded one batch ahead."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from fppmo_ray.training.decoding import decode_centre, decode_random_part, decode_to_size
from fppmo_ray.training.image_sets import ByteArray, ImageFiles, RandomResizedCrop

FILE_CHANNELS = 3
"""Images from files are decoded to red, green and blue."""

_Batch = tuple[Tensor, Iterator[None]]
"""uint8 (n, H, W, C) in memory, and what ends once all of it is filled."""


class PixelSource(Protocol):
    """Gives pixels in any order that is asked for."""

    @property
    def num_channels(self) -> int:
        """Of every image."""

    def stream(self, order: Tensor, batch_size: int) -> Iterator[Tensor]:
        """Batches of uint8 pixels ``(n, C, H, W)`` on the device.

        Args:
            order: Positions of the images, int64 on the CPU.
            batch_size: Of every batch but perhaps the last.
        """


@dataclass(frozen=True, eq=False)
class ResidentPixels:
    """All images on the device."""

    images: Tensor
    """uint8 ``(N, C, H, W)``."""

    @property
    def num_channels(self) -> int:
        """Of every image."""
        return self.images.shape[1]

    def stream(self, order: Tensor, batch_size: int) -> Iterator[Tensor]:
        """Batches by indexing; see ``PixelSource``."""
        for positions in torch.split(order.to(self.images.device), batch_size):
            yield self.images[positions]


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
