"""Calls end once, whatever happens to the workers that run them."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
import ray
from ray.exceptions import OutOfMemoryError
from told_worker import SlotLast, Worker, call, run

from fppmo_ray.service.pool.call import Call
from fppmo_ray.service.pool.cluster import Demand
from fppmo_ray.service.pool.in_flight import TimeLimits
from fppmo_ray.service.pool.worker_pool import WorkerPool, worker_pool
from fppmo_ray.service.stopping import SearchStopped, StopRequest

pytestmark = pytest.mark.usefixtures("local_ray")


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
    assert ended.error == "RuntimeError('told_worker.OddError: 7 apples')"
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
