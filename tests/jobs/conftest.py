"""What tests of jobs share: a Ray head, a little of the real CIFAR-10, a trained network."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
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
def weights(shared_data: Path) -> Path:
    """Of a ResNet-20 trained on them."""
    return shared_data / "pretrained" / "resnet20-cifar10jpeg-rows0-44999.pt"
