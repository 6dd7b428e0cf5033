"""A second call waits at a worker while the queue is long."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ray
from told_worker import Worker, call, run, wait_until

from fppmo_ray.service.pool.call import Call
from fppmo_ray.service.pool.worker_pool import WorkerPool

pytestmark = pytest.mark.usefixtures("local_ray")


def begin_to_wait(
    pool: WorkerPool[Worker],
    first: Call[Any, Any],
    second: Call[Any, Any],
    *others: Call[Any, Any],
) -> tuple[Call[Any, Any], Call[Worker, Any]]:
    """Let a worker hold the first two calls, with the others in the queue."""
    for item in (call("echo", 0), first, second, *others):
        pool.submit(item)
    assert [item.value for item in pool.next_ended()] == [0]
    assert list(pool._in_flight) == [first, second]
    return first, second


def test_a_worker_begins_its_next_call_while_the_driver_is_away(
    lone_pool: WorkerPool[Worker], tmp_path: Path
) -> None:
    begin_to_wait(lone_pool, call("behind_gate", 1), call("behind_gate", 2))
    wait_until((tmp_path / "begun-1").exists)
    assert not (tmp_path / "begun-2").exists()
    (tmp_path / "open-1").touch()
    wait_until((tmp_path / "begun-2").exists)
    (tmp_path / "open-2").touch()
    assert [item.value for item in run(lone_pool)] == [1, 2]


def test_a_call_that_began_before_a_stop_was_heard_is_finished_too(
    lone_pool: WorkerPool[Worker], tmp_path: Path
) -> None:
    begin_to_wait(lone_pool, call("behind_gate", 1), call("behind_gate", 2))
    (tmp_path / "open-1").touch()
    wait_until((tmp_path / "begun-2").exists)  # the driver was away
    [first, _] = lone_pool._in_flight
    assert ray.wait([first.reference], timeout=60)[0]  # its answer has come, which may take a while
    lone_pool.stop.is_made = True
    (tmp_path / "open-2").touch()
    assert [item.value for item in run(lone_pool)] == [1, 2]


def test_calls_go_to_idle_workers_first_and_wait_at_workers_only_while_the_queue_is_long(
    pool: WorkerPool[Worker], tmp_path: Path
) -> None:
    (tmp_path / "open-0").touch()
    while pool.num_ready < 2:
        run(pool, call("behind_gate", 0), call("behind_gate", 0))

    def held_with(num_gates: int) -> tuple[list[int], list[int]]:
        gates = [call("behind_gate", num_gates) for _ in range(num_gates)]
        for item in [call("echo", 0), *gates]:
            pool.submit(item)
        assert [item.value for item in pool.next_ended()] == [0]
        assert (pool.num_busy, pool.num_queued) == (2, num_gates - 2)
        assert pool.num_unfinished == num_gates
        held = sorted(pool._in_flight.slots_with(1)), sorted(pool._in_flight.slots_with(2))
        (tmp_path / f"open-{num_gates}").touch()
        assert [item.value for item in run(pool)] == [num_gates] * num_gates
        return held

    assert held_with(2) == ([0, 1], [])
    assert held_with(6) == ([], [0, 1])


@pytest.mark.parametrize(
    ("method", "charged"),
    [
        ("die_once", {"lost_on": [0]}),
        ("refuse_on_first_worker", {"raised_on": [0]}),
        ("hang_once", {"num_timeouts": 1}),
    ],
)
def test_a_call_that_waits_at_a_worker_that_fails_runs_next_and_is_not_charged(
    lone_pool: WorkerPool[Worker], tmp_path: Path, method: str, charged: dict[str, object]
) -> None:
    first, second = begin_to_wait(
        lone_pool,
        call("behind_gate", 1, method, timeout=2.0),
        *(call("echo", 2), call("echo", 3)),
    )
    (tmp_path / "open-1").touch()
    assert [item.value for item in run(lone_pool)] == [1, 2, 3]
    nothing = {"raised_on": [], "num_timeouts": 0, "lost_on": [], "num_lost_nodes": 0}
    assert {name: getattr(first, name) for name in nothing} == nothing | charged
    assert {name: getattr(second, name) for name in nothing} == nothing
    assert lone_pool.num_requeued == 1


def test_a_call_that_ends_workers_before_they_can_answer_is_blamed_in_the_end(
    lone_pool: WorkerPool[Worker], tmp_path: Path
) -> None:
    begin_to_wait(lone_pool, call("behind_gate", 1), call("always_die"), call("echo", 2))
    (tmp_path / "open-1").touch()
    first, fatal, other = run(lone_pool)
    assert (first.value, other.value, len(fatal.lost_on)) == (1, 2, 3)
    assert (fatal.error or "").startswith("lost its worker 3 times, most recently: ")


def test_a_worker_that_dies_of_its_second_call_loses_that_one_alone(
    lone_pool: WorkerPool[Worker], tmp_path: Path
) -> None:
    first, second = begin_to_wait(
        lone_pool, call("behind_gate", 1), call("behind_gate", 2, "die_once")
    )
    references = [item.reference for item in lone_pool._in_flight]
    (tmp_path / "open-1").touch()
    ray.wait(references, num_returns=1, timeout=60)
    (tmp_path / "open-2").touch()
    ray.wait(references, num_returns=2, timeout=60)  # both are known in the same turn
    assert [item.value for item in run(lone_pool)] == [1, 2]
    assert (first.lost_on, second.lost_on) == ([], [0])
