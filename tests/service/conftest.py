"""One local Ray for all service tests."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import ray


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """Ray with two CPUs; never a cluster that happens to run on this machine."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's own, at its start
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()
