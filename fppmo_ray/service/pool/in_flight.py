"""Calls in the hands of the workers, and how long they may take.

A Ray actor runs its calls in the order in which they were sent, so the first call without an
answer is the one that runs. The next one begins as soon as the first ends, even while the driver
is busy with the first one's answer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from fppmo_ray.service.pool.call import Call

MAX_CALLS_PER_WORKER = 2
"""One that runs and one that waits behind it: the driver takes less time than a call."""

_TIMES_THE_LONGEST = 10
_AT_LEAST_S = 300.0
_BRIEF_S = 10.0
_FIRST_S = 86_400.0  # a user's whole fine-tuning may be one call


class InFlight:
    """The calls of every ready worker, by the worker's slot and in the order of sending."""

    def __init__(self) -> None:
        self._calls: dict[int, deque[Call[Any, Any]]] = {}

    def __iter__(self) -> Iterator[Call[Any, Any]]:
        """All calls that workers hold."""
        return (call for calls in self._calls.values() for call in calls)

    @property
    def num_busy(self) -> int:
        """Number of workers that hold a call."""
        return len(self.running())

    @property
    def num_waiting(self) -> int:
        """Number of calls that wait at a worker behind the one that runs."""
        return sum(1 for _ in self) - self.num_busy

    def running(self) -> list[tuple[int, Call[Any, Any]]]:
        """The running call of every busy worker, with the worker's slot."""
        return [(slot, calls[0]) for slot, calls in self._calls.items() if calls]

    def running_on(self, slot: int) -> Call[Any, Any] | None:
        """The running call of one worker; None if it is idle."""
        calls = self._calls[slot]
        return calls[0] if calls else None

    def slots_with(self, num_calls: int) -> list[int]:
        """Slots of the workers that hold exactly ``num_calls`` calls."""
        return [slot for slot, calls in self._calls.items() if len(calls) == num_calls]

    def add_worker(self, slot: int) -> None:
        """Add a worker that has become ready, without calls."""
        self._calls[slot] = deque()

    def remove_worker(self, slot: int) -> list[Call[Any, Any]]:
        """Remove a worker that is lost; return its calls in the order of sending."""
        calls = self._calls.pop(slot)
        taken = [*calls]
        calls.clear()  # so that a running take_ended yields none of them
        for call in taken:
            call.take_back()
        return taken

    def send(self, call: Call[Any, Any], slot: int, actor: Any) -> None:
        """Send a call to a worker.

        Args:
            call: A call that no worker holds.
            slot: Slot of the worker.
            actor: The worker's Ray actor.

        Raises:
            ValueError: ``ask`` of the call does not make exactly one call of a method.
        """
        calls = self._calls[slot]
        call.send(actor, runs_now=not calls)
        calls.append(call)

    def take_ended(self, done: Collection[Any]) -> Iterator[tuple[int, Call[Any, Any]]]:
        """Take out the calls that have ended, each with its worker's slot, in order of sending.

        An answer that seems to have come before an earlier call's is left until that one's comes.

        Args:
            done: References of answers that have come.
        """
        for slot, calls in list(self._calls.items()):
            while calls and calls[0].reference in done:
                yield slot, calls.popleft()

    def take_running(self, slot: int) -> Call[Any, Any]:
        """Take out the running call of a busy worker."""
        return self._calls[slot].popleft()

    def take_waiting(self) -> list[Call[Any, Any]]:
        """Take out all calls that wait behind a running one; their answers will be ignored.

        They are not cancelled: an actor runs a cancelled call nevertheless, and Ray then discards
        its answer even if the call had begun before.
        """
        waiting = []
        for calls in self._calls.values():
            while len(calls) > 1:
                waiting.append(calls.pop())
                waiting[-1].take_back()
        return waiting


class TimeLimits:
    """Limits of how long calls may run: given, or learned from ended calls of the same kind.

    Args:
        given: Limit of every call of a kind, in seconds, by the name of the worker's method. None:
            a day until the first call has ended, then learned.
        others: Limit of every call of all other kinds, in seconds, or None.
    """

    def __init__(
        self, given: Mapping[str, float | None] | None = None, *, others: float | None = None
    ) -> None:
        self._given = dict(given or {})
        self._others = others
        self._longest: dict[str, list[float]] = {}
        """Seconds of the two longest calls of each kind, in ascending order."""
        self._last: dict[str, float] = {}

    def learn(self, kind: str, seconds: float) -> None:
        """Learn from a call that has ended.

        Args:
            kind: Its kind.
            seconds: How long it ran.
        """
        self._longest[kind] = sorted([*self._longest.get(kind, []), seconds])[-2:]
        self._last[kind] = seconds

    def knows(self, kind: str) -> bool:
        """Whether a call of this kind has ended."""
        return kind in self._longest

    def is_brief(self, kind: str) -> bool:
        """Whether the last call of this kind took at most 10 s.

        The last one counts because the first call of each worker is long: it sets up the device.
        """
        return self._last.get(kind, float("inf")) <= _BRIEF_S

    def limit(self, kind: str, own: float | None = None) -> float:
        """Seconds that a call may run until its worker counts as hung.

        The learned limit is 10 times the second longest call of this kind, and at least 5 minutes.
        The longest call is left out: if one call had run on a machine that swapped, all later
        calls that hang would hang for hours.

        Args:
            kind: The call's kind.
            own: The call's own limit in seconds; None if it has none.

        Returns:
            The call's own limit, else the given one, else the learned one.
        """
        fixed = self._given.get(kind, self._others) if own is None else own
        if fixed is not None:
            return fixed
        if kind not in self._longest:
            return _FIRST_S
        return max(_AT_LEAST_S, _TIMES_THE_LONGEST * self._longest[kind][0])
