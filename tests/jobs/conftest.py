"""What tests of jobs share: a Ray head, a little of the real CIFAR-10, a trained network."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from ray_head import Head, ray_head


@pytest.fixture(autouse=True)
def _threads_are_left_alone() -> Iterator[None]:
    """Workers that run in the test's own process set them."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def head() -> Iterator[Head]:
    """A head node that takes jobs."""
    with ray_head() as head:
        yield head


@pytest.fixture(scope="session")
def few_images(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """400 training and 100 test images of the real files."""
    folder = tmp_path_factory.mktemp("cifar10")
    rows = pq.read_table(shared_data / "cifar10-jpeg" / "test-00000-of-00001.parquet")
    pq.write_table(rows.slice(0, 400), folder / "train-00000-of-00001.parquet")
    pq.write_table(rows.slice(400, 100), folder / "test-00000-of-00001.parquet")
    return folder


@pytest.fixture(scope="session")
def image_folder(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like ImageNet's: 20 classes of 20 + 5 real images, as JPEG files of 96 x 72 pixels.

    Each class of CIFAR-10 is dealt over two, so that there are enough for top-5 accuracy.
    """
    folder = tmp_path_factory.mktemp("imagenet")
    rows = pq.read_table(shared_data / "cifar10-jpeg" / "test-00000-of-00001.parquet")
    found: Counter[int] = Counter()
    for row in rows.slice(0, 1000).to_pylist():
        label, place = row["label"], found[row["label"]]
        found[label] += 1
        if place < 50:
            part = "val" if place % 5 == 4 else "train"
            path = folder / part / f"n{label}-{place % 2}" / f"{place}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.open(io.BytesIO(row["img"]["bytes"])).resize((96, 72)).save(path)
    return folder


@pytest.fixture(scope="session")
def weights(shared_data: Path) -> Path:
    """Of a ResNet-20 trained on them."""
    return shared_data / "pretrained" / "resnet20-cifar10jpeg-rows0-44999.pt"
