from __future__ import annotations

import sys

import pytest
import ray

from fppmo_ray.service.pool import worker_group
from fppmo_ray.service.pool.cluster import Demand
from fppmo_ray.service.pool.worker_group import WorkerGroup, WorkerInfo, worker_info

# The workers' processes cannot import test modules.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

pytestmark = pytest.mark.usefixtures("local_ray")


class Worker:
    def __init__(self, slot: int) -> None:
        self.slot = slot

    def ready(self) -> WorkerInfo:
        return worker_info(self.slot)


def become_ready(group: WorkerGroup) -> None:
    [reference] = ray.wait(list(group.starting), timeout=60)[0]
    assert group.finish_start(reference) is not None


def test_workers_without_room_are_warned_of_with_what_they_ask_and_what_there_is(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_group, "_PLACEMENT_WARNING_S", 0.0)
    too_large = ray.remote(num_cpus=64, num_gpus=0.5)(Worker)
    group = WorkerGroup(lambda slot: too_large.remote(slot), 2, Demand(cpus=64, gpus=0.5))
    group.warn_of_unplaced()
    group.warn_of_unplaced()  # was warned about already
    group.close()
    [message] = [record.getMessage() for record in caplog.records]
    assert message == (
        "only 0 of 2 workers are ready: each needs 64 CPUs and 0.5 GPUs; the cluster has 2 CPUs "
        "and 0 GPUs on 1 node (at most 2 CPUs and 0 GPUs on one), of which 2 CPUs and 0 GPUs are "
        "free; the others start when there is room; if the cluster will not grow, ask for fewer or "
        "smaller workers"
    )


def test_a_worker_that_is_lost_later_and_finds_no_room_is_warned_of_again_but_not_too_soon(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_group, "_PLACEMENT_WARNING_S", 0.0)
    room = [0, 64, 64]
    group = WorkerGroup(
        lambda slot: ray.remote(num_cpus=room.pop(0))(Worker).remote(slot), 1, Demand(cpus=64)
    )
    group.warn_of_unplaced()
    become_ready(group)
    group.restart(0)
    group.warn_of_unplaced()
    assert len(caplog.records) == 1
    assert 590 < (group.seconds_to_warning() or 0) <= 600
    monkeypatch.setattr(worker_group, "_WARNING_INTERVAL_S", 0.0)
    group.warn_of_unplaced()
    group.close()
    assert len(caplog.records) == 2
