from __future__ import annotations

import logging

import pytest

from fppmo_ray.service.connection import connection
from fppmo_ray.service.settings import Placement

pytestmark = pytest.mark.usefixtures("local_ray")


def test_workers_that_no_node_could_ever_hold_are_warned_of_at_the_start(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with connection(Placement(cpus_per_worker=64)):
        pass
    assert [record.getMessage() for record in caplog.records] == [
        "no node has room for a worker: each asks for 64 CPUs and 0 GPUs; the cluster has 2 CPUs "
        "and 0 GPUs on 1 node (at most 2 CPUs and 0 GPUs on one), of which 2 CPUs and 0 GPUs are "
        "free; the search waits for a larger node to join; if none will, lower cpus_per_worker or "
        "gpus_per_worker"
    ]


def test_workers_that_fit_are_not_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), connection(Placement(cpus_per_worker=2)):
        pass
    assert caplog.records == []
