from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pytest

from fppmo_ray.service.pool.call import Call
from fppmo_ray.service.pool.in_flight import InFlight, TimeLimits


class Actor:
    """Remembers what is asked of it; its answers' references count up."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[object, ...]]] = []
        self.name = ""

    @property
    def score(self) -> Actor:
        return self

    def options(self, name: str) -> Actor:
        self.name = name
        return self

    def remote(self, *arguments: object) -> int:
        self.calls.append((self.name, arguments))
        return len(self.calls)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Its only number is the time."""
    now = [0.0]
    clock = SimpleNamespace(monotonic=lambda: now[0])
    monkeypatch.setattr("fppmo_ray.service.pool.call.time", clock)
    return now


def score_call(value: int) -> Call[Any, Any]:
    return Call(str(value), lambda worker: worker.score(value))


def in_flight_with(*values: int) -> InFlight:
    """One worker, in slot 3, that holds calls with these names; their references are 1, 2, ..."""
    in_flight, actor = InFlight(), Actor()
    in_flight.add_worker(3)
    for value in values:
        in_flight.send(score_call(value), 3, actor)
    return in_flight


def names(calls: Iterable[Call[Any, Any]]) -> list[str]:
    return [call.name for call in calls]


def test_calls_are_sent_to_the_worker_at_once_and_in_order() -> None:
    in_flight, actor = InFlight(), Actor()
    in_flight.add_worker(0)
    for value in (7, 8):
        in_flight.send(score_call(value), 0, actor)
    assert actor.calls == [("score", (7,)), ("score", (8,))]


def test_the_first_call_runs_and_the_others_wait() -> None:
    in_flight = in_flight_with(10, 20)
    in_flight.add_worker(4)
    [(slot, running)] = in_flight.running()
    assert (slot, running.name) == (3, "10")
    assert (in_flight.running_on(3), in_flight.running_on(4)) == (running, None)
    assert (in_flight.num_busy, in_flight.num_waiting) == (1, 1)
    assert [in_flight.slots_with(count) for count in (0, 1, 2)] == [[4], [], [3]]


def test_ended_calls_are_taken_out_in_the_order_of_sending() -> None:
    in_flight = in_flight_with(10, 20, 30)
    taken = [(slot, call.name) for slot, call in in_flight.take_ended({2, 1})]
    assert taken == [(3, "10"), (3, "20")]
    assert names(in_flight) == ["30"]


def test_an_answer_is_left_until_that_of_the_call_before_has_come() -> None:
    in_flight = in_flight_with(10, 20)
    assert list(in_flight.take_ended({2})) == []
    assert in_flight.num_waiting == 1


def test_no_ended_call_of_a_worker_is_taken_out_after_the_worker_was_removed() -> None:
    in_flight = in_flight_with(10, 20, 30)
    taken, left = [], []
    for slot, call in in_flight.take_ended({1, 2, 3}):
        taken.append(call.name)
        left = in_flight.remove_worker(slot)
    assert (taken, names(left)) == (["10"], ["20", "30"])
    assert [call.reference for call in left] == [None, None]


def test_only_running_calls_are_left_when_the_waiting_ones_are_taken_out() -> None:
    in_flight = in_flight_with(10, 20)
    waiting = in_flight.take_waiting()
    assert [(call.name, call.reference) for call in waiting] == [("20", None)]
    assert names(in_flight) == ["10"]


def test_a_call_runs_from_when_it_is_sent_to_an_idle_worker(clock: list[float]) -> None:
    in_flight = in_flight_with(10)
    clock[0] = 5.0
    [(_, running)] = in_flight.running()
    assert running.seconds() == 5.0


def test_a_call_that_waited_runs_from_when_it_is_first_seen_to_run(clock: list[float]) -> None:
    in_flight = in_flight_with(10, 20)
    clock[0] = 100.0
    list(in_flight.take_ended({1}))
    [(_, running)] = in_flight.running()
    assert running.began is None  # if it had ended as well, its time would be unknown
    assert running.seconds() == 0.0
    clock[0] = 103.0
    assert running.seconds() == 3.0


def test_a_given_limit_takes_precedence_over_the_learned_one() -> None:
    limits = TimeLimits()
    limits.learn("score", 100.0)
    assert limits.limit("score", 2.5) == 2.5


def test_until_a_call_of_a_kind_has_ended_a_call_may_run_for_a_day() -> None:
    limits = TimeLimits()
    limits.learn("score", 100.0)
    assert limits.limit("evaluate") == 86_400.0
    assert (limits.knows("score"), limits.knows("evaluate")) == (True, False)


def test_given_limits_hold_from_the_first_call_of_every_kind_on() -> None:
    limits = TimeLimits({"score": 7.0}, others=90.0)
    for _ in range(2):
        found = {kind: limits.limit(kind) for kind in ("score", "evaluate")}
        assert found == {"score": 7.0, "evaluate": 90.0}
        for kind in found:
            limits.learn(kind, 3600.0)
    assert limits.limit("score", 2.5) == 2.5


def test_the_learned_limit_is_ten_times_the_longest_call_but_one_and_five_minutes_at_least() -> (
    None
):
    limits = TimeLimits()
    limits.learn("score", 3.0)
    assert limits.limit("score") == 300.0
    for seconds in (90.0, 40.0, 60.0):
        limits.learn("score", seconds)
    assert limits.limit("score") == 600.0


def test_a_single_call_of_hours_does_not_let_others_hang_for_days() -> None:
    limits = TimeLimits()
    for seconds in (60.0, 7200.0, 50.0):
        limits.learn("score", seconds)
    assert limits.limit("score") == 600.0


def test_a_method_is_brief_while_its_last_call_took_seconds_whatever_came_before() -> None:
    limits = TimeLimits()
    assert not limits.is_brief("score")  # nothing is known
    for seconds, is_brief in ((60.0, False), (0.1, True), (10.0, True), (11.0, False)):
        limits.learn("score", seconds)
        assert limits.is_brief("score") is is_brief
    assert not limits.is_brief("train_epoch")
