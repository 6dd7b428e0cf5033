"""Where a batch's pixels come from: device memory, or files decoded one batch ahead."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from fppmo_ray.training.decoding import decode_to_size

FILE_CHANNELS = 3
"""Images from files are decoded to red, green and blue."""


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

    paths: tuple[Path, ...]
    height: int
    width: int
    device: torch.device

    @property
    def num_channels(self) -> int:
        """Of every image."""
        return FILE_CHANNELS

    def stream(self, order: Tensor, batch_size: int) -> Iterator[Tensor]:
        """Batches from files; see ``PixelSource``."""
        pool = ThreadPoolExecutor(torch.get_num_threads())
        try:
            ahead: Iterator[Tensor] | None = None
            for positions in torch.split(order, batch_size):
                # map() starts the decoding of a whole batch at once.
                current, ahead = ahead, pool.map(self._decode, positions.tolist())
                if current is not None:
                    yield self._assemble(current)
            if ahead is not None:
                yield self._assemble(ahead)
        finally:
            pool.shutdown(cancel_futures=True)

    def _decode(self, position: int) -> Tensor:
        path = self.paths[position]
        pixels = torch.from_numpy(decode_to_size(path, str(path), self.height, self.width))
        return pixels.permute(2, 0, 1)

    def _assemble(self, images: Iterator[Tensor]) -> Tensor:
        return torch.stack(list(images)).to(self.device)
