"""Batches on a pretended GPU: the CPU's images, copied from pinned memory while the GPU works."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fppmo_ray.testing.pretended_gpu import PretendedGpu
from fppmo_ray.training import Dataset, Transform, load_dataset, load_imagenet, open_images
from fppmo_ray.training.dataset import PreparedInputs

NUM_IMAGES, BATCH = 12, 5


class Items:
    """A map-style data set whose items have a random part."""

    def __len__(self) -> int:
        return NUM_IMAGES

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.full((3, 4, 4), float(index)) + torch.rand(3, 4, 4), index % 2


def in_files(folder: Path) -> Dataset:
    for part in ("train", "val"):
        (folder / part / "only").mkdir(parents=True)
        for row in range(NUM_IMAGES):
            pixels = np.full((12, 12, 3), 20 * row, np.uint8)
            Image.fromarray(pixels).save(folder / part / "only" / f"{row:02}.png")
    return load_imagenet(folder, Transform(image_size=8, resize=9))


def in_items(_: Path) -> Dataset:
    labels = np.arange(NUM_IMAGES) % 2
    items = PreparedInputs(items=Items(), labels=labels, shape=(3, 4, 4))
    return replace(load_dataset("digits"), train=items, test=items, mean=(), std=())


def in_memory(_: Path) -> Dataset:
    return load_dataset("digits")


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("dataset_of", [in_files, in_items, in_memory])
def test_batches_are_the_cpus_and_nobody_waits_for_them(
    gpu: PretendedGpu, tmp_path: Path, dataset_of, keep: bool
) -> None:
    dataset = dataset_of(tmp_path)
    on_cpu, on_gpu = (
        open_images(dataset.train, np.arange(NUM_IMAGES), dataset, device, keep=keep)
        for device in ("cpu", gpu.device)
    )
    gpu.reset_counts()
    found, expected = (
        [*images.batches(BATCH), *images.training_batches(BATCH, seed=0, epoch=1)]
        for images in (on_gpu, on_cpu)
    )
    assert (gpu.waits.total(), gpu.pageable_copies.total()) == (0, 0)
    for batch, known in zip(found, expected, strict=True):
        for tensor, other in zip(batch, known, strict=True):
            assert tensor.device == gpu.device
            assert torch.equal(tensor.cpu(), other)
