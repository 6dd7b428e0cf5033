from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.exceptions import OutOfMemoryError, RaySystemError

from fppmo_ray.service.pool.call import Call
from fppmo_ray.service.pool.cluster import Demand, explain_ray_errors
from fppmo_ray.service.pool.in_flight import TimeLimits
from fppmo_ray.service.pool.worker_group import WorkerInfo, worker_info
from fppmo_ray.service.pool.worker_pool import WorkerPool, worker_pool
from fppmo_ray.service.stopping import SearchStopped, StopRequest

# The workers' processes cannot import test modules.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

_MOST_SPARE = 3

pytestmark = pytest.mark.usefixtures("local_ray")


class OddError(Exception):
    """Cannot be made again from its message, which is how exceptions are pickled."""

    def __init__(self, count: int, what: str) -> None:
        super().__init__(f"{count} {what}")


class Worker:
    """Does as it is told, and leaves a trace of every start in a folder."""

    def __init__(self, slot: int, trace: Path) -> None:
        self.begin(slot, trace)

    def begin(self, slot: int, trace: Path) -> None:
        """Be a new worker."""
        self.__dict__.clear()
        self.slot = slot
        self.trace = trace

    def ready(self) -> WorkerInfo:
        return worker_info(self.slot)

    def echo(self, value: int) -> int:
        return value

    def refuse(self, value: int) -> int:
        self._visits(f"refuse-{self.slot}")
        raise ValueError(f"{value} is not to my taste")

    def refuse_oddly(self) -> None:
        raise OddError(7, "apples")

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

    def work_unless_broken(self, value: int) -> int:
        """The first process that is asked is broken for good."""
        if not hasattr(self, "is_broken"):
            self.is_broken = self._visits("broken") == 1
        time.sleep(0.01)
        if self.is_broken:
            raise ValueError("nothing works here any more")
        return value

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


class SlotLast:
    """Returns its constructor arguments."""

    def __init__(self, trace: Path, slot: int) -> None:
        self.trace = trace
        self.slot = slot

    def ready(self) -> WorkerInfo:
        return worker_info(self.slot)

    def process(self) -> int:
        return os.getpid()

    def arguments(self) -> tuple[Path, int]:
        return self.trace, self.slot


@pytest.fixture(scope="module")
def spare(local_ray: None) -> Iterator[list[Any]]:
    """Actors that earlier tests have left well, since the start of a process takes a second."""
    actors: list[Any] = []
    yield actors
    for actor in actors:
        ray.kill(actor)


@contextmanager
def pool_of(num_workers: int, trace: Path, spare: list[Any]) -> Iterator[WorkerPool[Worker]]:
    """A pool whose first workers are spare actors, where there are enough."""
    actor = ray.remote(num_cpus=0)(Worker)
    used = [spare.pop() for _ in range(num_workers)] if len(spare) >= num_workers else []

    def start(slot: int) -> Any:
        if not used:
            return actor.remote(slot, trace)
        used[-1].begin.remote(slot, trace)  # before ready(): calls keep their order
        return used.pop()

    pool: WorkerPool[Worker] = WorkerPool(start, num_workers)
    yield pool
    group = pool._group
    if not pool.num_unfinished:
        answers = {group.actor(slot).echo.remote(0): slot for slot in group.ready}
        for answer in ray.wait(list(answers), num_returns=len(answers), timeout=2)[0]:
            if len(spare) < _MOST_SPARE:
                spare.append(group._actors.pop(answers[answer]))
    pool.close()


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


def run(pool: WorkerPool[Any], *calls: Call[Any, Any]) -> list[Call[Any, Any]]:
    for item in calls:
        pool.submit(item)
    ended = []
    while pool.num_unfinished:
        ended += pool.next_ended()
    return ended


def call(method: str, *arguments: object, timeout: float | None = None) -> Call[Any, Any]:
    return Call(method, lambda worker: getattr(worker, method)(*arguments), timeout=timeout)


def test_every_call_ends_once_with_its_own_answer(pool: WorkerPool[Worker]) -> None:
    value_of = {call("echo", value): value for value in range(20)}
    ended = run(pool, *value_of)
    assert len(ended) == 20
    assert {item: item.result for item in ended} == value_of
    assert all(item.has_ended and item.kind == "echo" for item in ended)
    assert all(re.fullmatch(r"[01]@.*:\d+", item.worker) for item in ended)


def test_run_returns_the_answers_in_the_order_of_the_calls(pool: WorkerPool[Worker]) -> None:
    calls: list[Call[Worker, int]] = [
        Call(f"echo {value}", lambda worker, value=value: worker.echo(value=value))
        for value in range(5)
    ]
    assert pool.run(calls) == [0, 1, 2, 3, 4]


def test_run_raises_the_error_of_a_call_that_failed(pool: WorkerPool[Worker]) -> None:
    with pytest.raises(RuntimeError, match=r"^refuse failed: ValueError\('7 is not to my taste"):
        pool.run([call("refuse", 7)])


def test_a_call_cannot_be_submitted_twice(pool: WorkerPool[Worker]) -> None:
    once = call("echo", 1)
    run(pool, once)
    with pytest.raises(ValueError, match=r"^echo was submitted before; make a new Call"):
        pool.submit(once)


def test_a_call_submitted_first_runs_before_those_in_the_queue(
    lone_pool: WorkerPool[Worker],
) -> None:
    for value in (1, 2):
        lone_pool.submit(call("echo", value))
    lone_pool.submit(call("echo", 0), first=True)
    assert [item.value for item in run(lone_pool)] == [0, 1, 2]


def test_a_pool_of_a_class_gives_every_worker_the_arguments_and_its_slot(tmp_path: Path) -> None:
    with worker_pool(SlotLast, tmp_path, num_workers=2, demand=Demand()) as pool:
        while pool.num_ready < 2:
            run(pool, call("process"))
        calls = [call("arguments") for _ in range(8)]
        answers = {item.worker[0]: item.value for item in run(pool, *calls)}
    assert answers.items() <= {"0": (tmp_path, 0), "1": (tmp_path, 1)}.items()
    assert answers


def test_while_the_pool_is_away_its_workers_free_what_they_held(tmp_path: Path) -> None:
    actor = ray.remote(num_cpus=2)(Worker)  # all there are
    pool: WorkerPool[Worker] = WorkerPool(lambda slot: actor.remote(slot, tmp_path), 1)
    pool.run([call("echo", 0)])
    with pool.away():
        alone = ray.remote(num_cpus=2)(Worker).remote(0, tmp_path)
        assert ray.get(alone.echo.remote(1), timeout=60) == 1
        ray.kill(alone)
    assert pool.run([call("echo", 2)]) == [2]
    pool.close()


def test_calls_are_named_by_their_kind_for_the_dashboard(pool: WorkerPool[Worker]) -> None:
    assert [item.value for item in run(pool, call("task_name"))] == ["task name"]


def test_a_call_that_raises_on_two_workers_fails_with_its_error(
    pool: WorkerPool[Worker], tmp_path: Path
) -> None:
    [ended] = run(pool, call("refuse", 7))
    assert ended.error == "ValueError('7 is not to my taste')"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["refuse-0", "refuse-1"]


def test_an_error_that_cannot_be_unpickled_is_an_error_of_the_call(
    pool: WorkerPool[Worker],
) -> None:
    [ended] = run(pool, call("refuse_oddly"))
    assert ended.error == "RuntimeError('test_pool.OddError: 7 apples')"
    assert (len(ended.raised_on), ended.lost_on) == (2, [])


def test_a_call_that_raises_once_gets_another_attempt(pool: WorkerPool[Worker]) -> None:
    [ended] = run(pool, call("refuse_on_first_worker", 7))
    assert (ended.value, ended.error) == (7, None)


def test_a_call_of_a_worker_that_died_runs_on_another(pool: WorkerPool[Worker]) -> None:
    ended = run(pool, call("die_once", 3), *(call("echo", value) for value in range(4)))
    assert sorted(item.value for item in ended) == [0, 1, 2, 3, 3]
    assert all(item.error is None for item in ended)


def test_a_call_that_kills_every_worker_fails_after_three_losses_and_others_go_on(
    pool: WorkerPool[Worker],
) -> None:
    run(pool, call("echo", 0), call("echo", 0))
    fatal, others = call("always_die"), [call("echo", value) for value in range(4)]
    run(pool, fatal, *others)
    assert [item.result for item in others] == [0, 1, 2, 3]
    assert len(fatal.lost_on) == 3
    assert {*fatal.lost_on} == {0, 1}  # on different workers as far as there are any
    assert fatal.error is not None
    assert re.match(r"lost its worker 3 times, most recently: .*; give each worker", fatal.error)


def test_losses_of_other_calls_count_as_chance_unless_a_call_was_blamed_for_them(
    pool: WorkerPool[Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def note(num_lost: int, num_ended: int) -> int:
        seen.append((num_lost, num_ended))
        return 2

    monkeypatch.setattr("fppmo_ray.service.pool.worker_pool.max_losses", note)
    run(pool, call("die_once", 3))
    assert run(pool, call("always_die"))[0].error is not None
    run(pool, call("always_die"))
    assert seen == [(0, 0), (1, 1), (1, 1), (1, 2), (1, 2)]


def test_a_call_past_its_timeout_runs_on_another_worker(pool: WorkerPool[Worker]) -> None:
    run(pool, call("echo", 0), call("echo", 0))  # both workers are up
    [ended] = run(pool, call("hang_once", 3, timeout=1.0))
    assert (ended.value, ended.error) == (3, None)


def test_time_in_which_the_driver_stood_still_is_no_time_of_a_call(
    pool: WorkerPool[Worker], tmp_path: Path
) -> None:
    held = call("behind_gate", 1, timeout=30.0)
    pool.submit(held)
    while held.began is None or not (tmp_path / "begun-1").exists():
        pool._dispatch()
        pool._wait()
    held.began -= 100  # as the clock shows it after a pause of 100 s
    pool._looked_at -= 100
    pool._look_after_running()
    assert 0 <= held.seconds() < 30
    (tmp_path / "open-1").touch()
    assert [item.value for item in run(pool)] == [1]
    assert (held.num_timeouts, pool.num_requeued) == (0, 0)


def test_a_call_that_times_out_twice_fails(pool: WorkerPool[Worker]) -> None:
    run(pool, call("echo", 0), call("echo", 0))
    [ended] = run(pool, call("hang", timeout=0.5))
    assert ended.error == "timed out twice after 0.5 s"


def test_a_limit_given_to_the_pool_holds_for_the_first_call_of_a_kind(tmp_path: Path) -> None:
    actor = ray.remote(num_cpus=0)(Worker)
    pool: WorkerPool[Worker] = WorkerPool(
        lambda slot: actor.remote(slot, tmp_path), 1, limits=TimeLimits({"hang_once": 0.5})
    )
    [ended] = run(pool, call("hang_once", 3))
    pool.close()
    assert (ended.value, ended.num_timeouts) == (3, 1)


def test_a_call_that_takes_far_longer_than_any_before_is_taken_from_its_worker(
    pool: WorkerPool[Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fppmo_ray.service.pool.in_flight._AT_LEAST_S", 0.5)
    run(pool, call("hang_the_second_time", 1))
    [ended] = run(pool, call("hang_the_second_time", 2))
    assert (ended.value, ended.error, pool.num_requeued) == (2, None, 1)


def test_a_first_call_that_does_not_answer_is_named(
    pool: WorkerPool[Worker], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("fppmo_ray.service.pool.worker_pool._LOOK_UP_S", 0.05)
    monkeypatch.setattr("fppmo_ray.service.pool.worker_pool._SILENCE_S", 0.0)
    run(pool, call("nap", 1))
    [message] = [record.getMessage() for record in caplog.records]
    assert re.fullmatch(r"nap has run for 0 min on worker [01]@.* without an answer; .*", message)


def test_a_suspended_worker_is_replaced_and_gives_its_cpus_back(tmp_path: Path) -> None:
    actor = ray.remote(num_cpus=2)(Worker)  # all there are
    pool: WorkerPool[Worker] = WorkerPool(lambda slot: actor.remote(slot, tmp_path), 1)
    run(pool, call("echo", 0))
    [ended] = run(pool, call("suspend_once", 3, timeout=1.0))
    pool.close()
    assert (ended.value, ended.error) == (3, None)


def test_after_a_stop_running_calls_end_and_no_others_begin(
    caplog: pytest.LogCaptureFixture,
) -> None:
    stop = StopRequest(how_far=lambda: "2 of 5 done")
    actor = ray.remote(num_cpus=0)(Worker)
    pool: WorkerPool[Worker] = WorkerPool(lambda slot: actor.remote(slot, Path()), 1, stop=stop)
    for value in range(5):
        pool.submit(call("nap", value))
    values = [item.value for item in pool.next_ended()]  # and the next one is under way
    assert pool._in_flight.num_waiting == 1
    stop.is_made = True
    values += [item.value for item in pool.next_ended()]
    with pytest.raises(SearchStopped, match=r"^stopped on request: 2 of 5 done; go on with --res"):
        pool.next_ended()
    pool.close()
    assert values == [0, 1]
    assert pool.num_queued == 3
    assert [record.getMessage() for record in caplog.records] == [
        "stopping once the running calls have ended (1); a second signal ends at once"
    ]


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


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


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


def processes_of(pool: WorkerPool[Worker]) -> set[int]:
    """The processes of all workers, once they are ready."""
    while pool.num_ready < pool.num_workers:
        run(pool, call("process"))
    return {info.pid for info in pool._group.ready.values()}


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


def test_calls_that_ended_in_time_count_even_if_the_driver_looks_at_them_late(
    pool: WorkerPool[Worker],
) -> None:
    run(pool, call("echo", 0), call("echo", 0))
    for value in range(4):
        pool.submit(call("nap", value, timeout=1.0))
    values = [item.value for item in pool.next_ended()]
    running = [item.reference for item in pool._in_flight]
    ray.wait(running, num_returns=len(running), timeout=60)
    time.sleep(1.0)  # a busy driver: now all are past their time
    later = [item.value for item in pool.next_ended()]
    assert len(later) == len(running)
    values += later + [item.value for item in run(pool)]
    assert sorted(values) == [0, 1, 2, 3]
    assert pool.num_requeued == 0


def test_a_worker_out_of_memory_is_a_loss(
    pool: WorkerPool[Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    get, losses = ray.get, [OutOfMemoryError("worker killed by the memory monitor")]

    def get_after_loss(reference: object) -> object:
        value = get(reference)  # type: ignore[call-overload]
        if value == 5 and losses:
            raise losses.pop()
        return value

    monkeypatch.setattr(ray, "get", get_after_loss)
    [ended] = run(pool, call("echo", 5))
    assert (ended.value, ended.error, losses) == (5, None, [])


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
