"""A pool whose workers are objects of this process: no Ray, and no waiting."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fppmo_ray.service.pool.call import Call


class InlinePool:
    """Has the methods of a ``WorkerPool``. All calls that wait end together, in their order.

    Args:
        worker: Answers the calls.
        error_of: Returns the error that a call ends with, or None to let the worker answer it.
    """

    num_workers = num_ready = 1
    num_busy = num_queued = num_requeued = 0

    def __init__(
        self, worker: Any, error_of: Callable[[Call[Any, Any]], str | None] = lambda call: None
    ) -> None:
        self._actor = InlineActor(worker)
        self._error_of = error_of
        self._queue: list[Call[Any, Any]] = []
        self.submitted: list[Call[Any, Any]] = []
        """Every call so far."""

    @property
    def num_unfinished(self) -> int:
        return len(self._queue)

    def submit(self, call: Call[Any, Any], *, first: bool = False) -> None:
        call.is_submitted = True
        self._queue.append(call)
        self.submitted.append(call)

    def next_ended(self) -> list[Call[Any, Any]]:
        ended, self._queue = self._queue, []
        for call in ended:
            error = self._error_of(call)
            if error is not None:
                call.fail_with(error, "0@here:1")
            else:
                call.send(self._actor, runs_now=True)
                call.end_with(call.reference, "0@here:1")
        return ended

    def run(self, calls: Sequence[Call[Any, Any]]) -> list[Any]:
        for call in calls:
            self.submit(call)
        self.next_ended()
        return [call.result for call in calls]


class InlineActor:
    """Looks like a Ray actor; the reference of an answer is the answer itself."""

    def __init__(self, worker: Any) -> None:
        self._worker = worker

    def __getattr__(self, method: str) -> Any:
        return _InlineMethod(getattr(self._worker, method))


class _InlineMethod:
    def __init__(self, method: Callable[..., Any]) -> None:
        self.remote = method

    def options(self, **named: Any) -> _InlineMethod:
        return self
