"""A pool of workers that loses no work: lost is re-queued, only what fails by itself fails."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

logger = logging.getLogger(__name__)

_MAX_RAISED = 2  # a proposal's own error shows on two workers, a worker's error on one
_MAX_TIMEOUTS = 2
_MAX_LOST = 5  # work that takes its worker down every time would run for ever
_MAX_START_FAILURES = 3
_PLACEMENT_WARNING_S = 60.0


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
    """Workers in numbered slots; a lost one is started anew, its work goes to the next.

    Args:
        start_worker: Starts the actor of a slot. Actors must not restart by themselves.
        num_workers: Slots. Each takes part as soon as the cluster has placed its actor.
    """

    def __init__(self, start_worker: Callable[[int], Any], num_workers: int) -> None:
        self._start_worker = start_worker
        self._num_workers = num_workers
        self._queue: deque[_Attempts] = deque()
        self._actors: dict[int, Any] = {}
        self._names: dict[int, str] = {}
        self._idle: deque[int] = deque()
        self._starting: dict[Any, int] = {}
        self._running: dict[Any, _Running] = {}
        self._ended: deque[Outcome] = deque()
        self._start_failures = 0
        self._waiting_since = time.monotonic()
        for slot in range(num_workers):
            self._start(slot)

    @property
    def num_ready(self) -> int:
        """Workers that have been placed."""
        return len(self._names)

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
            RuntimeError: workers cannot be started, or some work loses every worker it runs on.
        """
        if not self.num_unfinished:
            raise RuntimeError("no work was submitted, so none can end")
        while not self._ended:
            self._dispatch()
            done, _ = ray.wait(
                [*self._running, *self._starting], num_returns=1, timeout=self._patience()
            )
            for reference in done:
                if reference in self._starting:
                    self._finish_start(reference)
                else:
                    self._finish_work(reference)
            self._take_back_overdue()
            self._warn_if_nothing_is_placed()
        self._dispatch()  # before the caller takes its time over the outcome
        return self._ended.popleft()

    def close(self) -> None:
        """Stop all workers."""
        for actor in self._actors.values():
            ray.kill(actor)

    def _start(self, slot: int) -> None:
        self._names.pop(slot, None)
        self._actors[slot] = self._start_worker(slot)
        self._starting[self._actors[slot].ready.remote()] = slot

    def _finish_start(self, reference: Any) -> None:
        slot = self._starting.pop(reference)
        try:
            self._names[slot] = ray.get(reference)
        except RayActorError as error:
            self._start_failures += 1
            if self._start_failures >= _MAX_START_FAILURES:
                raise RuntimeError(f"workers cannot be started: {error}") from error
            self._start(slot)
            return
        self._start_failures = 0
        self._idle.append(slot)

    def _dispatch(self) -> None:
        for slot in [slot for slot in self._idle if self._queue]:
            attempts = self._take_for(slot)
            if attempts is None:
                continue
            self._idle.remove(slot)
            work = attempts.work
            reference = getattr(self._actors[slot], work.method).remote(*work.arguments)
            deadline = time.monotonic() + (float("inf") if work.timeout is None else work.timeout)
            self._running[reference] = _Running(attempts, slot, deadline)

    def _take_for(self, slot: int) -> _Attempts | None:
        """The first work in the queue that has not failed on this very worker."""
        for attempts in self._queue:
            if slot not in attempts.raised_on or self.num_ready == 1:
                self._queue.remove(attempts)
                return attempts
        return None

    def _finish_work(self, reference: Any) -> None:
        running = self._running.pop(reference)
        attempts, slot = running.attempts, running.slot
        try:
            value = ray.get(reference)
        except RayTaskError as error:
            self._idle.append(slot)
            self._after_raise(attempts, slot, error)
        except RayActorError as error:
            self._after_loss(attempts, slot, error)
        else:
            self._idle.append(slot)
            self._end(attempts, slot, value=value)

    def _end(
        self, attempts: _Attempts, slot: int, *, value: Any = None, error: str | None = None
    ) -> None:
        worker = self._names[slot]
        self._ended.append(Outcome(work=attempts.work, value=value, error=error, worker=worker))

    def _after_raise(self, attempts: _Attempts, slot: int, error: RayTaskError) -> None:
        attempts.raised_on.append(slot)
        logger.warning("%s raised on worker %d: %s", attempts.work.name, slot, error.cause)
        if len(attempts.raised_on) >= _MAX_RAISED:
            self._end(attempts, slot, error=repr(error.cause))
        else:
            self._queue.appendleft(attempts)

    def _after_loss(self, attempts: _Attempts, slot: int, error: RayActorError) -> None:
        attempts.lost += 1
        logger.warning("worker %d was lost with %s: %s", slot, attempts.work.name, error)
        if attempts.lost >= _MAX_LOST:
            raise RuntimeError(
                f"{attempts.work.name} has lost its worker {_MAX_LOST} times, most recently: "
                f"{error}; give workers more memory, or look into its log"
            ) from error
        self._queue.appendleft(attempts)
        self._restart(slot)

    def _restart(self, slot: int) -> None:
        ray.kill(self._actors[slot])
        self._start(slot)

    def _take_back_overdue(self) -> None:
        now = time.monotonic()
        for reference, running in list(self._running.items()):
            if running.deadline > now:
                continue
            del self._running[reference]
            self._after_timeout(running.attempts, running.slot)
            self._restart(running.slot)

    def _after_timeout(self, attempts: _Attempts, slot: int) -> None:
        attempts.timeouts += 1
        limit = attempts.work.timeout
        logger.warning("%s took over %s s on worker %d", attempts.work.name, limit, slot)
        if attempts.timeouts >= _MAX_TIMEOUTS:
            self._end(attempts, slot, error=f"timed out twice after {limit} s")
        else:
            self._queue.appendleft(attempts)

    def _patience(self) -> float | None:
        """Seconds until something must be looked after even if nothing ends."""
        moments = [running.deadline for running in self._running.values()]
        if not self._names:
            moments.append(self._waiting_since + _PLACEMENT_WARNING_S)
        finite = [moment for moment in moments if moment != float("inf")]
        return max(0.0, min(finite) - time.monotonic()) if finite else None

    def _warn_if_nothing_is_placed(self) -> None:
        if self._names or time.monotonic() < self._waiting_since + _PLACEMENT_WARNING_S:
            return
        self._waiting_since = time.monotonic()
        logger.warning(
            "none of %d workers could be placed for %.0f s; the cluster has %s, of which %s free",
            self._num_workers,
            _PLACEMENT_WARNING_S,
            ray.cluster_resources(),  # type: ignore[no-untyped-call]
            ray.available_resources(),  # type: ignore[no-untyped-call]
        )
