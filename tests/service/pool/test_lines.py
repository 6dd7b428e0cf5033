from __future__ import annotations

from types import SimpleNamespace

import pytest

from fppmo_ray.service.pool.lines import Lines
from fppmo_ray.service.pool.work import Attempts, Work


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
    monkeypatch.setattr("fppmo_ray.service.pool.lines.time", clock)
    return now


def attempts(value: int) -> Attempts:
    return Attempts(Work(name=str(value), method="score", arguments=(value,)))


def lines_of(*values: int) -> Lines:
    """One worker, in slot 3, that holds these; their references are 1, 2, ..."""
    lines, actor = Lines(), Actor()
    lines.open(3)
    for value in values:
        lines.call(3, actor, attempts(value))
    return lines


def names(taken: list[Attempts]) -> list[str]:
    return [item.work.name for item in taken]


def test_a_worker_is_called_at_once_by_the_name_of_the_method() -> None:
    lines, actor = Lines(), Actor()
    lines.open(0)
    for value in (7, 8):
        lines.call(0, actor, attempts(value))
    assert actor.calls == [("score", (7,)), ("score", (8,))]


def test_the_first_piece_runs_and_the_others_wait() -> None:
    lines = lines_of(10, 20)
    lines.open(4)
    [(slot, first)] = lines.running()
    assert (slot, first.work.name) == (3, "10")
    assert (lines.num_busy, lines.num_waiting) == (1, 1)
    assert [lines.slots_with(count) for count in (0, 1, 2)] == [[4], [], [3]]


def test_what_has_ended_is_taken_out_in_the_order_of_the_line() -> None:
    lines = lines_of(10, 20, 30)
    taken = [(slot, held.work.name) for slot, held in lines.take_ended({2, 1})]
    assert taken == [(3, "10"), (3, "20")]
    assert [held.work.name for held in lines] == ["30"]


def test_an_answer_behind_one_that_is_still_to_come_is_left() -> None:
    lines = lines_of(10, 20)
    assert list(lines.take_ended({2})) == []
    assert lines.num_waiting == 1


def test_once_a_worker_is_gone_nothing_more_is_taken_out_of_its_line() -> None:
    lines = lines_of(10, 20, 30)
    taken, left = [], []
    for slot, held in lines.take_ended({1, 2, 3}):
        taken.append(held.work.name)
        left = names(lines.close(slot))
    assert (taken, left) == (["10"], ["20", "30"])


def test_only_what_runs_is_left_when_the_rest_is_taken_out() -> None:
    lines = lines_of(10, 20)
    assert names(lines.take_waiting()) == ["20"]
    assert [held.work.name for held in lines] == ["10"]


def test_work_runs_from_when_it_is_sent_to_an_idle_worker(clock: list[float]) -> None:
    lines = lines_of(10)
    clock[0] = 5.0
    [(_, first)] = lines.running()
    assert first.seconds() == 5.0


def test_work_that_waited_runs_from_when_it_is_first_seen_to(clock: list[float]) -> None:
    lines = lines_of(10, 20)
    clock[0] = 100.0
    list(lines.take_ended({1}))
    [(_, first)] = lines.running()
    assert first.began is None  # had it ended as well, nobody would know how long it took
    assert first.seconds() == 0.0
    clock[0] = 103.0
    assert first.seconds() == 3.0
