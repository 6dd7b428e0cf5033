"""A search on a user's own data as a process of its own: to be killed and resumed."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import Dataset

from fppmo_ray import Numerics, Recipe, Resources, Sampler, Scoring, Transform, search

NAMES = ("blue", "green", "red")
SHADES = np.array([[40, 60, 200], [40, 200, 60], [200, 60, 40]])
HALVES = Transform(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), image_size=12, squash=True)
EPOCHS, PROPOSALS = 3, 6


def picture(row: int) -> Image.Image:
    """An image of class ``row % 3``, 20 x 16 pixels."""
    noise = np.random.default_rng(row).integers(-90, 90, (16, 20, 3))
    return Image.fromarray((SHADES[row % 3] + noise).clip(0, 255).astype(np.uint8))


class Mine(Dataset[Any]):
    """A data set of the user's own class, in the script itself, augmented at random."""

    def __init__(self, first: int, count: int) -> None:
        self.first, self.count = first, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, row: int) -> tuple[torch.Tensor, int]:
        image = picture(self.first + row).resize((12, 12))
        if torch.rand(()) < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1
        noise = 0.1 * np.random.randn(3, 1, 1)  # noqa: NPY002 (as users' transforms draw)
        return pixels + torch.from_numpy(noise).float(), (self.first + row) % 3


def network() -> nn.Module:
    """A network that knows the colours, without batch norm, so that DDP is exact."""
    torch.manual_seed(0)
    made = nn.Sequential(
        *(nn.Conv2d(3, 16, 1), nn.ReLU(), nn.Conv2d(16, 3, 1)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    )
    with torch.no_grad():
        for channel in range(3):
            made[0].weight[channel] = 0
            made[0].weight[channel, 2 - channel] = 3
            made[2].weight[channel] = 0
            made[2].weight[channel, channel] = 5
    return made


def main(kind: str, folder: str, run_dir: str) -> None:
    """Search on torch's data sets, or on a folder of images or parquet files.

    Args:
        kind: ``torch``, ``folder`` or ``parquet``.
        folder: Folder of the data.
        run_dir: As of any search.
    """
    own = {"train": Mine(0, 240), "val": Mine(240, 60), "test": Mine(300, 60)}
    search(
        network(),
        own if kind == "torch" else folder,
        transform=None if kind == "torch" else HALVES,
        class_names=NAMES,
        run_dir=run_dir,
        macs_cut=0.4,
        proposals=PROPOSALS,
        sampler=Sampler(population=2),
        scoring=Scoring(rescore_seeds=1),
        fine_tune=Recipe(epochs=EPOCHS, batch_size=32, learning_rate=0.01),
        numerics=Numerics(dtype="float32"),
        resources=Resources(workers=2, fine_tune_workers=2),
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
