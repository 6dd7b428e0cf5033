from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import ray
from ray.exceptions import OutOfMemoryError, RaySystemError

from fppmo_ray.service.pool.place import Place, here
from fppmo_ray.service.pool.ray_errors import ray_errors_said
from fppmo_ray.service.pool.work import Attempts, Outcome, Work
from fppmo_ray.service.pool.worker_pool import WorkerPool
from fppmo_ray.service.stopping import SearchStopped, StopRequest

# The workers' processes cannot import test modules.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

pytestmark = pytest.mark.usefixtures("local_ray")


class Worker:
    """Does as it is told, and leaves a trace of every start in a folder."""

    def __init__(self, slot: int, trace: Path) -> None:
        self.slot = slot
        self.trace = trace

    def ready(self) -> Place:
        return here(self.slot)

    def echo(self, value: int) -> int:
        return value

    def refuse(self, value: int) -> int:
        self._visits(f"refuse-{self.slot}")
        raise ValueError(f"{value} is not to my taste")

    def refuse_on_first_worker(self, value: int) -> int:
        if self._visits("refuse-once") == 1:
            raise ValueError("not today")
        return value

    def die_once(self, value: int) -> int:
        if self._visits("die") == 1:
            os._exit(1)
        return value

    def always_die(self) -> None:
        os._exit(1)

    def hang_once(self, value: int) -> int:
        if self._visits("hang") == 1:
            time.sleep(60)
        return value

    def hang_the_second_time(self, value: int) -> int:
        if self._visits("hang-second") == 2:
            time.sleep(60)
        return value

    def suspend_once(self, value: int) -> int:
        if self._visits("suspend") == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        return value

    def nap(self, value: int) -> int:
        time.sleep(0.3)
        return value

    def behind_gate(self, value: int, method: str = "echo") -> object:
        """Leave a file, and go on once there is another one."""
        (self.trace / f"begun-{value}").touch()
        while not (self.trace / f"open-{value}").exists():
            time.sleep(0.01)
        return getattr(self, method)(value)

    def task_name(self) -> str | None:
        name: str | None = ray.get_runtime_context().get_task_name()
        return name

    def process(self) -> int:
        time.sleep(0.02)
        return os.getpid()

    def hang(self) -> None:
        time.sleep(60)

    def _visits(self, name: str) -> int:
        with (self.trace / name).open("a") as file:
            file.write("x")
            return file.tell()


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[WorkerPool]:
    actor = ray.remote(num_cpus=0)(Worker)
    pool = WorkerPool(lambda slot: actor.remote(slot, tmp_path), 2)
    yield pool
    pool.close()


@pytest.fixture
def lone_pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WorkerPool]:
    """One worker, behind whose work other work waits, however long that is."""
    monkeypatch.setattr("fppmo_ray.service.pool.time_limits.TimeLimits.is_brief", lambda *_: True)
    actor = ray.remote(num_cpus=0)(Worker)
    pool = WorkerPool(lambda slot: actor.remote(slot, tmp_path), 1)
    yield pool
    pool.close()


def run(pool: WorkerPool, *works: Work) -> list[Outcome]:
    for work in works:
        pool.submit(work)
    outcomes = []
    while pool.num_unfinished:
        outcomes += pool.next_outcomes()
    return outcomes


def work(method: str, *arguments: object, timeout: float | None = None, tag: object = None) -> Work:
    return Work(name=method, method=method, arguments=arguments, timeout=timeout, tag=tag)


def test_every_piece_of_work_ends_once_with_its_own_value(pool: WorkerPool) -> None:
    outcomes = run(pool, *(work("echo", value, tag=value) for value in range(20)))
    assert sorted((item.work.tag, item.value) for item in outcomes) == [
        (value, value) for value in range(20)
    ]


def test_calls_are_named_by_their_kind_for_the_dashboard(pool: WorkerPool) -> None:
    assert [item.value for item in run(pool, work("task_name"))] == ["task name"]


def test_work_that_raises_on_two_workers_fails_with_its_error(
    pool: WorkerPool, tmp_path: Path
) -> None:
    [outcome] = run(pool, work("refuse", 7))
    assert outcome.error == "ValueError('7 is not to my taste')"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["refuse-0", "refuse-1"]


def test_work_that_raises_once_gets_its_second_chance(pool: WorkerPool) -> None:
    [outcome] = run(pool, work("refuse_on_first_worker", 7))
    assert (outcome.value, outcome.error) == (7, None)


def test_work_of_a_worker_that_died_is_done_by_another(pool: WorkerPool) -> None:
    outcomes = run(pool, work("die_once", 3), *(work("echo", value) for value in range(4)))
    assert sorted(item.value for item in outcomes) == [0, 1, 2, 3, 3]
    assert all(item.error is None for item in outcomes)


def test_work_that_kills_every_worker_stops_the_run(pool: WorkerPool) -> None:
    pool.submit(work("always_die"))
    with pytest.raises(RuntimeError, match="always_die has lost its worker 5 times"):
        pool.next_outcomes()


def test_work_past_its_time_is_done_by_another_worker(pool: WorkerPool) -> None:
    run(pool, work("echo", 0), work("echo", 0))  # both workers are up
    [outcome] = run(pool, work("hang_once", 3, timeout=1.0))
    assert (outcome.value, outcome.error) == (3, None)


def test_work_that_times_out_twice_fails(pool: WorkerPool) -> None:
    run(pool, work("echo", 0), work("echo", 0))
    [outcome] = run(pool, work("hang", timeout=0.5))
    assert outcome.error == "timed out twice after 0.5 s"


def test_a_call_that_takes_far_longer_than_any_before_is_taken_from_its_worker(
    pool: WorkerPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fppmo_ray.service.pool.time_limits._AT_LEAST_S", 0.5)
    run(pool, work("hang_the_second_time", 1))
    [outcome] = run(pool, work("hang_the_second_time", 2))
    assert (outcome.value, outcome.error, pool.num_requeued) == (2, None, 1)


def test_a_first_call_that_does_not_answer_is_named(
    pool: WorkerPool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("fppmo_ray.service.pool.worker_pool._LOOK_UP_S", 0.05)
    monkeypatch.setattr("fppmo_ray.service.pool.worker_pool._SILENCE_S", 0.0)
    run(pool, work("nap", 1))
    [message] = [record.getMessage() for record in caplog.records]
    assert re.fullmatch(r"nap has run for 0 min on worker [01]@.* without an answer, .*", message)


def test_a_suspended_worker_is_replaced_and_gives_its_cpus_back(tmp_path: Path) -> None:
    actor = ray.remote(num_cpus=2)(Worker)  # all there are
    pool = WorkerPool(lambda slot: actor.remote(slot, tmp_path), 1)
    run(pool, work("echo", 0))
    [outcome] = run(pool, work("suspend_once", 3, timeout=1.0))
    pool.close()
    assert (outcome.value, outcome.error) == (3, None)


def test_a_stop_lets_what_runs_end_and_begins_nothing_more(
    caplog: pytest.LogCaptureFixture,
) -> None:
    stop = StopRequest(how_far=lambda: "2 of 5 done")
    actor = ray.remote(num_cpus=0)(Worker)
    pool = WorkerPool(lambda slot: actor.remote(slot, Path()), 1, stop=stop)
    for value in range(5):
        pool.submit(work("nap", value))
    values = [item.value for item in pool.next_outcomes()]  # and the next one is under way
    assert pool._lines.num_waiting == 1
    stop.is_made = True
    values += [item.value for item in pool.next_outcomes()]
    with pytest.raises(SearchStopped, match=r"^stopped on request: 2 of 5 done; go on with --res"):
        pool.next_outcomes()
    pool.close()
    assert values == [0, 1]
    assert pool.num_queued == 3
    assert [record.getMessage() for record in caplog.records] == [
        "stopping once what runs has ended (1); a second signal ends at once"
    ]


def begin_to_wait(pool: WorkerPool, first: Work, second: Work, *others: Work) -> list[Attempts]:
    """Let a worker hold two pieces of work, with others in the queue."""
    for item in (work("echo", 0), first, second, *others):
        pool.submit(item)
    assert [item.value for item in pool.next_outcomes()] == [0]
    assert [held.work for held in pool._lines] == [first, second]
    return [held.attempts for held in pool._lines]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_worker_begins_its_next_piece_while_the_driver_is_away(
    lone_pool: WorkerPool, tmp_path: Path
) -> None:
    begin_to_wait(lone_pool, work("behind_gate", 1), work("behind_gate", 2))
    wait_until((tmp_path / "begun-1").exists)
    assert not (tmp_path / "begun-2").exists()
    (tmp_path / "open-1").touch()
    wait_until((tmp_path / "begun-2").exists)
    (tmp_path / "open-2").touch()
    assert [item.value for item in run(lone_pool)] == [1, 2]


def test_what_began_before_a_stop_was_heard_is_finished_too(
    lone_pool: WorkerPool, tmp_path: Path
) -> None:
    begin_to_wait(lone_pool, work("behind_gate", 1), work("behind_gate", 2))
    (tmp_path / "open-1").touch()
    wait_until((tmp_path / "begun-2").exists)  # the driver was away
    [first, _] = lone_pool._lines
    assert ray.wait([first.reference], timeout=60)[0]  # its answer has come, which may take a while
    lone_pool.stop.is_made = True
    (tmp_path / "open-2").touch()
    assert [item.value for item in run(lone_pool)] == [1, 2]


def test_work_goes_to_idle_workers_first_and_waits_only_where_there_is_plenty(
    pool: WorkerPool, tmp_path: Path
) -> None:
    (tmp_path / "open-0").touch()
    while pool.num_ready < 2:
        run(pool, work("behind_gate", 0), work("behind_gate", 0))

    def held_with(num_gates: int) -> tuple[list[int], list[int]]:
        gates = [work("behind_gate", num_gates, tag=num_gates)] * num_gates
        for item in [work("echo", 0), *gates]:
            pool.submit(item)
        assert [item.value for item in pool.next_outcomes()] == [0]
        assert (pool.num_busy, pool.num_queued) == (2, num_gates - 2)
        assert (pool.num_unfinished, pool.holds(num_gates)) == (num_gates, True)
        held = sorted(pool._lines.slots_with(1)), sorted(pool._lines.slots_with(2))
        (tmp_path / f"open-{num_gates}").touch()
        assert [item.value for item in run(pool)] == [num_gates] * num_gates
        return held

    assert held_with(2) == ([0, 1], [])
    assert held_with(6) == ([], [0, 1])


@pytest.mark.parametrize(
    ("method", "charged"),
    [
        ("die_once", {"lost_workers": 1}),
        ("refuse_on_first_worker", {"raised_on": [0]}),
        ("hang_once", {"timeouts": 1}),
    ],
)
def test_work_that_waits_at_a_worker_that_fails_is_done_next_and_not_charged(
    lone_pool: WorkerPool, tmp_path: Path, method: str, charged: dict[str, object]
) -> None:
    first, second = begin_to_wait(
        lone_pool,
        work("behind_gate", 1, method, timeout=2.0),
        *(work("echo", 2), work("echo", 3)),
    )
    (tmp_path / "open-1").touch()
    assert [item.value for item in run(lone_pool)] == [1, 2, 3]
    assert asdict(first) == asdict(Attempts(first.work)) | charged
    assert asdict(second) == asdict(Attempts(second.work))
    assert lone_pool.num_requeued == 1


def test_work_that_ends_workers_before_they_can_answer_is_blamed_in_the_end(
    lone_pool: WorkerPool, tmp_path: Path
) -> None:
    begin_to_wait(lone_pool, work("behind_gate", 1), work("always_die"), work("echo", 2))
    (tmp_path / "open-1").touch()
    with pytest.raises(RuntimeError, match="always_die has lost its worker 5 times"):
        run(lone_pool)


def test_a_worker_that_dies_of_its_second_piece_loses_that_one_alone(
    lone_pool: WorkerPool, tmp_path: Path
) -> None:
    first, second = begin_to_wait(
        lone_pool, work("behind_gate", 1), work("behind_gate", 2, "die_once")
    )
    references = [held.reference for held in lone_pool._lines]
    (tmp_path / "open-1").touch()
    ray.wait(references, num_returns=1, timeout=60)
    (tmp_path / "open-2").touch()
    ray.wait(references, num_returns=2, timeout=60)  # both are known in the same turn
    assert [item.value for item in run(lone_pool)] == [1, 2]
    assert (first.lost_workers, second.lost_workers) == (0, 1)


def test_a_worker_that_raised_is_replaced_so_that_its_fault_stays_its_own(
    pool: WorkerPool,
) -> None:
    processes = {item.value for item in run(pool, *(work("process") for _ in range(20)))}
    run(pool, work("refuse", 7))
    later = {item.value for item in run(pool, *(work("process") for _ in range(20)))}
    assert processes & later == set()


def test_what_ended_in_time_counts_even_if_it_is_looked_at_late_and_comes_at_once(
    pool: WorkerPool,
) -> None:
    run(pool, work("echo", 0), work("echo", 0))
    for value in range(4):
        pool.submit(work("nap", value, timeout=1.0))
    values = [item.value for item in pool.next_outcomes()]
    running = [held.reference for held in pool._lines]
    ray.wait(running, num_returns=len(running), timeout=60)
    time.sleep(1.0)  # a busy driver: now all are past their time
    later = [item.value for item in pool.next_outcomes()]
    assert len(later) == len(running)
    values += later + [item.value for item in run(pool)]
    assert sorted(values) == [0, 1, 2, 3]
    assert pool.num_requeued == 0


def test_a_worker_out_of_memory_is_a_loss(
    pool: WorkerPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    get, losses = ray.get, [OutOfMemoryError("worker killed by the memory monitor")]

    def get_after_loss(reference: object) -> object:
        value = get(reference)  # type: ignore[call-overload]
        if value == 5 and losses:
            raise losses.pop()
        return value

    monkeypatch.setattr(ray, "get", get_after_loss)
    [outcome] = run(pool, work("echo", 5))
    assert (outcome.value, outcome.error, losses) == (5, None, [])


def test_work_of_one_name_and_different_arrays_is_told_apart() -> None:
    masks = np.array([True, False]), np.array([False, True])
    first, second = (Attempts(work("echo", mask)) for mask in masks)
    queue = deque([first, second])
    queue.remove(second)
    assert queue[0] is first


def test_a_cluster_that_refuses_to_end_workers_does_not_hide_the_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    actor = ray.remote(num_cpus=0)(Worker)
    pool = WorkerPool(lambda slot: actor.remote(slot, tmp_path), 2)
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
        pytest.raises(RuntimeError, match=r"^Ray refused the driver: .*creation cancelled.*--res"),
        ray_errors_said(),
    ):
        raise RaySystemError("Actor creation cancelled")


class Broken:
    """Cannot be constructed in the slots it is told."""

    def __init__(self, slot: int, broken_slots: set[int]) -> None:
        self.slot = slot
        if slot in broken_slots:
            raise OSError("no such device")

    def ready(self) -> Place:
        return here(self.slot)

    def echo(self, value: int) -> int:
        return value


def test_workers_that_cannot_start_stop_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fppmo_ray.service.pool.slots._MAX_START_FAILURES", 2)
    actor = ray.remote(num_cpus=0)(Broken)
    pool = WorkerPool(lambda slot: actor.remote(slot, {0, 1}), 2)
    pool.submit(work("echo", 1))
    with pytest.raises(RuntimeError, match=r"^no worker can be started: OSError: no such device$"):
        pool.next_outcomes()


class Fatal:
    """Takes its process down while it starts, as a driver of a device may."""

    def ready(self) -> Place:
        os._exit(1)


def test_workers_whose_processes_die_at_their_start_stop_the_run_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fppmo_ray.service.pool.slots._MAX_START_LOSSES", 2)
    actor = ray.remote(num_cpus=0)(Fatal)
    pool = WorkerPool(lambda _: actor.remote(), 1)
    pool.submit(work("echo", 1))
    with pytest.raises(RuntimeError, match=r"^no worker can be started: "):
        pool.next_outcomes()


def test_a_slot_that_cannot_start_does_not_stop_the_others() -> None:
    actor = ray.remote(num_cpus=0)(Broken)
    pool = WorkerPool(lambda slot: actor.remote(slot, {0}), 2)
    assert [item.value for item in run(pool, work("echo", 1), work("echo", 2))] == [1, 2]
    assert pool.num_ready == 1
    pool.close()
