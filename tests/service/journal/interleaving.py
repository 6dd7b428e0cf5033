"""Several drivers over one store in memory, whose every request waits for its turn."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

_PATIENCE = 60.0  # s, for a turn that takes microseconds


class MemoryStorage:
    """A strongly consistent object store. Calls ``before`` ahead of every write and listing.

    Reads need no turn: what leases read was listed before, and is written only once.
    """

    location = "memory://run"
    local: Path | None = None

    def __init__(
        self, objects: dict[str, bytes], before: Callable[[str], None] = lambda request: None
    ) -> None:
        self.objects = objects
        self.before = before

    def read(self, name: str) -> bytes:
        return self.objects[name]

    def read_all(self, names: Sequence[str]) -> list[bytes]:
        return [self.read(name) for name in names]

    def write(self, name: str, content: bytes) -> None:
        self.before("write")
        assert name not in self.objects, f"{name} is written twice"
        self.objects[name] = content

    def exists(self, name: str) -> bool:
        return name in self.objects

    def delete(self, name: str) -> None:
        raise AssertionError(f"{name} must stay")

    def names(self, folder: str) -> list[str]:
        self.before("list")
        parts = [name.rpartition("/") for name in self.objects]
        return sorted(name for place, _, name in parts if place == folder)


Drive = Callable[[MemoryStorage], None]


class _Driver(threading.Thread):
    """Waits before each of its requests until it is its turn."""

    def __init__(self, number: int, drive: Drive, objects: dict[str, bytes]) -> None:
        super().__init__(daemon=True)
        self.number = number
        self.next: str | None = None
        """Its next request; None when it has ended."""
        self._drive = drive
        self._storage = MemoryStorage(objects, self._wait)
        self._turn, self._waiting = threading.Semaphore(0), threading.Semaphore(0)
        self._has_ended = False

    def run(self) -> None:
        try:
            self._drive(self._storage)
        finally:
            self.next, self._has_ended = None, True
            self._waiting.release()

    def _wait(self, request: str) -> None:
        if self._has_ended:
            return  # somebody looks at what it left
        self.next = request
        self._waiting.release()
        assert self._turn.acquire(timeout=_PATIENCE)

    def arrive(self) -> None:
        assert self._waiting.acquire(timeout=_PATIENCE)

    def step(self) -> None:
        self._turn.release()
        self.arrive()


def interleave(
    drives: Sequence[Drive], objects: dict[str, bytes], choose: Callable[[int], int]
) -> None:
    """Run drivers to their ends, one request at a time.

    Args:
        drives: What each does with the store.
        objects: The store's.
        choose: Which goes next, of so many that may.
    """
    drivers = [_Driver(number, drive, objects) for number, drive in enumerate(drives)]
    for driver in drivers:
        driver.start()
        driver.arrive()
    listed = 0
    while options := _options(drivers, listed):
        driver = options[choose(len(options))]
        listed = driver.number if driver.next == "list" else 0
        driver.step()
    for driver in drivers:
        driver.join()


def _options(drivers: Sequence[_Driver], listed: int) -> list[_Driver]:
    """Who may go next. Between two writes, who lists first makes no difference: the lower does."""
    going = [driver for driver in drivers if driver.next is not None]
    different = [driver for driver in going if driver.next == "write" or driver.number >= listed]
    return different or going[:1]  # a run that was made before in another order: get to its end


def every_order() -> Iterator[Callable[[int], int]]:
    """A ``choose`` for each order there is: depth first, each run tells where the next branches."""
    planned: list[int] = []
    while True:
        choices = _Choices(planned)
        yield choices
        planned = choices.next_plan()
        if not planned:
            return


class _Choices:
    """Takes the planned choices, then the first there is."""

    def __init__(self, plan: list[int]) -> None:
        self._plan = plan
        self._taken: list[tuple[int, int]] = []

    def __call__(self, count: int) -> int:
        position = len(self._taken)
        choice = self._plan[position] if position < len(self._plan) else 0
        self._taken.append((choice, count))
        return choice

    def next_plan(self) -> list[int]:
        """The choices up to the last one that had another, and that other; empty after all."""
        while self._taken and self._taken[-1][0] + 1 == self._taken[-1][1]:
            self._taken.pop()
        choices = [choice for choice, _ in self._taken]
        return [*choices[:-1], choices[-1] + 1] if choices else []
