"""Live progress for a terminal, one log line per generation for everybody."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Iterable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from fppmo_ray.distribution import Feedback
from fppmo_ray.service.pool import WorkerPool

logger = logging.getLogger(__name__)


class Progress:
    """What the user sees of a search while it runs. Use as a context manager.

    Args:
        num_proposals: Proposals of the whole search.
        population_size: Proposals per generation.
        console: Where a live bar is drawn if it is a terminal.
    """

    def __init__(self, num_proposals: int, population_size: int, console: Console) -> None:
        self._num_proposals = num_proposals
        self._population_size = population_size
        self._feedback: dict[int, Feedback] = {}
        self._began = time.monotonic()
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[status]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("proposals", total=num_proposals, status="")

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def known(self, feedback: Iterable[Feedback]) -> None:
        """Count what the journal already holds."""
        self._feedback = {item.proposal_id: item for item in feedback}
        if self._feedback:
            logger.info("resumed with %d of %d proposals", len(self._feedback), self._num_proposals)
        self._bar.update(self._task, completed=len(self._feedback))

    def scored(self, proposal_id: int, feedback: Feedback, pool: WorkerPool) -> None:
        """Show one more proposal, and log its generation when it was the last of it."""
        self._feedback[proposal_id] = feedback
        generation = proposal_id // self._population_size
        members = self._members(generation)
        line = _describe(generation, members)
        workers = f"workers {pool.num_busy} busy of {pool.num_ready}"
        self._bar.update(self._task, completed=len(self._feedback), status=f"{line}  {workers}")
        if len(members) == self._size(generation):
            seconds = time.monotonic() - self._began
            logger.info("%s  %s  %.0f s", line, workers, seconds)

    def _members(self, generation: int) -> list[Feedback]:
        first = generation * self._population_size
        ids = range(first, first + self._size(generation))
        return [self._feedback[proposal_id] for proposal_id in ids if proposal_id in self._feedback]

    def _size(self, generation: int) -> int:
        first = generation * self._population_size
        return min(self._population_size, self._num_proposals - first)


def _describe(generation: int, members: list[Feedback]) -> str:
    accuracies = [item.val_accuracy for item in members if item.val_accuracy is not None]
    failed = len(members) - len(accuracies)
    if not accuracies:
        return f"generation {generation}  failed {failed}/{len(members)}"
    best, mean = max(accuracies), statistics.fmean(accuracies)
    line = f"generation {generation}  best {best:.4f}  mean {mean:.4f}"
    return f"{line}  failed {failed}/{len(members)}"
