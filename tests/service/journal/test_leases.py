"""The protocol of drivers that share an object store, in every order of their requests."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from interleaving import MemoryStorage, every_order, interleave

from fppmo_ray.service.journal import writers
from fppmo_ray.service.journal.writers import LeaseJournal, open_lease, read_leases

BEFORE = [b"before-0\n", b"before-1\n"]


@dataclass
class Driver:
    """Opens, records a few lines, and keeps what it may use."""

    name: str
    num_records: int
    journal: LeaseJournal | None = None
    used: list[bytes] = field(default_factory=list)
    was_stopped: bool = False

    def __call__(self, storage: MemoryStorage) -> None:
        self.open(storage)
        self.record()

    def open(self, storage: MemoryStorage) -> None:
        try:
            self.journal, lines = open_lease(storage)
            self.used = lines.splitlines(keepends=True)
        except RuntimeError as stop:
            self.stop(stop)

    def record(self) -> None:
        if self.journal is None:
            return
        try:
            for number in range(self.num_records):
                line = f"{self.name}-{number}\n".encode()
                self.journal.append(line)
                self.used.append(line)
        except RuntimeError as stop:
            self.stop(stop)

    def stop(self, reason: RuntimeError) -> None:
        assert "another driver has taken over the search in memory://run" in str(reason)
        self.was_stopped = True


@pytest.fixture(params=["rising", "falling"])
def _suffixes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The random part of tokens, such that a later claim is the higher or the lower one."""
    counted = itertools.count() if request.param == "rising" else itertools.count(10**6, -1)
    monkeypatch.setattr(writers.secrets, "token_hex", lambda size: f"{next(counted):012d}")


def begun() -> dict[str, bytes]:
    """A store with a lease of two facts, whose driver is gone."""
    objects: dict[str, bytes] = {}
    journal, _ = open_lease(MemoryStorage(objects))
    for line in BEFORE:
        journal.append(line)
    return objects


def lines_in(objects: dict[str, bytes]) -> list[bytes]:
    lines = read_leases(MemoryStorage(objects))
    assert lines is not None
    return lines.splitlines(keepends=True)


def check(objects: dict[str, bytes], drivers: list[Driver]) -> None:
    """Nothing used is lost or doubled, and exactly one driver can go on, knowing all there is."""
    journal = lines_in(objects)
    assert len(set(journal)) == len(journal)
    assert journal[:2] == BEFORE
    for driver in drivers:
        assert [line for line in journal if line in driver.used] == driver.used
    [survivor] = [driver for driver in drivers if not driver.was_stopped and can_go_on(driver)]
    assert survivor.used == journal


def can_go_on(driver: Driver) -> bool:
    assert driver.journal is not None
    try:
        driver.journal.require_held()
    except RuntimeError:
        return False
    return True


@pytest.mark.usefixtures("_suffixes")
def test_two_drivers_that_open_at_once_leave_one_in_every_order() -> None:
    num_orders = 0
    for choose in every_order():
        objects, drivers = begun(), [Driver("a", 1), Driver("b", 1)]
        interleave(drivers, objects, choose)
        check(objects, drivers)
        num_orders += 1
    assert num_orders > 1000


@pytest.mark.usefixtures("_suffixes")
def test_a_driver_that_opens_beside_one_that_records_loses_nothing_in_any_order() -> None:
    num_orders = 0
    for choose in every_order():
        objects, old, new = begun(), Driver("old", 3), Driver("new", 1)
        held = MemoryStorage(objects)
        old.open(held)

        def go_on(turns: MemoryStorage, old: Driver = old, held: MemoryStorage = held) -> None:
            held.before = turns.before  # from here on it waits too
            old.record()

        interleave([go_on, new], objects, choose)
        check(objects, [old, new])
        assert not new.was_stopped
        num_orders += 1
    assert num_orders > 100


@pytest.mark.usefixtures("_suffixes")
def test_three_drivers_that_open_and_record_leave_one_in_any_order() -> None:
    choice = random.Random(20261122)
    for _ in range(300):
        objects, drivers = begun(), [Driver(name, 3) for name in "abc"]
        interleave(drivers, objects, choice.randrange)
        check(objects, drivers)


class Crash(Exception):
    """The machine is gone."""


def crashing(objects: dict[str, bytes], num_requests: int) -> MemoryStorage:
    """The store as seen by a driver that dies after so many requests."""
    left = num_requests

    def count(request: str) -> None:
        nonlocal left
        if not left:
            raise Crash
        left -= 1

    return MemoryStorage(objects, count)


def requests_of(act: Callable[[MemoryStorage], object]) -> int:
    count = 0

    def more(request: str) -> None:
        nonlocal count
        count += 1

    act(MemoryStorage(begun(), more))
    return count


def test_a_driver_that_dies_anywhere_in_opening_costs_nothing() -> None:
    for num_requests in range(requests_of(open_lease)):
        objects = begun()
        with pytest.raises(Crash):
            open_lease(crashing(objects, num_requests))
        assert lines_in(objects) == BEFORE
        heir = Driver("heir", 1)
        heir(MemoryStorage(objects))
        assert lines_in(objects) == [*BEFORE, b"heir-0\n"]


def test_a_claim_without_a_lease_still_ends_the_driver_before_it() -> None:
    objects, old = begun(), Driver("old", 1)
    old.open(MemoryStorage(objects))
    with pytest.raises(Crash):
        open_lease(crashing(objects, 2))  # one listing, and the claim
    old.record()
    assert old.was_stopped
    assert old.used == BEFORE
    assert lines_in(objects)[:2] == BEFORE


def test_a_first_object_that_is_not_whole_does_not_count() -> None:
    objects, heir = begun(), Driver("heir", 1)
    heir(MemoryStorage(objects))
    [first] = [name for name in objects if name.endswith("000000.jsonl") and "/000002-" in name]
    whole = objects[first]
    for length in range(len(whole)):
        objects[first] = whole[:length]
        assert lines_in(objects) == BEFORE
    objects[first] = whole
    assert lines_in(objects) == [*BEFORE, b"heir-0\n"]


def test_objects_behind_a_gap_and_torn_lines_do_not_count() -> None:
    objects, driver = begun(), Driver("new", 4)
    driver(MemoryStorage(objects))
    *_, second, third, fourth = sorted(name for name in objects if "claims" not in name)
    objects[fourth] = objects[fourth][:-3]
    assert lines_in(objects) == [*BEFORE, b"new-0\n", b"new-1\n", b"new-2\n"]
    del objects[second]
    assert third in objects
    assert lines_in(objects) == [*BEFORE, b"new-0\n"]


def test_late_objects_of_an_older_lease_are_not_read() -> None:
    objects = begun()
    old, new = Driver("old", 1), Driver("new", 1)
    old.open(MemoryStorage(objects))
    new(MemoryStorage(objects))
    old.record()
    assert old.was_stopped
    assert old.used == BEFORE
    assert lines_in(objects) == [*BEFORE, b"new-0\n"]


def test_strange_files_beside_the_claims_are_no_leases() -> None:
    objects = begun()
    for name in ("zzz", ".DS_Store", "000009", "999999-", "1-ab"):
        objects[f"journal/claims/{name}"] = b""
    heir = Driver("heir", 1)
    heir(MemoryStorage(objects))
    assert not heir.was_stopped
    assert lines_in(objects) == [*BEFORE, b"heir-0\n"]
