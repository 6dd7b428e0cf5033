"""Images on a worker's device, served in augmented and normalised batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fppmo_ray.training.dataset import (
    NUM_CHANNELS,
    Augmentation,
    Dataset,
    ImageArrays,
    ImageSet,
    IntArray,
    PreparedInputs,
    RandomResizedCrop,
)
from fppmo_ray.training.ddp import WHOLE, Shard
from fppmo_ray.training.decoding import StreamedPixels
from fppmo_ray.training.device import copy_to
from fppmo_ray.training.parquet_stream import WINDOW
from fppmo_ray.training.prepared import ItemStream, Rows, kept_arrays, shuffled_by_blocks

Batch = tuple[Tensor, Tensor]
"""Normalised images float32 (n, C, H, W) and labels int64 (n,), both on the device."""

Seed = int | Sequence[int]
"""One number or several, each >= 0, that together identify a stream of random numbers."""


class PixelSource(Protocol):
    """A source of pixels in any order."""

    @property
    def num_channels(self) -> int:
        """Number of channels of an image."""

    def stream(self, order: Tensor, batch_size: int) -> Iterator[Tensor]:
        """Yield batches of uint8 pixels ``(n, C, H, W)`` on the device.

        Args:
            order: Positions of the images, int64 on the CPU.
            batch_size: Images per batch; the last batch may be smaller.
        """


@dataclass(frozen=True, eq=False)
class ResidentPixels:
    """Images that all lie in the device's memory."""

    images: Tensor
    """Pixels, uint8 ``(N, C, H, W)``."""

    @property
    def num_channels(self) -> int:
        """Number of channels of an image."""
        return self.images.shape[1]

    def stream(self, order: Tensor, batch_size: int) -> Iterator[Tensor]:
        """Yield batches by indexing; see ``PixelSource.stream``.

        Args:
            order: Positions of the images, int64 on the CPU.
            batch_size: Images per batch; the last batch may be smaller.
        """
        for positions in torch.split(copy_to(self.images.device, order), batch_size):
            yield self.images[positions]


@dataclass(frozen=True, eq=False)
class Images:
    """Labelled images on one device, made by ``open_images``."""

    pixels: PixelSource
    """Source of the images' pixels."""
    labels: Tensor
    """Class labels, int64 (N,), on the device."""
    mean: Tensor
    """Mean of each channel, (1, C, 1, 1), on the device."""
    std: Tensor
    """Standard deviation of each channel, (1, C, 1, 1), on the device."""
    augmentation: Augmentation | RandomResizedCrop
    """Random changes of training images."""

    def __len__(self) -> int:
        return len(self.labels)

    def num_training_batches(self, batch_size: int) -> int:
        """Return the number of full batches in an epoch, at least one.

        Args:
            batch_size: Images per batch, >= 1.
        """
        return max(1, len(self) // batch_size)

    def batches(self, batch_size: int, indices: IntArray | None = None) -> Iterator[Batch]:
        """Yield the images once, in order and without augmentation; the last batch may be smaller.

        Args:
            batch_size: Images per batch, >= 1.
            indices: Positions of the images to serve, in [0, len); None serves all.
        """
        positions = np.arange(len(self)) if indices is None else indices
        order = torch.from_numpy(np.array(positions, dtype=np.int64))
        labels = torch.split(self.labels[copy_to(self.labels.device, order)], batch_size)
        for pixels, batch_labels in zip(self.pixels.stream(order, batch_size), labels, strict=True):
            yield normalise(pixels, self.mean, self.std), batch_labels

    def training_batches(
        self, batch_size: int, *, seed: Seed, epoch: int, shard: Shard = WHOLE
    ) -> Iterator[Batch]:
        """Yield one epoch of shuffled, augmented batches of equal size, or of a part of each batch.

        Order, crops and flips depend on (seed, epoch) alone, on every device. Each epoch leaves out
        another ``len % batch_size`` images, so that batch statistics never come from a few images.
        A set smaller than a batch is served as one batch.

        Args:
            batch_size: Images of a whole batch, >= 1.
            seed: Random seed of the whole training.
            epoch: Number of the epoch, counted from 0.
            shard: The part of every batch to serve. All parts together are the whole batch.

        Raises:
            ValueError: a batch cannot be divided evenly.
        """
        generator = torch.Generator().manual_seed(derive_seed(seed, epoch))
        num_images = min(len(self), self.num_training_batches(batch_size) * batch_size)
        order = self._shuffled(generator)[:num_images]
        draws = self._draw(num_images, generator)
        rows = shard.rows(num_images, batch_size)
        order, batch_size = order[rows], -(-batch_size // shard.count)
        labels = torch.split(self.labels[copy_to(self.labels.device, order)], batch_size)
        augmented = self._augmented(order, draws[rows], batch_size)
        for pixels, batch_labels in zip(augmented, labels, strict=True):
            yield normalise(pixels, self.mean, self.std), batch_labels

    def _shuffled(self, generator: torch.Generator) -> Tensor:
        """Return all positions in random order; images that are read in blocks stay near."""
        order = torch.randperm(len(self), generator=generator)
        paths = self.pixels.files.paths if isinstance(self.pixels, StreamedPixels) else None
        blocks = paths.blocks(np.arange(len(self))) if isinstance(paths, Rows) else None
        if blocks is None:
            return order
        rng = np.random.default_rng(order[:4].tolist())
        return torch.from_numpy(shuffled_by_blocks(blocks, WINDOW, rng))

    def _draw(self, num_images: int, generator: torch.Generator) -> Tensor:
        """Draw what is random about each image: a seed (n,), or a move (n, 3)."""
        if isinstance(self.augmentation, RandomResizedCrop):
            return torch.randint(2**62, (num_images,), generator=generator)
        if isinstance(self.pixels, ItemStream):
            return torch.randint(2**62, (num_images, 1), generator=generator)
        return draw_moves(num_images, self.augmentation, generator)

    def _augmented(self, order: Tensor, draws: Tensor, batch_size: int) -> Iterator[Tensor]:
        if isinstance(self.augmentation, RandomResizedCrop):
            assert isinstance(self.pixels, StreamedPixels)  # Dataset refuses arrays with this crop
            yield from self.pixels.stream_random_parts(order, draws, batch_size, self.augmentation)
            return
        if isinstance(self.pixels, ItemStream):
            yield from self.pixels.stream_seeded(order, draws[:, 0], batch_size)
            return
        moves = torch.split(copy_to(self.labels.device, draws), batch_size)
        for pixels, batch_moves in zip(self.pixels.stream(order, batch_size), moves, strict=True):
            yield crop_and_flip(pixels, batch_moves, self.augmentation.padding)


def open_images(
    image_set: ImageSet,
    indices: IntArray | None,
    dataset: Dataset,
    device: torch.device | str = "cpu",
    *,
    decoding_threads: int | None = None,
    keep: bool = False,
) -> Images:
    """Put images on a device (arrays), or prepare to stream them there (files).

    Args:
        image_set: Images in memory or in files. Arrays are copied and may be read-only.
        indices: Rows of the set, in [0, len); None takes all.
        dataset: The data set that the images belong to; it says how images are prepared.
        device: Device on which batches are needed.
        decoding_threads: Number of threads that decode files; None takes as many as torch has.
        keep: Whether what ``batches`` has read of files and data sets stays in memory, for images
            that are evaluated on again and again. More than 2 GiB are never kept.

    Raises:
        ValueError: there are no rows, a row is out of range, or the channels do not match.
    """
    rows = np.arange(len(image_set)) if indices is None else np.asarray(indices)
    if not len(rows) or rows.min() < 0 or rows.max() >= len(image_set):
        raise ValueError(
            f"rows of a set of {len(image_set)} images must be in [0, {len(image_set) - 1}] and "
            f"at least one, got {len(rows)} rows"
            + (f" from {rows.min()} to {rows.max()}" if len(rows) else "")
        )
    device = torch.device(device)
    pixels = _pixel_source(image_set, rows, device, decoding_threads)
    if keep and isinstance(pixels, StreamedPixels):
        size = pixels.files.height, pixels.files.width, pixels.num_channels
        pixels = replace(pixels, kept=kept_arrays((len(rows), *size), np.uint8))
    elif keep and isinstance(pixels, ItemStream):
        shape = len(rows), *pixels.inputs.shape
        pixels = replace(pixels, kept=kept_arrays(shape, np.float32))
    is_prepared = isinstance(image_set, PreparedInputs)
    if not is_prepared and len(dataset.mean) != pixels.num_channels:
        raise ValueError(
            f"images have {pixels.num_channels} channels, but data set {dataset.name} has a mean "
            f"of {len(dataset.mean)}; open them with their own data set"
        )
    labels = torch.from_numpy(image_set.labels[rows]).to(device)
    mean, std = _channel_statistics(dataset, device)
    return Images(pixels, labels, mean, std, dataset.augmentation)


def example_batch(dataset: Dataset) -> Tensor:
    """Return a normalised black image, float32 (1, C, H, W), of the shape that networks get."""
    images = dataset.train
    if isinstance(images, PreparedInputs):
        return torch.zeros(1, *images.shape)
    if isinstance(images, ImageArrays):
        height, width, channels = images.images.shape[1:]
    else:
        height, width, channels = images.height, images.width, NUM_CHANNELS[images.colour]
    black = torch.zeros(1, channels, height, width, dtype=torch.uint8)
    return normalise(black, *_channel_statistics(dataset, black.device))


def _channel_statistics(dataset: Dataset, device: torch.device) -> tuple[Tensor, Tensor]:
    if not dataset.mean:  # of prepared inputs
        return torch.zeros(0, device=device), torch.zeros(0, device=device)
    mean, std = torch.tensor([dataset.mean, dataset.std]).to(device)
    return mean.reshape(1, -1, 1, 1), std.reshape(1, -1, 1, 1)


def _pixel_source(
    image_set: ImageSet, rows: IntArray, device: torch.device, threads: int | None
) -> PixelSource:
    if isinstance(image_set, ImageArrays):
        # Indexing by rows copies, so read-only arrays of Ray's object store are fine.
        images = torch.from_numpy(image_set.images[rows]).permute(0, 3, 1, 2)
        return ResidentPixels(images.contiguous().to(device))
    if isinstance(image_set, PreparedInputs):
        if isinstance(image_set.items, np.ndarray):
            return ResidentPixels(torch.from_numpy(image_set.items[rows]).to(device))
        items = Rows(image_set.items, rows.tolist())
        return ItemStream(replace(image_set, items=items, labels=image_set.labels[rows]), device)
    paths = Rows(image_set.paths, rows)
    files = replace(image_set, paths=paths, labels=image_set.labels[rows])
    return StreamedPixels(files, device, threads)


def normalise(pixels: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Convert uint8 (n, C, H, W) to float32: ``(pixel / 255 - mean) / std``.

    Inputs of floats are prepared already, and stay as they are.

    Args:
        pixels: Pixels, uint8 (n, C, H, W).
        mean: Mean of each channel, (1, C, 1, 1).
        std: Standard deviation of each channel, (1, C, 1, 1).
    """
    if pixels.is_floating_point():
        return pixels
    return pixels.float().div_(255).sub_(mean).div_(std)


def draw_moves(num_images: int, augmentation: Augmentation, generator: torch.Generator) -> Tensor:
    """Draw (rows down, columns right, mirrored) for each image, int64 (n, 3) on the CPU.

    Args:
        num_images: Number of images n.
        augmentation: Range of the moves, and whether to mirror.
        generator: Source of randomness.
    """
    offsets = torch.randint(2 * augmentation.padding + 1, (num_images, 2), generator=generator)
    mirrored = torch.randint(1 + augmentation.flip, (num_images, 1), generator=generator)
    return torch.cat([offsets, mirrored], dim=1)


def crop_and_flip(pixels: Tensor, moves: Tensor, padding: int) -> Tensor:
    """Pad with zeros (black, as torchvision's RandomCrop on images), crop back, and mirror.

    Args:
        pixels: Pixels, uint8 (n, C, H, W).
        moves: Moves from ``draw_moves``, (n, 3) on the same device.
        padding: Pixels added on each side; offsets are in [0, 2 * padding].
    """
    height, width = pixels.shape[2:]
    if padding:
        windows = F.pad(pixels, [padding] * 4).unfold(2, height, 1).unfold(3, width, 1)
        image = torch.arange(len(pixels), device=pixels.device)
        pixels = windows[image, :, moves[:, 0], moves[:, 1]]
    mirrored = moves[:, 2].bool().reshape(-1, 1, 1, 1)
    return torch.where(mirrored, pixels.flip(3), pixels)


def derive_seed(seed: Seed, *salt: int) -> int:
    """Combine several numbers, each >= 0, into a 64-bit seed for torch.

    Args:
        seed: Random seed of one number or several.
        *salt: Further numbers that distinguish streams of the same seed.
    """
    entropy = [seed, *salt] if isinstance(seed, int) else [*seed, *salt]
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])
