"""A pool of workers that loses no call: a lost call runs again on another worker."""

from __future__ import annotations

import logging
import sys
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Generic, TypeVar

import ray
from ray.exceptions import RayError, RayTaskError, UnserializableException

from fppmo_ray.service.pool.call import Call, max_losses
from fppmo_ray.service.pool.cluster import Demand, is_node_alive, is_unreachable, last_line
from fppmo_ray.service.pool.in_flight import MAX_CALLS_PER_WORKER, InFlight, TimeLimits
from fppmo_ray.service.pool.worker_group import WorkerGroup
from fppmo_ray.service.stopping import StopRequest

logger = logging.getLogger(__name__)

W_co = TypeVar("W_co", covariant=True)
T = TypeVar("T")

_MAX_CONTRADICTED = 2  # calls that raised on a worker, and succeeded elsewhere
_LOOK_UP_S = 1.0  # how late a stop or a timeout is noticed while no call ends
_SILENCE_S = 600.0
_PAUSE_S = 5.0


class WorkerPool(Generic[W_co]):
    """A queue of calls in front of workers.

    Args:
        start_worker: Starts the actor of a slot. Actors must not restart by themselves.
        num_workers: Number of workers. Each takes calls as soon as the cluster has placed it.
        demand: Resources that each worker needs, for messages.
        limits: How long calls may run; by default as long as earlier calls make plausible.
        stop: Once it is made, running calls are finished and no others are begun.
    """

    def __init__(
        self,
        start_worker: Callable[[int], Any],
        num_workers: int,
        *,
        demand: Demand | None = None,
        limits: TimeLimits | None = None,
        stop: StopRequest | None = None,
    ) -> None:
        self.num_workers = num_workers
        self.stop = stop or StopRequest(how_far=lambda: "no stop can be requested here")
        self.limits = limits or TimeLimits()
        """How long calls may run."""
        self.num_requeued = 0
        """How often a running call was lost or taken back, and queued again."""
        self._start_group = partial(WorkerGroup, start_worker, num_workers, demand or Demand())
        self._group = self._start_group()
        self._has_heard_stop = False
        self._looked_at = time.monotonic()
        """When the running calls were last looked after."""
        self._queue: deque[Call[Any, Any]] = deque()
        self._in_flight = InFlight()
        self._ended: list[Call[Any, Any]] = []
        self._num_ended = 0
        self._num_lost = 0
        """Workers lost on nodes that lived on, without those that a failed call is blamed for."""
        self._turns: Counter[int] = Counter()
        """Number of answers and restarts of each slot."""
        self._known_errors: set[str] = set()
        """Types of the errors after which a worker was replaced."""
        self._raised_since_answer: defaultdict[int, list[Call[Any, Any]]] = defaultdict(list)
        """Calls that raised on each worker since it last answered one."""

    @property
    def num_ready(self) -> int:
        """Number of workers that have started."""
        return len(self._group.ready)

    @property
    def num_busy(self) -> int:
        """Number of workers that hold a call."""
        return self._in_flight.num_busy

    @property
    def num_queued(self) -> int:
        """Number of calls that wait, in the queue or at a worker behind another call."""
        return len(self._queue) + self._in_flight.num_waiting

    @property
    def num_unfinished(self) -> int:
        """Number of submitted calls that ``next_ended`` has not returned yet."""
        return self.num_queued + self.num_busy + len(self._ended)

    def submit(self, call: Call[W_co, Any], *, first: bool = False) -> None:
        """Queue a call.

        Args:
            call: A new call.
            first: Whether to queue it in front of all others instead of behind them.

        Raises:
            ValueError: the call was submitted before.
        """
        if call.is_submitted:
            raise ValueError(f"{call.name} was submitted before; make a new Call to repeat it")
        call.is_submitted = True
        if first:
            self._queue.appendleft(call)
        else:
            self._queue.append(call)

    def next_ended(self) -> list[Call[Any, Any]]:
        """Wait until a call has ended; return all that have, in the order in which it was noticed.

        Raises:
            RuntimeError: no worker can be started.
            SearchStopped: a stop was requested, and all running calls have ended.
            ValueError: ``ask`` of a call does not make exactly one call of a method.
        """
        if not self.num_unfinished:
            raise RuntimeError("no call can end, because none was submitted")
        while not self._ended:
            self._dispatch_or_stop()
            self._wait()
            self._look_after_running()
            self._group.end_hung_starts(self.limits.limit("ready"))
            self._group.warn_of_unplaced()
        if not self.stop.is_made:
            self._dispatch()  # now, because the caller may need some time for the answers
        ended, self._ended = self._ended, []
        self._num_ended += len(ended)
        return ended

    def run(self, calls: Sequence[Call[W_co, T]]) -> list[T]:
        """Run calls that must not fail, while no others are unfinished.

        Args:
            calls: New calls.

        Returns:
            Their answers, in the order of ``calls``.

        Raises:
            RuntimeError: one of the calls failed.
        """
        for call in calls:
            self.submit(call)
        while self.num_unfinished:
            for ended in self.next_ended():
                _ = ended.result  # raises at once if the call failed
        return [call.result for call in calls]

    @contextmanager
    def away(self) -> Iterator[None]:
        """Free all resources of the workers for a while; no call may be unfinished."""
        assert not self.num_unfinished  # only a caller that has waited for its calls comes here
        self._group.close()
        yield
        self._group, self._in_flight = self._start_group(), InFlight()
        self._raised_since_answer.clear()

    def close(self) -> None:
        """Kill all workers."""
        self._group.close()

    def _dispatch_or_stop(self) -> None:
        if not self.stop.is_made:
            self._dispatch()
            return
        if not self._has_heard_stop:
            self._has_heard_stop = True
            self._take_in_ended()  # so that the first call of each worker is the running one
            self._queue.extendleft(self._in_flight.take_waiting())
            if self.num_busy:
                logger.warning(
                    "stopping once the running calls have ended (%d); a second signal ends at once",
                    self.num_busy,
                )
        if not self.num_busy and not self._ended:
            raise self.stop.stopped()

    def _dispatch(self) -> None:
        """Send a call to every idle worker, then a second one to busy workers."""
        for num_calls in range(MAX_CALLS_PER_WORKER):
            for slot in self._in_flight.slots_with(num_calls):
                if self._may_take(slot) and (call := self._take_for(slot)) is not None:
                    self._in_flight.send(call, slot, self._group.actor(slot))
        if self._queue and self.num_ready and not self.num_busy:
            # The only worker has raised in each queued call and answered none since: a process of
            # its own for the second attempts.
            self._replace(next(iter(self._group.ready)))

    def _may_take(self, slot: int) -> bool:
        """Whether this worker is idle, or a second call may wait at it without harm.

        A call that waits at a worker can only be taken back by ending the worker, and this worker
        may be slow. So a call waits at a worker only while the queue holds enough calls for all
        others, and only behind a call that takes seconds: compared with minutes, the pause between
        two calls does not matter. It does not wait behind a call that was lost before either:
        when a second call ends the worker before the first one's answer has arrived, the first one
        is counted as lost, and must not be blamed for the second one again.
        """
        running = self._in_flight.running_on(slot)
        if running is None:
            return True
        is_soon_free = self.limits.is_brief(running.kind) and not running.is_suspect
        return is_soon_free and len(self._queue) >= self.num_ready

    def _take_for(self, slot: int) -> Call[Any, Any] | None:
        """Take the first call from the queue that has not failed in this slot before.

        If it has failed in all, it may run in a slot that has answered or been restarted since.
        """
        for call in self._queue:
            has_others = not self._group.ready.keys() <= call.failed_at.keys()
            if slot not in call.failed_at or (
                not has_others and call.failed_at[slot] != self._turns[slot]
            ):
                self._queue.remove(call)
                return call
        return None

    def _wait(self) -> None:
        """Wait until a call or a start ends, for at most 1 s, and take in all that have ended."""
        running = [call.reference for _, call in self._in_flight.running()]
        ray.wait([*running, *self._group.starting], num_returns=1, timeout=_LOOK_UP_S)
        self._take_in_ended()

    def _take_in_ended(self) -> None:
        references = [*(call.reference for call in self._in_flight), *self._group.starting]
        done = set(ray.wait(references, num_returns=len(references), timeout=0)[0])
        for slot, call in self._in_flight.take_ended(done):
            self._finish(call, slot)
        for reference in done & self._group.starting.keys():
            if (ready := self._group.finish_start(reference)) is not None:
                self._in_flight.add_worker(ready)

    def _finish(self, call: Call[Any, Any], slot: int) -> None:
        try:
            value = ray.get(call.reference)
        except RayTaskError as error:
            self._after_raise(call, slot, error.cause)
        except UnserializableException as error:  # its constructor takes other arguments
            self._after_raise(call, slot, RuntimeError(last_line(error)))
        except RayError as error:  # the worker, its node, its memory or its answer is lost
            self._after_loss(call, slot, error)
        else:
            if call.began is not None:
                self.limits.learn(call.kind, call.seconds())
            # Shared by all feedback of the worker, which the driver keeps.
            call.end_with(value, sys.intern(str(self._group.ready[slot])))
            self._ended.append(call)
            self._after_answer(call, slot)

    def _replace(self, slot: int) -> None:
        """Replace a worker.

        Calls that waited at it return to the front of the queue in their order. They may have begun
        or even ended by now, but on a worker that cannot be trusted.
        """
        self._queue.extendleft(reversed(self._in_flight.remove_worker(slot)))
        self._turns[slot] += 1
        self._raised_since_answer[slot].clear()
        self._group.restart(slot)

    def _settle(
        self, call: Call[Any, Any], slot: int, error: str | None, *, replace: bool = True
    ) -> None:
        """End a failed call with its error, or queue it again.

        Args:
            call: The call, already taken out of the worker's calls.
            slot: Slot of the worker.
            error: The error that the call ends with; None if it gets another attempt.
            replace: Whether the worker is replaced.
        """
        worker = str(self._group.ready[slot])
        if replace:
            self._replace(slot)
        if error is not None:
            call.fail_with(error, worker)
            self._ended.append(call)
        else:
            self.num_requeued += 1
            call.take_back()
            self._queue.appendleft(call)

    def _after_answer(self, call: Call[Any, Any], slot: int) -> None:
        """Note that a worker is well; replace workers on which this call and another raised."""
        self._turns[slot] += 1
        self._raised_since_answer[slot].clear()
        for other in {*call.raised_on}:
            raised = self._raised_since_answer[other]
            contradicted = [item for item in raised if item.has_ended and item.error is None]
            if len(contradicted) >= _MAX_CONTRADICTED:
                self._replace(other)

    def _after_raise(self, call: Call[Any, Any], slot: int, cause: BaseException) -> None:
        """Count an error; replace the worker, since the fault may be its own and hit the next call.

        Of each type of error, that is done once. Later ones of a task that raises often only count:
        the call's second attempt shows whose fault it was.
        """
        logger.warning("%s raised on worker %d: %s", call.name, slot, cause)
        kind = type(cause).__qualname__
        outcome = call.count_raise(slot, cause)
        call.failed_at[slot] = self._turns[slot]
        self._raised_since_answer[slot].append(call)
        is_new = kind not in self._known_errors or _is_of_device(cause)
        self._known_errors.add(kind)
        self._settle(call, slot, outcome, replace=is_new)

    def _after_loss(self, call: Call[Any, Any], slot: int, error: RayError) -> None:
        node_id, reason = self._group.ready[slot].node_id, last_line(error)
        logger.warning("worker %d was lost while it ran %s: %s", slot, call.name, reason)
        is_node_lost = is_unreachable(error) or not is_node_alive(node_id)
        call.failed_at[slot] = self._turns[slot]
        most = max_losses(self._num_lost - len(call.lost_on), self._num_ended)
        outcome = call.count_loss(slot, reason, is_node_lost=is_node_lost, most=most)
        self._num_lost += not is_node_lost
        if outcome is not None:
            self._num_lost -= len(call.lost_on)
        self._settle(call, slot, outcome)

    def _look_after_running(self) -> None:
        """Take back calls that ran past their limit; warn about silent ones of an unknown kind."""
        self._leave_out_pause()
        for slot, call in self._in_flight.running():
            seconds = call.seconds()
            limit = self.limits.limit(call.kind, call.timeout)
            if seconds > limit and not ray.wait([call.reference], timeout=0)[0]:
                self._after_timeout(self._in_flight.take_running(slot), slot, limit)
            elif seconds > _SILENCE_S and not self.limits.knows(call.kind):
                call.warn_of_silence(str(self._group.ready[slot]), limit)

    def _leave_out_pause(self) -> None:
        """Leave the time out in which this process was suspended: answers may wait unread."""
        now = time.monotonic()
        pause, self._looked_at = now - self._looked_at - _LOOK_UP_S, now
        if pause > _PAUSE_S:
            for _, call in self._in_flight.running():
                call.leave_out(pause)

    def _after_timeout(self, call: Call[Any, Any], slot: int, limit: float) -> None:
        logger.warning("%s took longer than %g s on worker %d", call.name, limit, slot)
        self._settle(call, slot, call.count_timeout(limit))


def _is_of_device(cause: BaseException) -> bool:
    """Whether an error leaves the process unable to use its GPU again."""
    return "CUDA error" in str(cause)


@contextmanager
def worker_pool(
    worker: Callable[..., W_co],
    *arguments: Any,
    num_workers: int,
    demand: Demand,
    limits: TimeLimits | None = None,
    stop: StopRequest | None = None,
) -> Iterator[WorkerPool[W_co]]:
    """Start a pool of workers on the connected Ray, and close it in the end.

    Args:
        worker: Class of the workers; they are made by ``worker(*arguments, slot)``, and their
            method ``ready`` returns ``worker_info(slot)``.
        arguments: Constructor arguments of every worker; put into Ray's object store once.
        num_workers: Number of workers.
        demand: Resources that each worker needs.
        limits: How long calls may run; see ``WorkerPool``.
        stop: Once it is made, running calls are finished and no others are begun.

    Yields:
        The pool, whose workers start as the cluster has room.
    """
    references = [ray.put(argument) for argument in arguments]
    actor: Any = ray.remote(**demand.options())(worker)
    pool: WorkerPool[W_co] = WorkerPool(
        lambda slot: actor.remote(*references, slot),
        num_workers,
        demand=demand,
        limits=limits,
        stop=stop,
    )
    try:
        yield pool
    finally:
        pool.close()
