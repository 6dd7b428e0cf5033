"""Ending a search early on request, so that it can be resumed."""

from __future__ import annotations

import faulthandler
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import FrameType
from typing import Any


class SearchStopped(RuntimeError):
    """A search or a job of many ended early on request; nothing is lost."""


class StopRequest:
    """Whether a user asked for the work to end.

    Args:
        how_far: Returns how far the work is, for the message: ``37 of 320 proposals are scored``.
        way_on: How to go on, for the same message.
    """

    def __init__(self, how_far: Callable[[], str], way_on: str = "go on with --resume") -> None:
        self._how_far = how_far
        self._way_on = way_on
        self.is_made = False

    def stopped(self) -> SearchStopped:
        """Return the error that the work ends with."""
        return SearchStopped(f"stopped on request: {self._how_far()}; {self._way_on}")


@contextmanager
def process_ends_after(seconds: float) -> Iterator[None]:
    """End this process, with the stacks of its threads on stderr, if the block takes too long.

    It ends even while native code holds the interpreter's lock.

    Args:
        seconds: Seconds that the block may take.
    """
    faulthandler.dump_traceback_later(seconds, exit=True, file=2)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


_SIGNALS_STOP: ContextVar[bool] = ContextVar("signals stop searches", default=False)


@contextmanager
def signals_stop_searches() -> Iterator[None]:
    """Let SIGTERM or SIGINT end the searches of this block after the scores that are running.

    ``run_job`` does so. Outside of such a block ``search`` leaves the process's handlers alone.
    """
    token = _SIGNALS_STOP.set(True)
    try:
        yield
    finally:
        _SIGNALS_STOP.reset(token)


@contextmanager
def stop_on_signal(how_far: Callable[[], str]) -> Iterator[StopRequest]:
    """Yield the request that ends a search, made by a signal within ``signals_stop_searches``.

    Args:
        how_far: Returns how far the search is, for the message that it ends with.
    """
    request = StopRequest(how_far)
    if not _SIGNALS_STOP.get():
        yield request
        return
    with made_by_signal(request):
        yield request


_ENDS_AT_ONCE: Mapping[int, Any] = {
    signal.SIGTERM: signal.SIG_DFL,
    signal.SIGINT: signal.default_int_handler,
}


@contextmanager
def made_by_signal(request: StopRequest) -> Iterator[StopRequest]:
    """Turn the first SIGTERM or SIGINT into a request; a second one does what it did before.

    If the process ignored a signal, as SIGINT behind ``nohup ... &``, a second one ends it as well.
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
        for ignored in (number for number in before if before[number] is signal.SIG_IGN):
            signal.signal(ignored, _ENDS_AT_ONCE[ignored])

    for number in before:
        signal.signal(number, obey)
    try:
        yield request
    finally:
        restore()
