"""What the workers hold: each has a line of work, of which the first piece runs.

A Ray actor works in the order in which it is called, so the first piece without an answer is the
one that runs. The next begins the moment that one ends, while the driver is busy with its answer.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from fppmo_ray.service.pool.work import Attempts, Work

MAX_HELD = 2
"""One that runs and one that waits: a driver takes less time than a score."""


@dataclass(eq=False)
class Held:
    """A piece of work in the hands of a worker."""

    attempts: Attempts
    reference: Any
    """Of the answer."""
    began: float | None
    """When it began to run, on the monotonic clock; None: that has not been seen."""
    is_warned_of: bool = False

    @property
    def work(self) -> Work:
        """What was asked."""
        return self.attempts.work

    def seconds(self) -> float:
        """For how long it has been seen to run; from now on, if it had not been."""
        if self.began is None:
            self.began = time.monotonic()
        return time.monotonic() - self.began


class Lines:
    """The lines of the ready workers, by slot."""

    def __init__(self) -> None:
        self._lines: dict[int, deque[Held]] = {}

    def __iter__(self) -> Iterator[Held]:
        """All that is held."""
        return (held for line in self._lines.values() for held in line)

    @property
    def num_busy(self) -> int:
        """Workers with work."""
        return len(self.running())

    @property
    def num_waiting(self) -> int:
        """Pieces of work behind what runs."""
        return sum(1 for _ in self) - self.num_busy

    def running(self) -> list[tuple[int, Held]]:
        """The first in every line, with its slot."""
        return [(slot, line[0]) for slot, line in self._lines.items() if line]

    def slots_with(self, num_held: int) -> list[int]:
        """The workers that hold so many pieces of work."""
        return [slot for slot, line in self._lines.items() if len(line) == num_held]

    def first(self, slot: int) -> Held | None:
        """What a worker does now."""
        line = self._lines[slot]
        return line[0] if line else None

    def open(self, slot: int) -> None:
        """A worker is ready."""
        self._lines[slot] = deque()

    def close(self, slot: int) -> list[Attempts]:
        """A worker is gone; all that it held, in order."""
        line = self._lines.pop(slot)
        attempts = [held.attempts for held in line]
        line.clear()  # for whoever is at it, in take_ended
        return attempts

    def call(self, slot: int, actor: Any, attempts: Attempts) -> None:
        """Give a worker some work."""
        work, line = attempts.work, self._lines[slot]
        # One name per kind: the dashboard sums up by names.
        method = getattr(actor, work.method).options(name=work.method.replace("_", " "))
        began = None if line else time.monotonic()
        line.append(Held(attempts, method.remote(*work.arguments), began))

    def take_ended(self, done: Collection[Any]) -> Iterator[tuple[int, Held]]:
        """Take out what has ended, with its slot and in the order of each line.

        Of an answer behind one that is still to come, nothing can be said yet.

        Args:
            done: References that have resolved.
        """
        for slot, line in list(self._lines.items()):
            while line and line[0].reference in done:
                yield slot, line.popleft()

    def take_first(self, slot: int) -> Held:
        """Take out what a worker does now."""
        return self._lines[slot].popleft()

    def take_waiting(self) -> list[Attempts]:
        """Take out all but what runs.

        Its answers are not waited for. To cancel the calls would be no use: Ray's actors do them
        nevertheless, and then their answers are thrown away even if they had begun.
        """
        waiting = []
        for line in self._lines.values():
            while len(line) > 1:
                waiting.append(line.pop().attempts)
        return waiting
