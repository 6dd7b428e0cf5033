"""Ending a job early on request, such that it can be gone on with."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import FrameType

from fppmo_ray.service.record.facts import Scored
from fppmo_ray.service.record.run_directory import RunDirectory


class SearchStopped(RuntimeError):
    """A search or a job of many ended early because somebody asked for it; nothing is lost."""


class StopRequest:
    """Whether somebody wants the work to end.

    Args:
        how_far: For the sentence that it ends with: ``37 of 320 proposals are scored``.
        way_on: Of the same sentence: how to go on.
    """

    def __init__(self, how_far: Callable[[], str], way_on: str = "go on with --resume") -> None:
        self._how_far = how_far
        self._way_on = way_on
        self.is_made = False

    def stopped(self) -> SearchStopped:
        """The error to end with."""
        return SearchStopped(f"stopped on request: {self._how_far()}; {self._way_on}")


def stop_on_signal(run: RunDirectory, num_proposals: int) -> AbstractContextManager[StopRequest]:
    """The request that ends a search on SIGTERM or SIGINT; see ``made_by_signal``."""
    return made_by_signal(
        StopRequest(lambda: f"{_num_scored(run)} of {num_proposals} proposals are scored")
    )


@contextmanager
def made_by_signal(request: StopRequest) -> Iterator[StopRequest]:
    """Turn the first SIGTERM or SIGINT into a request; a second one does what it did before.

    Signals reach the main thread alone: in any other, the request is never made. Enter this after
    Ray has started, which handles SIGTERM in a way of its own.
    """
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def obey(number: int, frame: FrameType | None) -> None:
        request.is_made = True
        restore()

    for number in before:
        signal.signal(number, obey)
    try:
        yield request
    finally:
        restore()


def _num_scored(run: RunDirectory) -> int:
    return len({fact.id for fact in run.all(Scored)})  # at one rung or at several
