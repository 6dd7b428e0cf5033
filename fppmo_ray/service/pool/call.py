"""One call of a worker's method, its attempts, and its answer or error."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Generic, TypeVar, cast

W_contra = TypeVar("W_contra", contravariant=True)
T = TypeVar("T")

logger = logging.getLogger(__name__)

_MAX_RAISED = 2  # a proposal's own error shows on two workers, a worker's error on one
_MAX_TIMEOUTS = 2
_MAX_ERROR_CHARS = 2000  # the journal keeps it
# A call that ends its worker's process, or its node by its use of memory, would run for ever.
# Nodes may be lost often by themselves, when they are cheap ones that the cloud takes back.
_MIN_LOST_WORKERS, _MAX_LOST_WORKERS, _MAX_LOST_NODES = 3, 10, 10
_CHANCE = 1e-6  # with which a call is blamed for losses that are not its fault
_PRIOR = 100  # calls without a loss that are assumed before the first one


def max_losses(num_lost: int, num_ended: int) -> int:
    """Return how many lost workers of one call are too many to be chance.

    A mask that ends its workers' processes loses all of them, an unlucky one loses as many as
    others do. Where workers die often by themselves, three in a row are no proof against a mask.

    Args:
        num_lost: Workers lost under other calls, without those that a call was blamed for.
        num_ended: Calls that have ended.
    """
    if not num_lost:
        return _MIN_LOST_WORKERS
    rate = num_lost / (num_lost + num_ended + _PRIOR)
    by_chance = math.ceil(math.log(_CHANCE) / math.log(rate))
    return min(max(_MIN_LOST_WORKERS, by_chance), _MAX_LOST_WORKERS)


class Call(Generic[W_contra, T]):
    """A call of one method of some worker, with its state, which only the pool changes.

    The method must be idempotent, because it may run more than once. An error that the method
    itself causes ends the call; the loss of a worker does not.

    Args:
        name: What the call is for, as messages name it: ``"proposal 17"``.
        ask: Calls one method of the worker that it is given, and returns the answer:
            ``lambda worker: worker.score(weights, proposal)``.
        timeout: Seconds the method may run until the call is taken from its worker; None: the
            pool's limit for the method.
    """

    def __init__(
        self, name: str, ask: Callable[[W_contra], T], *, timeout: float | None = None
    ) -> None:
        self.name = name
        self.timeout = timeout
        self._ask = ask
        self.is_submitted = False
        self.kind = ""
        """Name of the worker's method, known once the call was first sent to a worker."""
        self.failed_at: dict[int, int] = {}
        """Slots on which the method raised or was lost with the worker, each with the pool's count
        of that slot's answers and restarts at that time."""
        self.raised_on: list[int] = []
        """Slots of the workers on which the method raised."""
        self.num_timeouts = 0
        self.lost_on: list[int] = []
        """Slots of the workers that were lost while they ran the method, on nodes that lived on."""
        self.num_lost_nodes = 0
        self.reference: Any = None
        """Ray's reference of the answer while a worker holds the call, else None."""
        self.began: float | None = None
        """Time on the monotonic clock since which the call is known to run, in seconds."""
        self._was_reported_silent = False
        """Whether a warning was logged that this attempt has run for long."""
        self.has_ended = False
        self.value: T
        """The method's answer; only set if the call ended without an error."""
        self.error: str | None = None
        self.worker = ""
        """Name of the worker on which the call ended: ``slot@host:pid``."""

    def __repr__(self) -> str:
        return f"Call({self.name!r})"

    @property
    def result(self) -> T:
        """The method's answer.

        Raises:
            RuntimeError: the call failed, or has not ended yet.
        """
        if not self.has_ended:
            raise RuntimeError(f"{self.name} has not ended yet; wait for it with next_ended()")
        if self.error is not None:
            raise RuntimeError(f"{self.name} failed: {self.error}")
        return self.value

    @property
    def is_suspect(self) -> bool:
        """Whether an earlier attempt raised, timed out or was lost with its worker."""
        return bool(self.raised_on or self.num_timeouts or self.lost_on or self.num_lost_nodes)

    def seconds(self) -> float:
        """Seconds for which the call is known to run, counted from now if it was not known yet."""
        if self.began is None:
            self.began = time.monotonic()
        return time.monotonic() - self.began

    def leave_out(self, seconds: float) -> None:
        """Do not count seconds in which the driver itself stood still."""
        if self.began is not None:
            self.began = min(self.began + seconds, time.monotonic())

    def warn_of_silence(self, worker: str, limit: float) -> None:
        """Warn, once per attempt, that the method has run for long and none of its kind has ended.

        Args:
            worker: Name of the worker.
            limit: Seconds that the method may run.
        """
        if self._was_reported_silent:
            return
        self._was_reported_silent = True
        logger.warning(
            "%s has run for %.0f min on worker %s without an answer; no call of %s() has ended "
            "before, so it is not known whether that is too long; it may run for %.0f min",
            *(self.name, self.seconds() / 60, worker, self.kind, limit / 60),
        )

    def send(self, actor: Any, *, runs_now: bool) -> None:
        """Send the call to a worker.

        Args:
            actor: The worker's Ray actor.
            runs_now: Whether the worker is idle, so that the call runs from now on.

        Raises:
            ValueError: ``ask`` does not make and return exactly one call of a method.
        """
        sent: list[tuple[str, Any]] = []

        def send_method(method: str, /, *arguments: Any, **named: Any) -> Any:
            if sent:
                raise self._wrong_ask(f"calls {sent[0][0]}() and {method}()")
            # The dashboard sums up by names, so that all calls of a method share one.
            remote = getattr(actor, method).options(name=method.replace("_", " ")).remote
            sent.append((method, remote(*arguments, **named)))
            return sent[0][1]

        answer = self._ask(cast(W_contra, _WorkerProxy(send_method)))
        if not sent:
            raise self._wrong_ask("calls none")
        [(self.kind, self.reference)] = sent
        if answer is not self.reference:
            raise self._wrong_ask(f"returns something else than the answer of {self.kind}()")
        self.began = time.monotonic() if runs_now else None
        self._was_reported_silent = False

    def take_back(self) -> None:
        """Forget the current attempt, because no answer of this worker is waited for any more."""
        self.reference = self.began = None

    def end_with(self, value: Any, worker: str) -> None:
        """End the call with its answer.

        Args:
            value: What the method returned.
            worker: Name of the worker that answered.
        """
        self.value = value
        self._end(worker)

    def fail_with(self, error: str, worker: str) -> None:
        """End the call with an error.

        Args:
            error: What went wrong, as a phrase for messages; very long ones are cut.
            worker: Name of the worker on which the last attempt failed.
        """
        rest = len(error) - _MAX_ERROR_CHARS
        self.error = error if rest <= 0 else f"{error[:_MAX_ERROR_CHARS]}... and {rest:,} more"
        self._end(worker)

    def count_raise(self, slot: int, cause: BaseException) -> str | None:
        """Count an attempt in which the method raised.

        Args:
            slot: Slot of the worker.
            cause: What the method raised.

        Returns:
            The error that the call ends with, or None if it gets another attempt.
        """
        self.raised_on.append(slot)
        return repr(cause) if len(self.raised_on) >= _MAX_RAISED else None

    def count_timeout(self, limit: float) -> str | None:
        """Count an attempt that took longer than ``limit`` seconds.

        Returns:
            The error that the call ends with, or None if it gets another attempt.
        """
        self.num_timeouts += 1
        return f"timed out twice after {limit:g} s" if self.num_timeouts >= _MAX_TIMEOUTS else None

    def count_loss(
        self, slot: int, reason: str, *, is_node_lost: bool, most: int = _MIN_LOST_WORKERS
    ) -> str | None:
        """Count an attempt that was lost with its worker.

        Args:
            slot: Slot of the worker.
            reason: Why the worker was lost, for the error.
            is_node_lost: Whether the worker's whole node was lost, which says nothing of the call.
            most: Losses of workers after which the call fails; see ``max_losses``.

        Returns:
            The error that the call ends with, since chance does not explain so many losses; None if
            it gets another attempt.
        """
        if is_node_lost:
            self.num_lost_nodes += 1
        else:
            self.lost_on.append(slot)
        if len(self.lost_on) >= most:
            return _lost_too_often("worker", len(self.lost_on), reason)
        if self.num_lost_nodes >= _MAX_LOST_NODES:
            return _lost_too_often("node", self.num_lost_nodes, reason)
        return None

    def _end(self, worker: str) -> None:
        self.worker = worker
        self.has_ended = True
        self.take_back()  # Ray keeps an answer in its object store while a reference exists

    def _wrong_ask(self, what_it_does: str) -> ValueError:
        return ValueError(
            f"ask of {self.name} must call exactly one method of the worker and return its answer, "
            f"but it {what_it_does}; make one Call for each method call"
        )


def _lost_too_often(what: str, count: int, reason: str) -> str:
    return (
        f"lost its {what} {count} times, most recently: {reason}; give each {what} more memory, "
        "or look into its log"
    )


class _WorkerProxy:
    """Stands in for a worker: each of its methods is sent to the worker's actor.

    Args:
        send_method: Gets the method's name and arguments, and returns Ray's reference.
    """

    def __init__(self, send_method: Callable[..., Any]) -> None:
        self._send_method = send_method

    def __getattr__(self, method: str) -> Callable[..., Any]:
        return partial(self._send_method, method)
