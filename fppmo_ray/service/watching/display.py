"""Listeners for people: a live bar on a terminal, one log line per generation for everybody."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fppmo_ray.service.watching.observation import Listener, Observation, Workforce

logger = logging.getLogger(__name__)


@contextmanager
def live_bar(console: Console) -> Iterator[Listener]:
    """A bar that moves as scores end, where the console is a terminal."""
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[status]}"),
        console=console,
        disable=not console.is_terminal,
    )
    task = bar.add_task("scores", total=None, status="")

    def show(seen: Observation) -> None:
        status = f"{seen.touched[-1]}  {_workers(seen.workforce)}" if seen.touched else ""
        bar.update(task, completed=seen.num_ended, total=seen.num_wanted, status=status)

    with bar:
        yield show


def generation_log() -> Listener:
    """Logs every generation once its last score has ended, and what a resumed search has."""
    began = time.monotonic()

    def log(seen: Observation) -> None:
        if seen.num_ended and not seen.ended:
            logger.info("resumed with %d of %d scores", seen.num_ended, seen.num_wanted)
        for generation in seen.touched:
            if generation.is_complete:
                seconds = time.monotonic() - began
                logger.info("%s  %s  after %.0f s", generation, _workers(seen.workforce), seconds)

    return log


def _workers(workforce: Workforce) -> str:
    return f"workers {workforce.placed} of {workforce.wanted}"
