"""Pools of workers that do as they are told."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from told_worker import Worker, pool_of

from fppmo_ray.service.pool.worker_pool import WorkerPool


@pytest.fixture(scope="package")
def spare(local_ray: None) -> Iterator[list[Any]]:
    """Actors that earlier tests have left well, since the start of a process takes a second."""
    actors: list[Any] = []
    yield actors
    for actor in actors:
        ray.kill(actor)


@pytest.fixture
def pool(tmp_path: Path, spare: list[Any]) -> Iterator[WorkerPool[Worker]]:
    with pool_of(2, tmp_path, spare) as pool:
        yield pool


@pytest.fixture
def lone_pool(
    tmp_path: Path, spare: list[Any], monkeypatch: pytest.MonkeyPatch
) -> Iterator[WorkerPool[Worker]]:
    """One worker, at which a second call always waits, however long the first one takes."""
    monkeypatch.setattr("fppmo_ray.service.pool.in_flight.TimeLimits.is_brief", lambda *_: True)
    with pool_of(1, tmp_path, spare) as pool:
        yield pool
