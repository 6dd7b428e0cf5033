"""Ending a search early on request, such that it can be gone on with."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from fppmo_ray.service.record.facts import Scored
from fppmo_ray.service.record.run_directory import RunDirectory


class SearchStopped(RuntimeError):
    """A search ended early because somebody asked for it; its journal can be resumed."""


class StopRequest:
    """Whether somebody wants the search to end.

    Args:
        how_far: For the sentence that the search ends with: ``37 of 320 proposals are scored``.
    """

    def __init__(self, how_far: Callable[[], str]) -> None:
        self._how_far = how_far
        self.is_made = False

    def stopped(self) -> SearchStopped:
        """The error to end with."""
        return SearchStopped(f"stopped on request: {self._how_far()}; go on with --resume")


@contextmanager
def stop_on_signal(run: RunDirectory, num_proposals: int) -> Iterator[StopRequest]:
    """Turn the first SIGTERM or SIGINT into a request; a second one does what it did before.

    Signals reach the main thread alone: in any other, the request is never made. Enter this after
    Ray has started, which handles SIGTERM in a way of its own.
    """
    request = StopRequest(lambda: f"{_num_scored(run)} of {num_proposals} proposals are scored")
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
