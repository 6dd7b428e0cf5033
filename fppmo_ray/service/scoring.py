"""The search loop: proposals out to the workers, feedback back to the probability model."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from fppmo_ray.distribution import Feedback, Finalist, Proposal, pack_mask
from fppmo_ray.service.pool.work import Outcome, Work
from fppmo_ray.service.pool.worker_pool import WorkerPool
from fppmo_ray.service.probability_model import Advance, Rehearsal
from fppmo_ray.service.record.facts import Asked, Failed, Scored, Updated, ends_of_scores
from fppmo_ray.service.record.run_directory import RunDirectory
from fppmo_ray.service.watching.progress import Progress


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """How the proposals of one round are scored."""

    round: int
    weights: Any
    """Reference to the round's ``Basis`` in the object store."""
    rung: int
    """Fine-tuning steps of a whole score: of proposals that name no rung, and of finalists."""
    timeout: float | None
    stage: int = 0
    """Of gradual pruning."""
    ids: range | None = None
    """The proposals of the stage; None: all."""

    def steps(self, rung: int | None) -> int:
        """Fine-tuning steps of a score at a rung."""
        return self.rung if rung is None else rung


ScoreKey = tuple[int, int]
"""Which one: the proposal's id, and the rung in fine-tuning steps."""


class Proposer(Protocol):
    """What proposes masks and learns how they fared: a ``ModelHandle``, or a rival of it."""

    def advance(self, feedback: Sequence[Feedback], /) -> Advance:
        """See ``ProbabilityModel.advance``; told all feedback of a journal, it replays it.

        What it proposes is scored once at each rung that it is proposed at.
        """

    def finalists(self) -> list[Finalist]:
        """The masks worth a second look, the importance-only one among them."""


class Rounds(Protocol):
    """Which weights the proposals of a generation are scored with: ``Adaptations``, say."""

    def plan(self, rehearsals: Sequence[Rehearsal], /) -> None:
        """Learn which generations begin a round, before anybody asks about their proposals."""

    def scoring(self, generation: int, /) -> Scoring | None:
        """How proposals of a generation are scored; None: their weights are still to come."""

    def take(self, outcome: Outcome, /) -> bool:
        """Whether an outcome is of work on the weights; if so, go on with that."""


@dataclass(frozen=True)
class _OneRound:
    """Weights that never change."""

    only: Scoring

    def plan(self, rehearsals: Sequence[Rehearsal], /) -> None:
        """There is nothing to adapt."""

    def scoring(self, generation: int, /) -> Scoring:
        return self.only

    def take(self, outcome: Outcome, /) -> bool:
        return False


def score_proposals(
    model: Proposer,
    pool: WorkerPool,
    run: RunDirectory,
    scoring: Scoring,
    progress: Progress,
    rounds: Rounds | None = None,
) -> None:
    """Score until the probability model asks for no more.

    What the journal holds is told to the model first, so a fresh search is the resumption of an
    empty one. Feedback is durable before the model hears of it.

    Raises:
        RuntimeError: all proposals of a generation failed by themselves, or all at one rung.
        SearchStopped: a stop was requested; what was running is recorded.
        ValueError: the model no longer proposes what the journal says it proposed.
    """
    known = _feedback(run, scoring)
    progress.begin(known.values(), pool)
    own = [item for item in known.values() if not scoring.ids or item.proposal_id in scoring.ids]
    queue = _Queue(pool, rounds or _OneRound(scoring), scoring, known)
    _take_in(model.advance(own), run, queue)
    while pool.num_unfinished:
        ended = queue.next_ended()
        if ended:
            run.record(fact for fact, _ in ended)
            known |= {(feedback.proposal_id, feedback.rung): feedback for _, feedback in ended}
            _take_in(model.advance([feedback for _, feedback in ended]), run, queue)
            progress.ended(ended, pool)


class _Queue:
    """Proposals on their way to the workers; those whose weights are still to come wait.

    Args:
        pool: Where they are scored.
        rounds: Says with which weights.
        scoring: Of any round.
        known: All scores that have ended; it grows.
    """

    def __init__(
        self,
        pool: WorkerPool,
        rounds: Rounds,
        scoring: Scoring,
        known: Mapping[ScoreKey, Feedback],
    ) -> None:
        self.rounds = rounds
        self._pool = pool
        self._scoring = scoring
        self._known = known
        self._waiting: dict[ScoreKey, Proposal] = {}
        self._round_of: dict[ScoreKey, int] = {}

    def submit(self, proposals: Iterable[Proposal]) -> None:
        """Submit what has neither a score nor a place in the queue."""
        for item in proposals:
            key = item.proposal_id, self._scoring.steps(item.rung)
            if key in self._known or self._pool.holds(key):
                continue
            scoring = self.rounds.scoring(item.generation)
            if scoring is None:
                self._waiting[key] = item
            else:
                self._round_of[key] = scoring.round
                self._pool.submit(_work(item, scoring))

    def next_ended(self) -> list[tuple[Scored | Failed, Feedback]]:
        """Wait until some work has ended; the scores among it."""
        outcomes = [item for item in self._pool.next_outcomes() if not self.rounds.take(item)]
        facts = [_fact(item, self._round_of[item.work.tag]) for item in outcomes]
        waiting, self._waiting = self._waiting, {}
        self.submit(waiting.values())
        return [(fact, _feedback_of(fact, self._scoring)) for fact in facts]


def _feedback(run: RunDirectory, scoring: Scoring) -> dict[ScoreKey, Feedback]:
    """What the journal says of each score; of two facts, the later counts.

    Failures at a rung of a generation in which nothing was scored are tried again: what stopped
    the search then (a timeout, a full disk) may be mended now.
    """
    generation_of = {fact.id: fact.generation for fact in run.all(Asked)}
    scored = {(generation_of[fact.id], fact.rung) for fact in run.all(Scored)}
    ends = [_feedback_of(fact, scoring) for fact in ends_of_scores(run.facts).values()]
    return {
        (item.proposal_id, item.rung): item
        for item in ends
        if (generation_of[item.proposal_id], item.rung) in scored
    }


def _feedback_of(fact: Scored | Failed, scoring: Scoring) -> Feedback:
    if isinstance(fact, Failed):
        return Feedback(proposal_id=fact.id, error=fact.error, rung=scoring.steps(fact.rung))
    return Feedback(
        proposal_id=fact.id,
        val_loss=fact.val_loss,
        val_accuracy=fact.val_accuracy,
        rung=fact.rung,
    )


def _take_in(
    advance: Advance,
    run: RunDirectory,
    queue: _Queue,
) -> None:
    """Journal what is new, and queue what is proposed."""
    if not advance.proposals and not advance.updates:
        return
    _record_updates(advance, run)
    asked = {fact.id: fact for fact in run.all(Asked)}
    new = [item for item in advance.proposals if item.proposal_id not in asked]
    _require_as_journaled(advance.proposals, asked)
    run.record(
        Asked(
            id=item.proposal_id,
            generation=item.generation,
            macs=item.macs,
            mask=pack_mask(item.keep),
            macs_cut=item.macs_cut,
        )
        for item in new
    )
    queue.rounds.plan(advance.rehearsals)
    queue.submit(advance.proposals)


def _record_updates(advance: Advance, run: RunDirectory) -> None:
    done = {fact.generation for fact in run.all(Updated)}
    run.record(
        Updated(generation=update.generation, keep_share=list(update.keep_share))
        for update in advance.updates
        if update.generation not in done
    )


def _require_as_journaled(proposals: Iterable[Proposal], asked: dict[int, Asked]) -> None:
    for item in proposals:
        fact = asked.get(item.proposal_id)
        if fact is not None and fact.mask != pack_mask(item.keep):
            raise ValueError(
                f"replaying the journal gives another mask for proposal {item.proposal_id}; "
                "resume with the package versions that the journal's first line names"
            )


def _work(proposal: Proposal, scoring: Scoring) -> Work:
    proposal_id, steps = proposal.proposal_id, scoring.steps(proposal.rung)
    tag: ScoreKey = proposal_id, steps
    at_rung = "" if proposal.rung is None else f" at {steps} steps"
    return Work(
        name=f"proposal {proposal_id}{at_rung}",
        method="score",
        arguments=(scoring.weights, proposal.keep, proposal.score_seed, "search_val", steps),
        tag=tag,
        timeout=scoring.timeout,
        size=steps,
    )


def score_error(outcome: Outcome) -> str | None:
    """The error that a score ended with, or that its numbers are; None: it is a score."""
    if outcome.error is not None:
        return outcome.error
    loss, accuracy = outcome.value.val_loss, outcome.value.val_accuracy
    if math.isfinite(loss) and (accuracy is None or math.isfinite(accuracy)):
        return None
    if accuracy is None:
        return f"the score is not finite: {-loss}"
    return f"the score is not finite: loss {loss}, accuracy {accuracy}"


def _fact(outcome: Outcome, round_: int) -> Scored | Failed:
    tag: ScoreKey = outcome.work.tag
    proposal_id, steps = tag
    error = score_error(outcome)
    if error is not None:
        return Failed(id=proposal_id, error=error, rung=steps)
    score = outcome.value
    return Scored(
        id=proposal_id,
        round=round_,
        rung=steps,
        val_loss=score.val_loss,
        val_accuracy=score.val_accuracy,
        seconds=score.seconds,
        worker=outcome.worker,
        at=time.time(),
    )
