"""A pool of workers that loses no work: lost is re-queued, only what fails by itself fails."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from fppmo_ray.service.place import is_node_alive
from fppmo_ray.service.ray_errors import is_unreachable, last_line
from fppmo_ray.service.resources import Demand
from fppmo_ray.service.slots import Slots
from fppmo_ray.service.stopping import StopRequest
from fppmo_ray.service.time_limits import TimeLimits
from fppmo_ray.service.work import Attempts, Outcome, Work

logger = logging.getLogger(__name__)

_LOOK_UP_S = 1.0  # how late a stop or a limit is noticed while nothing ends
_SILENCE_S = 600.0


@dataclass
class _Running:
    attempts: Attempts
    slot: int
    since: float
    is_warned_of: bool = False


class WorkerPool:
    """A queue of work in front of workers; what is lost with a worker goes to the next.

    Args:
        start_worker: Starts the actor of a slot. Actors must not restart by themselves.
        num_workers: Slots. Each takes part as soon as the cluster has placed its actor.
        demand: What each worker asks of the cluster, for messages.
        stop: Once it is made, what runs is finished and nothing else is begun.
    """

    def __init__(
        self,
        start_worker: Callable[[int], Any],
        num_workers: int,
        *,
        demand: Demand | None = None,
        stop: StopRequest | None = None,
    ) -> None:
        self.num_workers = num_workers
        self.num_requeued = 0
        """Times that work was lost or taken back, and given to another worker."""
        self._slots = Slots(start_worker, num_workers, demand or Demand())
        self._stop = stop or StopRequest(how_far=lambda: "nobody could ask")
        self._has_said_stop = False
        self._limits = TimeLimits()
        self._idle: deque[int] = deque()
        self._queue: deque[Attempts] = deque()
        self._running: dict[Any, _Running] = {}
        self._ended: list[Outcome] = []

    @property
    def num_ready(self) -> int:
        """Workers that have been placed."""
        return len(self._slots.places)

    @property
    def num_busy(self) -> int:
        """Workers with work in hand."""
        return len(self._running)

    @property
    def num_queued(self) -> int:
        """Pieces of work that wait for a worker."""
        return len(self._queue)

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
        self._queue.append(Attempts(work))

    def next_outcomes(self) -> list[Outcome]:
        """Wait until some work has ended; all that has, in the order in which it was noticed.

        Raises:
            RuntimeError: no worker can be started, or some work loses every worker it runs on.
            SearchStopped: a stop was requested, and all that ran has ended.
        """
        if not self.num_unfinished:
            raise RuntimeError("no work was submitted, so none can end")
        while not self._ended:
            self._dispatch_or_stop()
            self._wait()
            self._look_after_running()
            self._slots.warn_of_unplaced()
        if not self._stop.is_made:
            self._dispatch()  # before the caller takes its time over the outcomes
        ended, self._ended = self._ended, []
        return ended

    def run(self, works: Sequence[Work]) -> list[Any]:
        """Do work that must not fail, with nothing else unfinished; values in the works' order.

        Raises:
            RuntimeError: some work failed by itself.
        """
        for work in works:
            self.submit(work)
        values = {}
        while self.num_unfinished:
            for outcome in self.next_outcomes():
                if outcome.error is not None:
                    raise RuntimeError(f"{outcome.work.name} failed: {outcome.error}")
                values[id(outcome.work)] = outcome.value
        return [values[id(work)] for work in works]

    def close(self) -> None:
        """Stop all workers."""
        self._slots.close()

    def _dispatch_or_stop(self) -> None:
        if not self._stop.is_made:
            self._dispatch()
            return
        if not self._running:
            raise self._stop.stopped()
        if not self._has_said_stop:
            self._has_said_stop = True
            logger.warning(
                "stopping once what runs has ended (%d); a second signal ends at once",
                len(self._running),
            )

    def _dispatch(self) -> None:
        for slot in [slot for slot in self._idle if self._queue]:
            attempts = self._take_for(slot)
            if attempts is None:
                continue
            self._idle.remove(slot)
            work = attempts.work
            method = getattr(self._slots.actor(slot), work.method)
            # One name per kind: the dashboard sums up by names.
            call = method.options(name=work.method.replace("_", " "))
            reference = call.remote(*work.arguments)
            self._running[reference] = _Running(attempts, slot, time.monotonic())

    def _take_for(self, slot: int) -> Attempts | None:
        """The first work in the queue that has not failed in this very slot."""
        for attempts in self._queue:
            if slot not in attempts.raised_on or self.num_ready == 1:
                self._queue.remove(attempts)
                return attempts
        return None

    def _wait(self) -> None:
        """Sleep until something ends, not for long, and take in all that has ended."""
        references = [*self._running, *self._slots.starting]
        ray.wait(references, num_returns=1, timeout=_LOOK_UP_S)
        done, _ = ray.wait(references, num_returns=len(references), timeout=0)
        for reference in done:
            if reference in self._running:
                self._finish_work(reference)
            elif (slot := self._slots.finish_start(reference)) is not None:
                self._idle.append(slot)

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
            self._limits.learn(attempts.work.method, time.monotonic() - running.since)
            self._idle.append(slot)
            self._end(attempts, slot, value=value)

    def _end(
        self, attempts: Attempts, slot: int, *, value: Any = None, error: str | None = None
    ) -> None:
        worker = str(self._slots.places[slot])
        self._ended.append(Outcome(work=attempts.work, value=value, error=error, worker=worker))

    def _settle(self, attempts: Attempts, slot: int, error: str | None) -> None:
        """End work with its own error, or give it another chance; replace the worker."""
        if error is not None:
            self._end(attempts, slot, error=error)
        else:
            self.num_requeued += 1
            self._queue.appendleft(attempts)
        self._slots.restart(slot)

    def _after_raise(self, attempts: Attempts, slot: int, error: RayTaskError) -> None:
        logger.warning("%s raised on worker %d: %s", attempts.work.name, slot, error.cause)
        # The worker is replaced: the fault may be its own, and then no next work may meet it.
        self._settle(attempts, slot, attempts.after_raise(slot, error.cause))

    def _after_loss(self, attempts: Attempts, slot: int, error: RayError) -> None:
        node_id, reason = self._slots.places[slot].node_id, last_line(error)
        logger.warning("worker %d was lost with %s: %s", slot, attempts.work.name, reason)
        is_node_lost = is_unreachable(error) or not is_node_alive(node_id)
        attempts.after_loss(reason, is_node_lost=is_node_lost)
        self._settle(attempts, slot, None)

    def _look_after_running(self) -> None:
        """Take back what is past its limit; name what has none and does not answer."""
        for reference, running in list(self._running.items()):
            work, seconds = running.attempts.work, time.monotonic() - running.since
            limit = self._limits.limit(work.method, work.timeout)
            if limit is None:
                self._warn_of_silence(running, seconds)
            elif seconds > limit and not ray.wait([reference], timeout=0)[0]:
                del self._running[reference]
                self._after_timeout(running.attempts, running.slot, limit)

    def _warn_of_silence(self, running: _Running, seconds: float) -> None:
        if running.is_warned_of or seconds < _SILENCE_S:
            return
        running.is_warned_of = True
        logger.warning(
            "%s has run for %.0f min on worker %s without an answer, and is the first of its kind, "
            "so it is not known whether that is long",
            running.attempts.work.name,
            seconds / 60,
            self._slots.places[running.slot],
        )

    def _after_timeout(self, attempts: Attempts, slot: int, limit: float) -> None:
        logger.warning("%s took over %g s on worker %d", attempts.work.name, limit, slot)
        self._settle(attempts, slot, attempts.after_timeout(limit))
