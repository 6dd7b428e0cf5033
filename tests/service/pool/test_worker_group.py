from __future__ import annotations

import sys
import time
from pathlib import Path

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


class HangingOnce:
    """Does not get ready the first time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def ready(self) -> WorkerInfo:
        with (self.folder / "starts").open("a") as file:
            file.write("x")
            if file.tell() == 1:
                time.sleep(60)
        return worker_info(0)


def test_a_worker_that_does_not_get_ready_in_time_is_started_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    actor = ray.remote(num_cpus=0)(HangingOnce)
    group = WorkerGroup(lambda _: actor.remote(tmp_path), 1, Demand())
    deadline = time.monotonic() + 60
    while not caplog.records:
        assert time.monotonic() < deadline
        time.sleep(0.05)
        group.end_hung_starts(0.2 if (tmp_path / "starts").exists() else 60.0)
    become_ready(group)
    group.close()
    [message] = [record.getMessage() for record in caplog.records]
    expected = "worker 0 did not start and is tried again: ready() took longer than 0.2 s"
    assert message == expected
    assert (tmp_path / "starts").read_text() == "xx"


def test_a_worker_without_room_may_wait_longer_than_a_start_may_take() -> None:
    too_large = ray.remote(num_cpus=64)(Worker)
    group = WorkerGroup(lambda slot: too_large.remote(slot), 1, Demand(cpus=64))
    before = dict(group.starting)
    for _ in range(3):
        time.sleep(0.01)
        group.end_hung_starts(0.001)
    group.close()
    assert group.starting == before


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
