"""Progress for people: one line of the log per generation, and further listeners."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from fppmo_ray.distribution import Feedback, Merit, OptimizerSettings, Proposal
from fppmo_ray.service.journal.facts import Started
from fppmo_ray.service.journal.run_directory import RunDirectory
from fppmo_ray.service.pool.worker_pool import WorkerPool
from fppmo_ray.service.progress.metrics import metrics_of
from fppmo_ray.service.progress.observation import (
    Listener,
    Observation,
    Tally,
    Workforce,
    workforce_of,
)
from fppmo_ray.service.progress.spread import spread_warning

logger = logging.getLogger(__name__)


class Progress:
    """Tells its listeners what happens in a search. Made by ``watch``.

    Args:
        tally: Counts the scores.
        listeners: Functions that are given every observation.
    """

    def __init__(self, tally: Tally, listeners: Sequence[Listener]) -> None:
        self._tally = tally
        self._listeners = listeners

    def begin(
        self, proposals: Iterable[Proposal], known: Iterable[Feedback], pool: WorkerPool[Any]
    ) -> None:
        """Tell what the journal already holds.

        Args:
            proposals: The journal's proposals.
            known: Their feedback that counts.
            pool: The workers.
        """
        self._tally.propose(proposals)
        self._tell(self._tally.begin(known, workforce_of(pool)))

    def proposed(self, proposals: Iterable[Proposal]) -> None:
        """Take in new proposals, which no listener is told before they have feedback."""
        self._tally.propose(proposals)

    def ended(self, feedback: Sequence[Feedback], pool: WorkerPool[Any]) -> None:
        """Tell the feedback that has just come.

        Args:
            feedback: The feedback.
            pool: The workers.
        """
        self._tell(self._tally.count(feedback, workforce_of(pool)))

    def _tell(self, seen: Observation) -> None:
        for listener in self._listeners:
            listener(seen)


@contextmanager
def watch(
    run: RunDirectory, settings: OptimizerSettings, merit: Merit, listeners: Sequence[Listener] = ()
) -> Iterator[Progress]:
    """Show a search in the log and in Ray's metrics, and tell further listeners of it.

    Args:
        run: The search, started.
        settings: Its proposals, generations and budgets.
        merit: The order of its scores.
        listeners: Further functions that are given every observation.
    """
    [started] = run.all(Started)
    own = [generation_log(), spread_warning(), metrics_of(started.search_id)]
    yield Progress(Tally(settings, merit), [*listeners, *own])


def generation_log() -> Listener:
    """Return a listener that logs each generation when its last score has ended."""
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
