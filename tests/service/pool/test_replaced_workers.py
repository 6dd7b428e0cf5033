"""Workers are replaced, and those that cannot start end the run."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import ray
from ray.exceptions import RaySystemError
from told_worker import Worker, call, processes_of, run

from fppmo_ray.service.pool.cluster import explain_ray_errors
from fppmo_ray.service.pool.worker_group import WorkerInfo, worker_info
from fppmo_ray.service.pool.worker_pool import WorkerPool

# The workers' processes cannot import test modules.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

pytestmark = pytest.mark.usefixtures("local_ray")


def test_a_suspended_worker_is_replaced_and_gives_its_cpus_back(tmp_path: Path) -> None:
    actor = ray.remote(num_cpus=2)(Worker)  # all there are
    pool: WorkerPool[Worker] = WorkerPool(lambda slot: actor.remote(slot, tmp_path), 1)
    run(pool, call("echo", 0))
    [ended] = run(pool, call("suspend_once", 3, timeout=1.0))
    pool.close()
    assert (ended.value, ended.error) == (3, None)


def test_a_worker_is_replaced_once_for_each_type_of_error_and_then_no_more(
    pool: WorkerPool[Worker],
) -> None:
    first = processes_of(pool)
    run(pool, call("refuse", 7))
    second = processes_of(pool)
    assert len(first & second) == 1  # the other worker has shown that the call is at fault
    raising = [call("refuse", value) for value in range(5)]
    ended = run(pool, *raising, *(call("echo", value) for value in range(5)))
    assert sum(item.error is None for item in ended) == 5
    assert all({*item.raised_on} == {0, 1} for item in raising)
    assert processes_of(pool) == second


def test_an_only_worker_raises_again_in_a_process_that_has_answered_or_is_new(
    lone_pool: WorkerPool[Worker],
) -> None:
    run(lone_pool, call("refuse", 7))
    [first] = processes_of(lone_pool)
    ended = run(lone_pool, call("refuse", 8), call("echo", 1))
    assert [(item.value if item.error is None else item.raised_on) for item in ended] == [1, [0, 0]]
    assert processes_of(lone_pool) == {first}
    [alone] = run(lone_pool, call("refuse", 9))
    assert alone.error == "ValueError('9 is not to my taste')"
    assert processes_of(lone_pool) != {first}


def test_a_worker_on_which_calls_raise_that_succeed_elsewhere_is_replaced(
    pool: WorkerPool[Worker],
) -> None:
    run(pool, call("refuse", 7))
    before = processes_of(pool)
    ended = run(pool, *(call("work_unless_broken", value) for value in range(20)))
    assert sorted(item.value for item in ended) == list(range(20))
    assert any(item.raised_on for item in ended)
    assert len(before & processes_of(pool)) == 1


class Broken:
    """Cannot be constructed in the slots it is told."""

    def __init__(self, slot: int, broken_slots: set[int]) -> None:
        self.slot = slot
        if slot in broken_slots:
            raise OSError("no such device")

    def ready(self) -> WorkerInfo:
        return worker_info(self.slot)

    def echo(self, value: int) -> int:
        return value


def test_workers_that_cannot_start_stop_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fppmo_ray.service.pool.worker_group._MAX_START_FAILURES", 2)
    actor = ray.remote(num_cpus=0)(Broken)
    pool: WorkerPool[Broken] = WorkerPool(lambda slot: actor.remote(slot, {0, 1}), 2)
    pool.submit(call("echo", 1))
    with pytest.raises(RuntimeError, match=r"^no worker can be started: OSError: no such device$"):
        pool.next_ended()


class Fatal:
    """Takes its process down while it starts, as a driver of a device may."""

    def ready(self) -> WorkerInfo:
        os._exit(1)


def test_workers_whose_processes_die_at_their_start_stop_the_run_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fppmo_ray.service.pool.worker_group._MAX_START_LOSSES", 2)
    actor = ray.remote(num_cpus=0)(Fatal)
    pool: WorkerPool[Fatal] = WorkerPool(lambda _: actor.remote(), 1)
    pool.submit(call("echo", 1))
    with pytest.raises(RuntimeError, match=r"^no worker can be started: "):
        pool.next_ended()


def test_a_slot_that_cannot_start_does_not_stop_the_others() -> None:
    actor = ray.remote(num_cpus=0)(Broken)
    pool: WorkerPool[Broken] = WorkerPool(lambda slot: actor.remote(slot, {0}), 2)
    assert [item.value for item in run(pool, call("echo", 1), call("echo", 2))] == [1, 2]
    assert pool.num_ready == 1
    pool.close()


def test_a_cluster_that_refuses_to_end_workers_does_not_hide_the_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    actor = ray.remote(num_cpus=0)(Worker)
    pool: WorkerPool[Worker] = WorkerPool(lambda slot: actor.remote(slot, tmp_path), 2)
    kill, refused = ray.kill, []

    def refuse(actor: ray.actor.ActorHandle) -> None:
        refused.append(actor)
        raise RaySystemError("Actor creation cancelled")

    with monkeypatch.context() as patch:
        patch.setattr(ray, "kill", refuse)
        pool.close()
    assert len(refused) == 2
    for left in refused:
        kill(left)


def test_errors_of_a_cluster_that_goes_away_end_in_a_sentence() -> None:
    with (
        pytest.raises(
            RuntimeError, match=r"^Ray refused a request of the driver: .*creation cancelled.*--res"
        ),
        explain_ray_errors(),
    ):
        raise RaySystemError("Actor creation cancelled")
