"""A running search at one moment: the one source of display, log and metrics."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from fppmo_ray.distribution import Feedback, OptimizerSettings, Standings
from fppmo_ray.service.pool.worker_pool import WorkerPool


@dataclass(frozen=True, kw_only=True)
class Workforce:
    """The workers and what is left for them to do."""

    wanted: int
    placed: int
    """Workers that the cluster has room for so far."""
    busy: int
    queued: int
    """Scores that wait for a worker."""
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
    """The scores of a generation that have ended."""

    index: int
    is_complete: bool
    """Whether all that are wanted have."""
    feedback: tuple[Feedback, ...] = field(repr=False)
    """Of all its rungs."""
    heats: tuple[range, ...] = field(repr=False)
    """The ids of its proposals for each of the budgets."""

    @property
    def num_failed(self) -> int:
        """Scores that ended by errors of their proposals' own."""
        return sum(item.failed for item in self.feedback)

    @property
    def losses(self) -> list[float]:
        """``val_loss`` of those that were scored at the deepest rung so far."""
        return [item.val_loss for item in _deepest(self.feedback) if item.val_loss is not None]

    @property
    def accuracies(self) -> list[float]:
        """``val_accuracy`` of those that were scored at the deepest rung so far and have one."""
        deepest = _deepest(self.feedback)
        return [item.val_accuracy for item in deepest if item.val_accuracy is not None]

    def __str__(self) -> str:
        """As people read it in the log; of several budgets, each has its own best and mean."""
        failed = f"failed {self.num_failed}/{len(self.feedback)}"
        by_heat = [
            _merits([item for item in self.feedback if item.proposal_id in heat])
            for heat in self.heats
        ]
        scored = [merits for merits in by_heat if merits]
        if not scored:
            return f"generation {self.index}  {failed}"
        best = " ".join(f"{max(merits):.4f}" for merits in scored)
        mean = " ".join(f"{statistics.fmean(merits):.4f}" for merits in scored)
        return f"generation {self.index}  best {best}  mean {mean}  {failed}"


def _deepest(feedback: Sequence[Feedback]) -> list[Feedback]:
    """Those that were scored at the deepest rung of any."""
    scored = [item for item in feedback if not item.failed]
    rung = max((item.rung for item in scored), default=0)
    return [item for item in scored if item.rung == rung]


def _merits(feedback: Sequence[Feedback]) -> list[float]:
    """What people read of a score: the accuracy; where there is none, the task's own score."""
    return [
        -item.val_loss if item.val_accuracy is None else item.val_accuracy
        for item in _deepest(feedback)
        if item.val_loss is not None
    ]


@dataclass(frozen=True, kw_only=True)
class Ended:
    """A score that has just ended."""

    feedback: Feedback
    seconds: float | None = None
    """Spent on the score by the worker; None where there is none."""


@dataclass(frozen=True, kw_only=True)
class Observation:
    """A search after some of its scores have ended."""

    ended: tuple[Ended, ...] = ()
    """Since the observation before; none in the first one, which tells of the journal."""
    num_ended: int
    """Scores: one of every proposal, and one at every deeper rung that it goes on to."""
    num_wanted: int
    """Scores of the whole search; fewer, once some of a generation have failed."""
    touched: tuple[Generation, ...] = ()
    """The generations of the scores that have just ended."""
    num_complete: int
    """Generations whose scores have all ended."""
    best: Feedback | None = None
    """Of all scores, by what ranks them."""
    workforce: Workforce


Listener = Callable[[Observation], None]


class Tally:
    """Counts a search's scores as they end.

    Args:
        settings: The search's proposals, generations, rungs and ranking.
    """

    def __init__(self, settings: OptimizerSettings) -> None:
        self._settings = settings
        self._standings = Standings(settings)
        generations = range(settings.num_generations)
        self._num_scores = {i: self._num_scores_of(i) for i in generations}
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
        new = list(feedback)
        for item in new:
            self._standings.add(item)
        known_best = [] if self._best is None else [self._best]
        scored = [item for item in [*known_best, *new] if not item.failed]
        self._best = min(scored, key=self._standings.order, default=None)
        indices = {item.proposal_id // self._settings.population_size for item in new}
        for index in indices:
            self._num_scores[index] = self._num_scores_of(index)
        touched = [self._generation(index) for index in sorted(indices)]
        self._complete |= {generation.index for generation in touched if generation.is_complete}
        return touched

    def _num_scores_of(self, index: int) -> int:
        return sum(self._standings.num_scores(heat) for heat in self._settings.heats(index))

    def _generation(self, index: int) -> Generation:
        heats = self._settings.heats(index)
        return Generation(
            index=index,
            is_complete=all(self._standings.is_over(heat) for heat in heats),
            feedback=tuple(self._standings.of(self._settings.ids(index))),
            heats=heats,
        )

    def _observation(
        self, ended: Sequence[Ended], touched: Sequence[Generation], workforce: Workforce
    ) -> Observation:
        return Observation(
            ended=tuple(ended),
            num_ended=len(self._standings),
            num_wanted=sum(self._num_scores.values()),
            touched=tuple(touched),
            num_complete=len(self._complete),
            best=self._best,
            workforce=workforce,
        )
