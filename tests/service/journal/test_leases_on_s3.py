"""The protocol once more at its seams, on a real S3 server and through whole run directories."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from example_facts import STARTED, numbered

from fppmo_ray.service.journal import run_directory
from fppmo_ray.service.journal.facts import Fact
from fppmo_ray.service.journal.run_directory import open_run, read_journal
from fppmo_ray.service.journal.storage import open_storage

BEFORE: list[Fact] = [STARTED, numbered(1)]


class Watched:
    """A storage that calls back ahead of every request."""

    def __init__(self, run_dir: str, before: Callable[[], None]) -> None:
        self._storage = open_storage(run_dir)
        self._before = before

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._storage, name)
        if not callable(attribute):
            return attribute

        def request(*arguments: Any) -> Any:
            self._before()
            return attribute(*arguments)

        return request


@contextmanager
def before_request(number: int, act: Callable[[], None]) -> Iterator[Callable[[], bool]]:
    """Act once, before the n-th request of whoever opens a run; tells if there was one."""
    counted, acted = itertools.count(), []

    def before() -> None:
        if next(counted) == number:
            acted.append(number)
            patch.undo()  # what acts is not watched
            act()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_directory, "open_storage", lambda run_dir: Watched(run_dir, before))
        yield lambda: bool(acted)


@pytest.fixture
def begun(s3_run_dir: Callable[[], str]) -> Callable[[], str]:
    """Makes run directories with two facts, whose driver is gone."""

    def make() -> str:
        run_dir = s3_run_dir()
        with open_run(run_dir, resume=False) as run:
            run.record(BEFORE)
        return run_dir

    return make


class Crash(Exception):
    """The machine is gone."""


def crash() -> None:
    raise Crash


def test_a_crash_before_any_request_of_opening_and_recording_loses_nothing(
    begun: Callable[[], str],
) -> None:
    for number in itertools.count():
        run_dir = begun()
        with before_request(number, crash) as has_crashed:
            try:
                with open_run(run_dir, resume=True) as run:
                    run.record([numbered(2)])
            except Crash:
                pass
        left = read_journal(run_dir)
        assert left in (BEFORE, [*BEFORE, numbered(2)])
        with open_run(run_dir, resume=True) as run:
            assert run.facts == left
            run.record([numbered(3)])
        assert read_journal(run_dir) == [*left, numbered(3)]
        if not has_crashed():
            break
    assert left == [*BEFORE, numbered(2)]
    assert number >= 10


def test_a_driver_that_comes_before_any_request_of_another_leaves_one_of_them(
    begun: Callable[[], str],
) -> None:
    for number in itertools.count():
        run_dir, used = begun(), list[Fact]()

        def come(run_dir: str = run_dir, used: list[Fact] = used) -> None:
            with open_run(run_dir, resume=True) as other:
                other.record([numbered(7)])
                used += other.facts

        stops = 0
        with before_request(number, come) as has_come:
            try:
                with open_run(run_dir, resume=True) as run:
                    run.record([numbered(8)])
                    used += run.facts
            except RuntimeError:  # another driver has taken over
                stops += 1
        journal = read_journal(run_dir)
        assert journal[:2] == BEFORE
        assert [fact for fact in used if fact not in journal] == []
        if not has_come():
            break
        assert numbered(7) in journal
        assert stops or numbered(8) in journal
    assert number >= 10


def test_missing_last_objects_are_as_if_they_had_never_been_written(
    begun: Callable[[], str],
) -> None:
    run_dir = begun()
    with open_run(run_dir, resume=True) as run:
        for number in range(2, 6):
            run.record([numbered(number)])
    storage = open_storage(run_dir)
    lease = max(storage.names("journal/claims"))
    for last in (4, 3, 2, 1):
        storage.delete(f"journal/{lease}/{last:06d}.jsonl")
        assert read_journal(run_dir) == [STARTED, *map(numbered, range(1, last + 1))]
    storage.delete(f"journal/{lease}/000000.jsonl")
    with open_run(run_dir, resume=True) as run:
        assert run.facts == BEFORE
