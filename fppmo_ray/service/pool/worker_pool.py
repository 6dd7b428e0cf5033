"""A pool of workers that loses no work: lost is re-queued, only what fails by itself fails."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from fppmo_ray.service.pool.lines import MAX_HELD, Held, Lines
from fppmo_ray.service.pool.place import is_node_alive
from fppmo_ray.service.pool.ray_errors import is_unreachable, last_line
from fppmo_ray.service.pool.resources import Demand
from fppmo_ray.service.pool.slots import Slots
from fppmo_ray.service.pool.time_limits import TimeLimits
from fppmo_ray.service.pool.work import Attempts, Outcome, Work
from fppmo_ray.service.stopping import StopRequest

logger = logging.getLogger(__name__)

_LOOK_UP_S = 1.0  # how late a stop or a limit is noticed while nothing ends
_SILENCE_S = 600.0


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
        self.stop = stop or StopRequest(how_far=lambda: "nobody could ask")
        self.num_requeued = 0
        """Times that work which ran was lost or taken back, and given to another worker."""
        self._start_slots = partial(Slots, start_worker, num_workers, demand or Demand())
        self._slots = self._start_slots()
        self._has_heard_stop = False
        self._limits = TimeLimits()
        self._queue: deque[Attempts] = deque()
        self._lines = Lines()
        self._ended: list[Outcome] = []

    @property
    def num_ready(self) -> int:
        """Workers that have been placed."""
        return len(self._slots.places)

    @property
    def num_busy(self) -> int:
        """Workers with work in hand."""
        return self._lines.num_busy

    @property
    def num_queued(self) -> int:
        """Pieces of work that wait for a worker, in the queue or in its line."""
        return len(self._queue) + self._lines.num_waiting

    @property
    def num_unfinished(self) -> int:
        """Pieces of work submitted whose outcome is still to come."""
        return self.num_queued + self.num_busy + len(self._ended)

    def holds(self, tag: Any) -> bool:
        """Whether the outcome of work with this tag is still to come."""
        queued = [attempts.work for attempts in self._queue]
        held = [held.work for held in self._lines]
        ended = [outcome.work for outcome in self._ended]
        return any(work.tag == tag for work in [*queued, *held, *ended])

    def submit(self, work: Work, *, first: bool = False) -> None:
        """Queue work behind what is there, or before it."""
        if first:
            self._queue.appendleft(Attempts(work))
        else:
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
        if not self.stop.is_made:
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

    @contextmanager
    def away(self) -> Iterator[None]:
        """Leave all that workers hold to others for a while; there must be no unfinished work."""
        assert not self.num_unfinished  # whoever waits for outcomes knows
        self._slots.close()
        yield
        self._slots, self._lines = self._start_slots(), Lines()

    def close(self) -> None:
        """Stop all workers."""
        self._slots.close()

    def _dispatch_or_stop(self) -> None:
        if not self.stop.is_made:
            self._dispatch()
            return
        if not self._has_heard_stop:
            self._has_heard_stop = True
            self._take_in_ended()  # so that what is first in its line is what runs
            self._queue.extendleft(self._lines.take_waiting())
            self._say_stop()
        if not self.num_busy and not self._ended:
            raise self.stop.stopped()

    def _say_stop(self) -> None:
        if self.num_busy:
            logger.warning(
                "stopping once what runs has ended (%d); a second signal ends at once",
                self.num_busy,
            )

    def _dispatch(self) -> None:
        """Give work to those who have none, then something that waits to those who have."""
        for num_held in range(MAX_HELD):
            for slot in self._lines.slots_with(num_held):
                if self._may_take(slot) and (attempts := self._take_for(slot)) is not None:
                    self._lines.call(slot, self._slots.actor(slot), attempts)

    def _may_take(self, slot: int) -> bool:
        """Whether work may wait for a worker, so that nobody will miss it.

        What an actor was given can only be taken back by ending it, and this one may be slow. So
        work waits only while the queue has enough for all others, and only behind what takes
        seconds: behind minutes, the moment between two calls is nothing anyway. Nor does it wait
        behind what was lost before: if the next piece had ended the worker so soon that an answer
        was lost on its way, the wrong one was blamed, and must not be again.
        """
        first = self._lines.first(slot)
        if first is None:
            return True
        is_soon_free = self._limits.is_brief(first.work.kind) and not first.attempts.is_suspect
        return is_soon_free and len(self._queue) >= self.num_ready

    def _take_for(self, slot: int) -> Attempts | None:
        """The first work in the queue that has not failed in this very slot."""
        for attempts in self._queue:
            if slot not in attempts.raised_on or self.num_ready == 1:
                self._queue.remove(attempts)
                return attempts
        return None

    def _wait(self) -> None:
        """Sleep until something ends, not for long, and take in all that has ended."""
        running = [first.reference for _, first in self._lines.running()]
        ray.wait([*running, *self._slots.starting], num_returns=1, timeout=_LOOK_UP_S)
        self._take_in_ended()

    def _take_in_ended(self) -> None:
        references = [*(held.reference for held in self._lines), *self._slots.starting]
        done = set(ray.wait(references, num_returns=len(references), timeout=0)[0])
        for slot, held in self._lines.take_ended(done):
            self._finish_work(held, slot)
        for reference in done & self._slots.starting.keys():
            if (ready := self._slots.finish_start(reference)) is not None:
                self._lines.open(ready)

    def _finish_work(self, held: Held, slot: int) -> None:
        try:
            value = ray.get(held.reference)
        except RayTaskError as error:
            self._after_raise(held.attempts, slot, error)
        except RayError as error:  # the worker, its node, its memory or its answer is gone
            self._after_loss(held.attempts, slot, error)
        else:
            if held.began is not None:
                self._limits.learn(held.work.kind, held.seconds())
            self._end(held.attempts, slot, value=value)

    def _end(
        self, attempts: Attempts, slot: int, *, value: Any = None, error: str | None = None
    ) -> None:
        worker = str(self._slots.places[slot])
        self._ended.append(Outcome(work=attempts.work, value=value, error=error, worker=worker))

    def _settle(self, attempts: Attempts, slot: int, error: str | None) -> None:
        """End work with its own error, or give it another chance; replace the worker.

        What waited behind it goes back as it came. It may have begun by now, or even ended, but on
        a worker that is not to be trusted.
        """
        self._queue.extendleft(reversed(self._lines.close(slot)))
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
        for slot, first in self._lines.running():
            seconds = first.seconds()
            limit = self._limits.limit(first.work.kind, first.work.timeout)
            if limit is None:
                self._warn_of_silence(first, slot, seconds)
            elif seconds > limit and not ray.wait([first.reference], timeout=0)[0]:
                self._after_timeout(self._lines.take_first(slot).attempts, slot, limit)

    def _warn_of_silence(self, held: Held, slot: int, seconds: float) -> None:
        if held.is_warned_of or seconds < _SILENCE_S:
            return
        held.is_warned_of = True
        logger.warning(
            "%s has run for %.0f min on worker %s without an answer, and is the first of its kind, "
            "so it is not known whether that is long",
            held.work.name,
            seconds / 60,
            self._slots.places[slot],
        )

    def _after_timeout(self, attempts: Attempts, slot: int, limit: float) -> None:
        logger.warning("%s took over %g s on worker %d", attempts.work.name, limit, slot)
        self._settle(attempts, slot, attempts.after_timeout(limit))


@contextmanager
def worker_pool(
    worker: type,
    *arguments: Any,
    num_workers: int,
    demand: Demand,
    stop: StopRequest | None = None,
) -> Iterator[WorkerPool]:
    """A pool of workers of some class, ``worker(*arguments, slot)``, on the connected Ray.

    Args:
        worker: A class whose ``ready`` tells its place, as ``ScoringWorker`` does.
        arguments: What each is made of; put into the object store once.
        num_workers: How many are wanted.
        demand: What each asks of the cluster.
        stop: Once it is made, what runs is finished and nothing else is begun.
    """
    references = [ray.put(argument) for argument in arguments]
    actor: Any = ray.remote(num_cpus=demand.cpus, num_gpus=demand.gpus)(worker)
    pool = WorkerPool(
        lambda slot: actor.remote(*references, slot), num_workers, demand=demand, stop=stop
    )
    try:
        yield pool
    finally:
        pool.close()
