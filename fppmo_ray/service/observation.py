"""A running search at one moment: the one source of display, log and metrics."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from fppmo_ray.distribution import Feedback
from fppmo_ray.distribution.optimizer import RankBy
from fppmo_ray.service.pool import WorkerPool


@dataclass(frozen=True, kw_only=True)
class Workforce:
    """The workers and what is left for them to do."""

    wanted: int
    placed: int
    """Workers that the cluster has room for so far."""
    busy: int
    queued: int
    """Proposals that wait for a worker."""
    requeued: int
    """Scores that were lost with their worker, or taken from it, since the driver started."""

    @classmethod
    def of(cls, pool: WorkerPool) -> Workforce:
        """As a pool is now."""
        return cls(
            wanted=pool.num_workers,
            placed=pool.num_ready,
            busy=pool.num_busy,
            queued=pool.num_queued,
            requeued=pool.num_requeued,
        )


@dataclass(frozen=True, kw_only=True)
class Generation:
    """The proposals of a generation that have ended."""

    index: int
    size: int
    feedback: tuple[Feedback, ...] = field(repr=False)

    @property
    def is_complete(self) -> bool:
        """Whether all its proposals have ended."""
        return len(self.feedback) == self.size

    @property
    def num_failed(self) -> int:
        """Proposals that ended by errors of their own."""
        return sum(item.failed for item in self.feedback)

    @property
    def losses(self) -> list[float]:
        """``val_loss`` of those that were scored."""
        return [item.val_loss for item in self.feedback if item.val_loss is not None]

    @property
    def accuracies(self) -> list[float]:
        """``val_accuracy`` of those that were scored."""
        return [item.val_accuracy for item in self.feedback if item.val_accuracy is not None]

    def __str__(self) -> str:
        """As people read it in the log."""
        failed = f"failed {self.num_failed}/{len(self.feedback)}"
        if not self.accuracies:
            return f"generation {self.index}  {failed}"
        best, mean = max(self.accuracies), statistics.fmean(self.accuracies)
        return f"generation {self.index}  best {best:.4f}  mean {mean:.4f}  {failed}"


@dataclass(frozen=True, kw_only=True)
class Ended:
    """A proposal that has just ended."""

    feedback: Feedback
    seconds: float | None = None
    """Spent on the score by the worker; None where there is none."""


@dataclass(frozen=True, kw_only=True)
class Observation:
    """A search after some of its proposals have ended."""

    ended: tuple[Ended, ...] = ()
    """Since the observation before; none in the first one, which tells of the journal."""
    num_ended: int
    num_proposals: int
    touched: tuple[Generation, ...] = ()
    """The generations of the proposals that have just ended."""
    num_complete: int
    """Generations whose proposals have all ended."""
    best: Feedback | None = None
    """Of all proposals, by what ranks them."""
    workforce: Workforce


Listener = Callable[[Observation], None]


class Tally:
    """Counts a search's proposals as they end.

    Args:
        num_proposals: Of the whole search.
        population_size: Proposals per generation.
        rank_by: The score that says which proposal is best.
    """

    def __init__(self, num_proposals: int, population_size: int, rank_by: RankBy) -> None:
        self._num_proposals = num_proposals
        self._population_size = population_size
        self._rank_by = rank_by
        self._feedback: dict[int, Feedback] = {}
        self._complete: set[int] = set()
        self._best: Feedback | None = None

    def begin(self, known: Iterable[Feedback], workforce: Workforce) -> Observation:
        """Count what the journal already holds."""
        self._count(known)
        return self._observation((), (), workforce)

    def count(self, ended: Sequence[Ended], workforce: Workforce) -> Observation:
        """Count what has just ended."""
        touched = self._count(item.feedback for item in ended)
        return self._observation(ended, touched, workforce)

    def _count(self, feedback: Iterable[Feedback]) -> list[Generation]:
        """Take feedback in; the generations that it belongs to."""
        new = {item.proposal_id: item for item in feedback}
        self._feedback |= new
        known_best = [] if self._best is None else [self._best]
        scored = [item for item in [*known_best, *new.values()] if not item.failed]
        self._best = min(scored, key=self._order, default=None)
        indices = {proposal_id // self._population_size for proposal_id in new}
        touched = [self._generation(index) for index in sorted(indices)]
        self._complete |= {generation.index for generation in touched if generation.is_complete}
        return touched

    def _order(self, feedback: Feedback) -> tuple[float, int]:
        """Best first; the first of equals, in whatever order they end."""
        score = getattr(feedback, self._rank_by)
        return (score if self._rank_by == "val_loss" else -score), feedback.proposal_id

    def _generation(self, index: int) -> Generation:
        first = index * self._population_size
        size = min(self._population_size, self._num_proposals - first)
        ids = range(first, first + size)
        members = tuple(self._feedback[item] for item in ids if item in self._feedback)
        return Generation(index=index, size=size, feedback=members)

    def _observation(
        self, ended: Sequence[Ended], touched: Sequence[Generation], workforce: Workforce
    ) -> Observation:
        return Observation(
            ended=tuple(ended),
            num_ended=len(self._feedback),
            num_proposals=self._num_proposals,
            touched=tuple(touched),
            num_complete=len(self._complete),
            best=self._best,
            workforce=workforce,
        )
