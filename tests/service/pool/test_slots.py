from __future__ import annotations

import logging
import sys

import pytest
import ray

from fppmo_ray.service.connection import connection
from fppmo_ray.service.pool import slots as slots_module
from fppmo_ray.service.pool.place import Place, here
from fppmo_ray.service.pool.resources import Demand
from fppmo_ray.service.pool.slots import Slots
from fppmo_ray.service.settings import Placement

# The workers' processes cannot import test modules.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

pytestmark = pytest.mark.usefixtures("local_ray")


class Worker:
    def __init__(self, slot: int) -> None:
        self.slot = slot

    def ready(self) -> Place:
        return here(self.slot)


def become_ready(slots: Slots) -> None:
    [reference] = ray.wait(list(slots.starting), timeout=60)[0]
    assert slots.finish_start(reference) is not None


def test_workers_without_room_are_warned_of_with_what_they_ask_and_what_there_is(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slots_module, "_PLACEMENT_WARNING_S", 0.0)
    too_large = ray.remote(num_cpus=64, num_gpus=0.5)(Worker)
    slots = Slots(lambda slot: too_large.remote(slot), 2, Demand(cpus=64, gpus=0.5))
    slots.warn_of_unplaced()
    slots.warn_of_unplaced()  # has been said
    slots.close()
    [message] = [record.getMessage() for record in caplog.records]
    assert message == (
        "only 0 of 2 workers are up: each asks for 64 CPUs and 0.5 GPUs; the cluster has 2 CPUs "
        "and 0 GPUs on 1 node (at most 2 CPUs and 0 GPUs on one), of which 2 CPUs and 0 GPUs are "
        "free; the others join as room appears; if none will, ask for fewer workers or smaller ones"
    )


def test_a_worker_that_is_lost_later_and_finds_no_room_is_warned_of_again_but_not_too_soon(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slots_module, "_PLACEMENT_WARNING_S", 0.0)
    room = [0, 64, 64]
    slots = Slots(
        lambda slot: ray.remote(num_cpus=room.pop(0))(Worker).remote(slot), 1, Demand(cpus=64)
    )
    slots.warn_of_unplaced()
    become_ready(slots)
    slots.restart(0)
    slots.warn_of_unplaced()
    assert len(caplog.records) == 1
    assert 590 < (slots.seconds_to_warning() or 0) <= 600
    monkeypatch.setattr(slots_module, "_WARNING_INTERVAL_S", 0.0)
    slots.warn_of_unplaced()
    slots.close()
    assert len(caplog.records) == 2


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
