"""The search loop: propose, score, tell."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import numpy as np

from fppmo_ray.distribution import Feedback, Proposal
from fppmo_ray.service.journal.facts import Updated, latest_feedback
from fppmo_ray.service.journal.run_directory import RunDirectory
from fppmo_ray.service.pool.call import Call
from fppmo_ray.service.pool.worker_pool import WorkerPool
from fppmo_ray.service.probability_model import Proposer, Step
from fppmo_ray.service.progress.display import Progress

W = TypeVar("W")


def score_proposals(
    model: Proposer,
    pool: WorkerPool[W],
    run: RunDirectory,
    score_call: Callable[[Proposal], Call[W, Feedback]],
    progress: Progress,
) -> None:
    """Score proposals until the probability model asks for no more.

    What the journal holds is told to the model first, so a fresh search is the resumption of an
    empty one. Feedback is durable before the model is told it.

    Args:
        model: Proposes masks and learns from feedback.
        pool: Workers with nothing unfinished.
        run: Where proposals and feedback are recorded.
        score_call: Returns the call that scores a proposal.
        progress: Shows people what happens.

    Raises:
        RuntimeError: all proposals of a generation failed.
        SearchStopped: a stop was requested; what was running is recorded.
        ValueError: the model does not propose what the journal says it proposed.
    """
    known = _known_feedback(run)
    recorded = {proposal.proposal_id: proposal for proposal in run.all(Proposal)}
    in_flight: dict[Call[W, Feedback], Proposal] = {}

    def take_in(step: Step) -> None:
        # A replayed model repeats what is recorded; a second copy would take its memory for good.
        progress.proposed([one for one in step.proposals if one.proposal_id not in recorded])
        _record(step, recorded, run)
        in_work = {proposal.proposal_id for proposal in in_flight.values()}
        for proposal in step.proposals:
            # A restarted model proposes everything anew.
            if proposal.proposal_id not in known and proposal.proposal_id not in in_work:
                call = score_call(proposal)
                in_flight[call] = proposal
                pool.submit(call)

    progress.begin(recorded.values(), known.values(), pool)
    take_in(model.step(list(known.values())))
    while in_flight:
        ended = pool.next_ended()
        new = [feedback_of_call(call, in_flight.pop(call)) for call in ended]
        run.record(new)
        known |= {feedback.proposal_id: feedback for feedback in new}
        take_in(model.step(new))
        progress.ended(new, pool)


def feedback_of_call(call: Call[W, Feedback], proposal: Proposal) -> Feedback:
    """Return the feedback that a call ended with; a call that failed gives a failure.

    Args:
        call: A call that has ended.
        proposal: The proposal that it scored.
    """
    now = time.time()
    if call.error is not None:
        failure = Feedback(proposal_id=proposal.proposal_id, error=call.error)
        return replace(failure, worker=call.worker, at=now)
    return replace(call.value, worker=call.worker, at=now)


def count_scored(run: RunDirectory) -> int:
    """Return the number of proposals that have a score."""
    return len({fact.proposal_id for fact in run.all(Feedback) if not fact.failed})


def _known_feedback(run: RunDirectory) -> dict[int, Feedback]:
    """Return the journal's feedback by proposal, for the model to be told.

    Failures of a generation in which nothing has a score are left out, so that they are tried
    again: what stopped the search then (a timeout, a full disk) may be mended now.
    """
    generation_of = {item.proposal_id: item.generation for item in run.all(Proposal)}
    latest = latest_feedback(run.facts)
    scored = {generation_of[item.proposal_id] for item in latest.values() if not item.failed}
    return {i: item for i, item in latest.items() if generation_of[i] in scored}


def _record(step: Step, recorded: dict[int, Proposal], run: RunDirectory) -> None:
    """Journal the updates and proposals that are new; refuse proposals that have changed."""
    done = {fact.generation for fact in run.all(Updated)} if step.updates else set()
    new = [item for item in step.proposals if item.proposal_id not in recorded]
    for item in step.proposals:
        before = recorded.setdefault(item.proposal_id, item)
        if not np.array_equal(before.keep, item.keep):
            raise ValueError(
                f"replaying the journal gives another mask for proposal {item.proposal_id}; "
                "resume with the package versions that the journal's first line names"
            )
    run.record([fact for fact in step.updates if fact.generation not in done])
    run.record(new)
