"""Progress of a search: one observation after every turn of its loop, told to all who listen."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console

from fppmo_ray.distribution import Feedback, OptimizerSettings
from fppmo_ray.service.pool.worker_pool import WorkerPool
from fppmo_ray.service.record.facts import Asked, Failed, Scored, Started
from fppmo_ray.service.record.run_directory import RunDirectory
from fppmo_ray.service.watching.display import generation_log, live_bar
from fppmo_ray.service.watching.metrics import metrics_of
from fppmo_ray.service.watching.observation import Ended, Listener, Observation, Tally, Workforce


class Progress:
    """Tells its listeners what happens. Made by ``watch``."""

    def __init__(self, tally: Tally, listeners: Sequence[Listener]) -> None:
        self._tally = tally
        self._listeners = listeners
        self._has_begun = False

    def begin(self, known: Iterable[Feedback], pool: WorkerPool) -> None:
        """Tell of what the journal already holds; to a later stage that is no news."""
        if not self._has_begun:
            self._has_begun = True
            self._tell(self._tally.begin(known, Workforce.of(pool)))

    def ended(self, ended: Iterable[tuple[Scored | Failed, Feedback]], pool: WorkerPool) -> None:
        """Tell of scores that have ended since, and of the workers as they are now."""
        items = [
            Ended(feedback=feedback, seconds=fact.seconds if isinstance(fact, Scored) else None)
            for fact, feedback in ended
        ]
        self._tell(self._tally.count(items, Workforce.of(pool)))

    def _tell(self, seen: Observation) -> None:
        for listener in self._listeners:
            listener(seen)


@contextmanager
def watch(run: RunDirectory, settings: OptimizerSettings, console: Console) -> Iterator[Progress]:
    """Show a search on the console, in the log and in Ray's metrics.

    Args:
        run: The search, started.
        settings: Its proposals, generations, rungs and ranking.
        console: Where a live bar is drawn if it is a terminal.
    """

    def macs(proposal_id: int) -> int:
        return next(fact.macs for fact in run.all(Asked) if fact.id == proposal_id)

    [started] = run.all(Started)
    with live_bar(console) as bar:
        listeners = [bar, generation_log(), metrics_of(started.search_id, macs)]
        yield Progress(Tally(settings), listeners)
