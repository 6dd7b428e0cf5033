"""A running search at one moment: the one source of display, log and metrics."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import Any

from fppmo_ray.distribution import Feedback, Merit, OptimizerSettings, Proposal
from fppmo_ray.service.pool.worker_pool import WorkerPool


@dataclass(frozen=True, kw_only=True)
class Workforce:
    """The workers and the scores that wait for them."""

    wanted: int
    """Workers that were asked for."""
    placed: int
    """Workers that the cluster has room for so far."""
    busy: int
    """Workers with a score in hand."""
    queued: int
    """Scores that wait for a worker."""
    requeued: int
    """Scores that were lost with their worker, or taken from it, since the driver started."""


def workforce_of(pool: WorkerPool[Any]) -> Workforce:
    """Return the state of a pool."""
    return Workforce(
        wanted=pool.num_workers,
        placed=pool.num_ready,
        busy=pool.num_busy,
        queued=pool.num_queued,
        requeued=pool.num_requeued,
    )


@dataclass(frozen=True, kw_only=True)
class Generation:
    """The feedback of a generation so far."""

    index: int
    """Number of the generation, counted from 0."""
    is_complete: bool
    """Whether all of its proposals have feedback."""
    num_ended: int
    """Proposals that have feedback."""
    num_failed: int
    """Proposals that ended with an error of their own."""
    by_budget: tuple[tuple[Feedback, ...], ...] = field(repr=False)
    """Feedback of each budget's proposals, by id."""
    rank: Callable[[Iterable[Feedback]], list[Feedback]] = field(repr=False)
    """Returns the scores among feedback, best first."""

    # Ranked when asked: that takes milliseconds in a large generation, and scores end often.
    @cached_property
    def ranked(self) -> tuple[Feedback, ...]:
        """Scores of all budgets, best first."""
        return tuple(self.rank(chain.from_iterable(self.by_budget)))

    @cached_property
    def ranked_by_budget(self) -> tuple[tuple[Feedback, ...], ...]:
        """Scores of each budget, best first."""
        return tuple(tuple(self.rank(of_budget)) for of_budget in self.by_budget)

    def __str__(self) -> str:
        """Return the line of the log; with several budgets, each has its own best and mean."""
        failed = f"failed {self.num_failed}/{self.num_ended}"
        scores = [[_score(item) for item in ranked] for ranked in self.ranked_by_budget if ranked]
        if not scores:
            return f"generation {self.index}  {failed}"
        best = " ".join(f"{of_budget[0]:.4f}" for of_budget in scores)
        mean = " ".join(f"{statistics.fmean(of_budget):.4f}" for of_budget in scores)
        return f"generation {self.index}  best {best}  mean {mean}  {failed}"


@dataclass(frozen=True, kw_only=True)
class Observation:
    """A search after some of its scores have ended."""

    ended: tuple[Feedback, ...] = ()
    """Feedback since the observation before; none in the first one, which tells of the journal."""
    num_ended: int
    """Proposals that have feedback."""
    num_wanted: int
    """Proposals of the whole search."""
    touched: tuple[Generation, ...] = ()
    """The generations of the scores that have just ended."""
    num_complete: int
    """Generations whose proposals all have feedback."""
    best: tuple[Proposal, Feedback] | None = None
    """The best of all scores."""
    workforce: Workforce
    """The workers at this moment."""


Listener = Callable[[Observation], None]


class Tally:
    """Counts a search's scores as they end, and keeps the best one.

    Args:
        settings: The search's proposals, generations and budgets.
        merit: The order of its scores.
    """

    def __init__(self, settings: OptimizerSettings, merit: Merit) -> None:
        self._settings = settings
        self._merit = merit
        self._proposals: dict[int, Proposal] = {}
        self._feedback: dict[int, Feedback] = {}
        self._complete: set[int] = set()
        self._best: Feedback | None = None

    def propose(self, proposals: Iterable[Proposal]) -> None:
        """Take in proposals, before their feedback."""
        self._proposals |= {proposal.proposal_id: proposal for proposal in proposals}

    def begin(self, known: Iterable[Feedback], workforce: Workforce) -> Observation:
        """Count the feedback that the journal holds.

        Args:
            known: Feedback of proposals that were taken in.
            workforce: The workers now.
        """
        self._count(list(known))
        return self._observation((), (), workforce)

    def count(self, ended: Sequence[Feedback], workforce: Workforce) -> Observation:
        """Count feedback that has just come.

        Args:
            ended: Feedback of proposals that were taken in.
            workforce: The workers now.
        """
        return self._observation(ended, self._count(ended), workforce)

    def _count(self, feedback: Sequence[Feedback]) -> list[Generation]:
        """Take feedback in; return the generations that it belongs to."""
        self._feedback |= {item.proposal_id: item for item in feedback}
        known_best = [] if self._best is None else [self._best]
        self._best = self._merit.best([*known_best, *feedback], self._parameters_of)
        indices = {item.proposal_id // self._settings.population_size for item in feedback}
        touched = [self._generation(index) for index in sorted(indices)]
        self._complete |= {generation.index for generation in touched if generation.is_complete}
        return touched

    def _generation(self, index: int) -> Generation:
        by_budget = tuple(
            tuple(self._feedback[i] for i in ids if i in self._feedback)
            for ids in self._settings.ids_by_budget(index)
        )
        feedback = [item for of_budget in by_budget for item in of_budget]
        return Generation(
            index=index,
            is_complete=len(feedback) == len(self._settings.ids(index)),
            num_ended=len(feedback),
            num_failed=sum(item.failed for item in feedback),
            by_budget=by_budget,
            rank=self._ranked,
        )

    def _ranked(self, feedback: Iterable[Feedback]) -> list[Feedback]:
        return self._merit.ranked(feedback, self._parameters_of)

    def _parameters_of(self, proposal_id: int) -> int:
        return self._proposals[proposal_id].parameters

    def _observation(
        self, ended: Sequence[Feedback], touched: Sequence[Generation], workforce: Workforce
    ) -> Observation:
        best = self._best
        return Observation(
            ended=tuple(ended),
            num_ended=len(self._feedback),
            num_wanted=self._settings.num_proposals,
            touched=tuple(touched),
            num_complete=len(self._complete),
            best=None if best is None else (self._proposals[best.proposal_id], best),
            workforce=workforce,
        )


def _score(feedback: Feedback) -> float:
    score = feedback.score
    assert score is not None  # only scores are ranked
    return score
