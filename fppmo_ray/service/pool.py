"""A pool of workers that loses no work: lost is re-queued, only what fails by itself fails."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from fppmo_ray.service.slots import Slots

logger = logging.getLogger(__name__)

_MAX_RAISED = 2  # a proposal's own error shows on two workers, a worker's error on one
_MAX_TIMEOUTS = 2
_MAX_LOST = 5  # work that takes its worker down every time would run for ever


@dataclass(frozen=True, kw_only=True)
class Work:
    """A method call for some worker. It must be idempotent: it may run more than once."""

    name: str
    """For messages: ``proposal 17``."""
    method: str
    """Of the worker."""
    arguments: tuple[Any, ...]
    tag: Any = None
    """The caller's own: comes back with the outcome."""
    timeout: float | None = None
    """Seconds from the start on a worker until the work is taken from it."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a piece of work ended: with a value, or with the error that is its own."""

    work: Work
    value: Any = None
    error: str | None = None
    worker: str = ""
    """Which worker, as its ``ready`` named itself."""


@dataclass
class _Attempts:
    """What has happened to a piece of work so far."""

    work: Work
    raised_on: list[int] = field(default_factory=list)
    timeouts: int = 0
    lost: int = 0


@dataclass(frozen=True)
class _Running:
    attempts: _Attempts
    slot: int
    deadline: float


class WorkerPool:
    """A queue of work in front of workers; what is lost with a worker goes to the next.

    Args:
        start_worker: Starts the actor of a slot. Actors must not restart by themselves.
        num_workers: Slots. Each takes part as soon as the cluster has placed its actor.
    """

    def __init__(self, start_worker: Callable[[int], Any], num_workers: int) -> None:
        self.num_workers = num_workers
        self._slots = Slots(start_worker, num_workers)
        self._idle: deque[int] = deque()
        self._queue: deque[_Attempts] = deque()
        self._running: dict[Any, _Running] = {}
        self._ended: deque[Outcome] = deque()

    @property
    def num_ready(self) -> int:
        """Workers that have been placed."""
        return len(self._slots.names)

    @property
    def num_busy(self) -> int:
        """Workers with work in hand."""
        return len(self._running)

    @property
    def num_unfinished(self) -> int:
        """Pieces of work submitted whose outcome is still to come."""
        return len(self._queue) + len(self._running) + len(self._ended)

    def holds(self, tag: Any) -> bool:
        """Whether the outcome of work with this tag is still to come."""
        queued = [attempts.work for attempts in self._queue]
        running = [running.attempts.work for running in self._running.values()]
        ended = [outcome.work for outcome in self._ended]
        return any(work.tag == tag for work in [*queued, *running, *ended])

    def submit(self, work: Work) -> None:
        """Queue work behind what is there."""
        self._queue.append(_Attempts(work))

    def next_outcome(self) -> Outcome:
        """Wait until some work has ended.

        Raises:
            RuntimeError: no worker can be started, or some work loses every worker it runs on.
        """
        if not self.num_unfinished:
            raise RuntimeError("no work was submitted, so none can end")
        while not self._ended:
            self._dispatch()
            self._wait()
            self._take_back_overdue()
            self._slots.warn_of_unplaced()
        self._dispatch()  # before the caller takes its time over the outcome
        return self._ended.popleft()

    def run(self, works: Sequence[Work]) -> list[Any]:
        """Do work that must not fail, with nothing else unfinished; values in the works' order.

        Raises:
            RuntimeError: some work failed by itself.
        """
        for work in works:
            self.submit(work)
        values = {}
        while self.num_unfinished:
            outcome = self.next_outcome()
            if outcome.error is not None:
                raise RuntimeError(f"{outcome.work.name} failed: {outcome.error}")
            values[id(outcome.work)] = outcome.value
        return [values[id(work)] for work in works]

    def close(self) -> None:
        """Stop all workers."""
        self._slots.close()

    def _dispatch(self) -> None:
        for slot in [slot for slot in self._idle if self._queue]:
            attempts = self._take_for(slot)
            if attempts is None:
                continue
            self._idle.remove(slot)
            work = attempts.work
            actor = self._slots.actor(slot)
            reference = getattr(actor, work.method).remote(*work.arguments)
            deadline = time.monotonic() + (float("inf") if work.timeout is None else work.timeout)
            self._running[reference] = _Running(attempts, slot, deadline)

    def _take_for(self, slot: int) -> _Attempts | None:
        """The first work in the queue that has not failed in this very slot."""
        for attempts in self._queue:
            if slot not in attempts.raised_on or self.num_ready == 1:
                self._queue.remove(attempts)
                return attempts
        return None

    def _wait(self) -> None:
        """Sleep until something ends or is due, and take in all that has ended."""
        references = [*self._running, *self._slots.starting]
        ray.wait(references, num_returns=1, timeout=self._patience())
        done, _ = ray.wait(references, num_returns=len(references), timeout=0)
        for reference in done:
            if reference in self._running:
                self._finish_work(reference)
            elif (slot := self._slots.finish_start(reference)) is not None:
                self._idle.append(slot)

    def _patience(self) -> float | None:
        """Seconds until something must be looked after even if nothing ends."""
        now = time.monotonic()
        moments = [running.deadline - now for running in self._running.values()]
        if (warning := self._slots.seconds_to_warning()) is not None:
            moments.append(warning)
        finite = [moment for moment in moments if moment != float("inf")]
        return max(0.0, min(finite)) if finite else None

    def _finish_work(self, reference: Any) -> None:
        running = self._running.pop(reference)
        attempts, slot = running.attempts, running.slot
        try:
            value = ray.get(reference)
        except RayTaskError as error:
            self._after_raise(attempts, slot, error)
        except RayError as error:  # the worker, its node, its memory or its answer is gone
            self._after_loss(attempts, slot, error)
        else:
            self._idle.append(slot)
            self._end(attempts, slot, value=value)

    def _end(
        self, attempts: _Attempts, slot: int, *, value: Any = None, error: str | None = None
    ) -> None:
        worker = self._slots.names[slot]
        self._ended.append(Outcome(work=attempts.work, value=value, error=error, worker=worker))

    def _after_raise(self, attempts: _Attempts, slot: int, error: RayTaskError) -> None:
        attempts.raised_on.append(slot)
        logger.warning("%s raised on worker %d: %s", attempts.work.name, slot, error.cause)
        if len(attempts.raised_on) >= _MAX_RAISED:
            self._end(attempts, slot, error=repr(error.cause))
        else:
            self._queue.appendleft(attempts)
        # A fresh process: the fault may be the worker's, and then no next work may meet it.
        self._slots.restart(slot)

    def _after_loss(self, attempts: _Attempts, slot: int, error: RayError) -> None:
        attempts.lost += 1
        logger.warning("worker %d was lost with %s: %s", slot, attempts.work.name, error)
        if attempts.lost >= _MAX_LOST:
            raise RuntimeError(
                f"{attempts.work.name} has lost its worker {_MAX_LOST} times, most recently: "
                f"{error}; give workers more memory, or look into its log"
            ) from error
        self._queue.appendleft(attempts)
        self._slots.restart(slot)

    def _take_back_overdue(self) -> None:
        now = time.monotonic()
        for reference, running in list(self._running.items()):
            if running.deadline > now or ray.wait([reference], timeout=0)[0]:
                continue
            del self._running[reference]
            self._after_timeout(running.attempts, running.slot)

    def _after_timeout(self, attempts: _Attempts, slot: int) -> None:
        attempts.timeouts += 1
        limit = attempts.work.timeout
        logger.warning("%s took over %s s on worker %d", attempts.work.name, limit, slot)
        if attempts.timeouts >= _MAX_TIMEOUTS:
            self._end(attempts, slot, error=f"timed out twice after {limit} s")
        else:
            self._queue.appendleft(attempts)
        self._slots.restart(slot)
