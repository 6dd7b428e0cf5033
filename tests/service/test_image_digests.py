"""Digests of data, which are part of a search's identity."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from fppmo_ray.service.image_task import digest_data
from fppmo_ray.training import Augmentation, CentreCrop, Dataset, ImageFiles, Splits

FILES = ImageFiles(
    tuple(Path(f"/data/train/{name}/1.png") for name in ("cat", "dog")), np.array([0, 1]), 32, 32
)
DATASET = Dataset(
    name="image_folder",
    train=FILES,
    test=FILES,
    num_classes=2,
    mean=(0.5,) * 3,
    std=(0.25,) * 3,
    augmentation=Augmentation(padding=4, flip=True),
)
SPLITS = Splits(search_train=np.array([0]), search_val=np.array([1]), choose_val=np.array([2]))


def test_the_digest_of_image_files_never_changes_since_journals_hold_it() -> None:
    assert (
        digest_data(DATASET, SPLITS)
        == "120c77d1f40b0f55aa953e25327c17d7941114c090b427649ee70c3de003be1c"
    )


def test_data_with_another_crop_has_another_digest() -> None:
    sizes = (256, 320)
    cropped = [replace(FILES, view=CentreCrop(resize=size)) for size in sizes]
    sets = [replace(DATASET, train=files, test=files) for files in (FILES, *cropped)]
    assert len({digest_data(dataset, SPLITS) for dataset in sets}) == 3
