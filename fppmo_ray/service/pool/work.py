"""A piece of work: what is asked, what has become of it so far, and how it ends."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

_MAX_RAISED = 2  # a proposal's own error shows on two workers, a worker's error on one
_MAX_TIMEOUTS = 2
# Work that takes its worker down every time, or the whole node by its memory, would run for ever.
_MAX_LOST_WORKERS, _MAX_LOST_NODES = 5, 10


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
    """Seconds from the start on a worker until the work is taken from it; None: learned."""
    size: int | None = None
    """Where works of one method take unlike times: time is learned of each size by itself."""

    @property
    def kind(self) -> str:
        """What works that take about the same time share."""
        return self.method if self.size is None else f"{self.method} {self.size}"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a piece of work ended: with a value, or with the error that is its own."""

    work: Work
    value: Any = None
    error: str | None = None
    worker: str = ""
    """Which worker, by its place."""


@dataclass(eq=False)  # arguments are arrays, and equal work may be queued twice
class Attempts:
    """What has happened to a piece of work so far, and whether that was enough.

    What the work does by itself ends it with an error; being lost with a worker never does.
    """

    work: Work
    raised_on: list[int] = field(default_factory=list)
    """Slots."""
    timeouts: int = 0
    lost_workers: int = 0
    lost_nodes: int = 0

    @property
    def is_suspect(self) -> bool:
        """Whether something has come between it and its end before."""
        return bool(self.raised_on or self.timeouts or self.lost_workers or self.lost_nodes)

    def after_raise(self, slot: int, cause: BaseException) -> str | None:
        """The error that the work ends with; None: it gets another chance."""
        self.raised_on.append(slot)
        return repr(cause) if len(self.raised_on) >= _MAX_RAISED else None

    def after_timeout(self, limit: float) -> str | None:
        """The error that the work ends with; None: it gets another chance."""
        self.timeouts += 1
        return f"timed out twice after {limit:g} s" if self.timeouts >= _MAX_TIMEOUTS else None

    def after_loss(self, reason: str, *, is_node_lost: bool) -> None:
        """Count a loss; it gets another chance.

        Raises:
            RuntimeError: it is lost again and again, which is no accident.
        """
        self.lost_nodes += is_node_lost
        self.lost_workers += not is_node_lost
        if self.lost_workers >= _MAX_LOST_WORKERS:
            raise self._lost("worker", self.lost_workers, reason)
        if self.lost_nodes >= _MAX_LOST_NODES:
            raise self._lost("node", self.lost_nodes, reason)

    def _lost(self, what: str, count: int, reason: str) -> RuntimeError:
        return RuntimeError(
            f"{self.work.name} has lost its {what} {count} times, most recently: {reason}; "
            f"give each {what} more memory, or look into its log"
        )
