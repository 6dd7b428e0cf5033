"""The search loop: the probability model proposes, workers score, the model is told."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import numpy as np
import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from fppmo_ray.distribution import (
    BoolArray,
    Feedback,
    Finalist,
    FloatArray,
    MaskOptimizer,
    OptimizerSettings,
    Proposal,
    PruningSpace,
)
from fppmo_ray.service.journal.facts import Updated, latest_feedback
from fppmo_ray.service.journal.run_directory import RunDirectory
from fppmo_ray.service.pool.call import Call
from fppmo_ray.service.pool.cluster import end_actor, last_line
from fppmo_ray.service.pool.worker_pool import WorkerPool
from fppmo_ray.service.progress import Progress

logger = logging.getLogger(__name__)

W = TypeVar("W")

_REPLAYED_TOGETHER = 4096


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
    for part in _parts(known):
        take_in(model.step(part))
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


def _parts(known: dict[int, Feedback]) -> Iterator[list[Feedback]]:
    """Yield feedback by ascending id, some at a time: the model answers with as many proposals."""
    ordered = [known[proposal_id] for proposal_id in sorted(known)]
    for start in range(0, len(ordered) or 1, _REPLAYED_TOGETHER):
        yield ordered[start : start + _REPLAYED_TOGETHER]


def _record(step: Step, recorded: dict[int, Proposal], run: RunDirectory) -> None:
    """Journal the updates and proposals that are new; refuse proposals that have changed."""
    done = {fact.generation for fact in run.all(Updated)} if step.updates else set()
    new = [item for item in step.proposals if item.proposal_id not in recorded]
    for item in step.proposals:
        before = recorded.setdefault(item.proposal_id, item)
        if before.packed != item.packed:
            raise ValueError(
                f"replaying the journal gives another mask for proposal {item.proposal_id}; "
                "resume with the package versions that the journal's first line names"
            )
    run.record([fact for fact in step.updates if fact.generation not in done])
    run.record(new)


_MAX_LOST = 5  # in a row: an actor that cannot live on the driver's node would be tried for ever
_ANSWER_S = 600.0  # a generation takes milliseconds, a long journal seconds


@dataclass(frozen=True, kw_only=True)
class Step:
    """The answer of the model to feedback."""

    proposals: tuple[Proposal, ...]
    """Masks to score."""
    updates: tuple[Updated, ...]
    """The distribution after each generation that the feedback completed."""


class Proposer(Protocol):
    """What proposes masks and learns from feedback: a ``ModelHandle``, or a rival method."""

    def step(self, feedback: Sequence[Feedback], /) -> Step:
        """Take feedback in and return what it makes possible; see ``ProbabilityModel.step``."""

    def finalists(self) -> list[Finalist]:
        """Return the masks worth rescoring, the importance-only one among them."""


class ProbabilityModel:
    """Runs as a Ray actor: one per search, on the driver's node, without a GPU.

    It holds nothing that the journal does not: a fresh one that is told all feedback is the same.

    Args:
        space: The space of masks.
        importance: ``(num_filters,)``, finite and > 0: where the probabilities start.
        settings: How to search.
        warm_start: Keep-logits of an earlier stage to start from instead; None: the importance.
        allocations: One mask per budget to start at; None: the search starts with equal shares.
    """

    def __init__(
        self,
        space: PruningSpace,
        importance: FloatArray,
        settings: OptimizerSettings,
        warm_start: FloatArray | None = None,
        allocations: Sequence[BoolArray] | None = None,
    ) -> None:
        self._space = space
        self._rule = settings.rule
        self._optimizer = MaskOptimizer(space, importance, settings, warm_start, allocations)

    def __repr__(self) -> str:
        """Return the name that the Ray dashboard shows; Ray reads it once."""
        return f"ProbabilityModel({self._rule}, {self._optimizer.num_generations} generations)"

    def step(self, feedback: Sequence[Feedback]) -> Step:
        """Take feedback in, and ask for every generation that it makes possible.

        Feedback waits until its proposal has been asked for, so all the feedback of a journal
        can be replayed in one call.

        Args:
            feedback: Feedback of proposals, in any order.

        Raises:
            ValueError: feedback for a proposal that is never asked for.
            RuntimeError: every proposal of a generation failed.
        """
        # Proposals are asked for in the order of their ids.
        waiting = deque(sorted(feedback, key=lambda item: item.proposal_id))
        proposals: list[Proposal] = []
        updates: list[Updated] = []
        while True:
            asked, num_waiting = self._optimizer.ask(), len(waiting)
            while waiting and self._optimizer.expects(waiting[0].proposal_id):
                updates += self._tell(waiting.popleft())
            if not asked and len(waiting) == num_waiting:
                break
            proposals += asked
        if waiting:
            unknown = sorted({item.proposal_id for item in waiting})
            raise ValueError(f"feedback for proposals that were never asked for: {unknown}")
        return Step(proposals=tuple(proposals), updates=tuple(updates))

    def finalists(self) -> list[Finalist]:
        """Return the masks worth rescoring, the importance-only one among them."""
        return self._optimizer.finalists()

    def keep_logits(self) -> FloatArray:
        """Return the latest beliefs, ``(num_filters,)``, for the next stage to start from."""
        return self._optimizer.keep_logits()

    def _tell(self, feedback: Feedback) -> list[Updated]:
        before = self._optimizer.generation
        self._optimizer.tell(feedback)
        return [self._update(after) for after in range(before + 1, self._optimizer.generation + 1)]

    def _update(self, after: int) -> Updated:
        kept = np.add.reduceat(1.0 - self._optimizer.prune_prob(after), self._space.offsets)
        return Updated(generation=after, keep_share=(kept / self._space.dense_widths).tolist())


class ModelHandle:
    """The driver's side of the model: it starts the actor anew and replays to it if it is lost.

    Args:
        space: See ``ProbabilityModel``.
        importance: See ``ProbabilityModel``.
        settings: See ``ProbabilityModel``.
        warm_start: See ``ProbabilityModel``.
        allocations: See ``ProbabilityModel``.
    """

    def __init__(
        self,
        space: PruningSpace,
        importance: FloatArray,
        settings: OptimizerSettings,
        warm_start: FloatArray | None = None,
        allocations: Sequence[BoolArray] | None = None,
    ) -> None:
        self._arguments = (space, importance, settings, warm_start, allocations)
        self._told: list[Feedback] = []
        self._actor = self._start()

    def step(self, feedback: Sequence[Feedback]) -> Step:
        """See ``ProbabilityModel.step``; a restarted actor answers with all it ever proposed.

        Raises:
            RuntimeError: the actor is lost again and again.
        """
        new = list(feedback)
        self._told += new

        def ask(is_fresh: bool) -> Any:
            # The dashboard sums up by names; Ray's own changes with the repr after the first call.
            call = self._actor.step.options(name="step")
            return call.remote(self._told if is_fresh else new)

        step: Step = self._answer(ask)
        return step

    def finalists(self) -> list[Finalist]:
        """See ``ProbabilityModel.finalists``.

        Raises:
            RuntimeError: the actor is lost again and again.
        """
        finalists: list[Finalist] = self._answer(self._asking("finalists"))
        return finalists

    def keep_logits(self) -> FloatArray:
        """See ``ProbabilityModel.keep_logits``.

        Raises:
            RuntimeError: the actor is lost again and again.
        """
        keep_logits: FloatArray = self._answer(self._asking("keep_logits"))
        return keep_logits

    def close(self) -> None:
        """Stop the actor."""
        end_actor(self._actor)

    def _asking(self, method: str) -> Callable[[bool], Any]:
        """Return a call of a method that changes nothing, for ``_answer``."""

        def ask(is_fresh: bool) -> Any:
            if is_fresh:
                self._actor.step.remote(self._told)  # before the next call: calls keep order
            return getattr(self._actor, method).remote()

        return ask

    def _answer(self, ask: Callable[[bool], Any]) -> Any:
        """Return the answer to a call; ``ask`` is told whether the actor was just started anew."""
        for num_lost in range(_MAX_LOST):
            try:
                return ray.get(ask(num_lost > 0), timeout=_ANSWER_S)
            except RayTaskError as error:
                raise error.cause from error  # the model's own sentence, without Ray's frame
            except RayError as error:
                reason = last_line(error)
                logger.warning("the probability model was lost and is replayed to: %s", reason)
                end_actor(self._actor)
                self._actor = self._start()
        raise RuntimeError(
            f"the probability model was lost {_MAX_LOST} times in a row on the driver's node "
            f"({_node_ip()}), most recently: {reason}; is that node short of "
            "memory? go on with --resume"
        )

    def _start(self) -> Any:
        # No CPU: a cluster's head often offers none, and the model needs next to nothing. Beside
        # the driver, since nodes of workers come and go.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        actor: Any = ray.remote(num_cpus=0)(ProbabilityModel)
        return actor.options(scheduling_strategy=here).remote(*self._arguments)


@contextmanager
def running_model(
    space: PruningSpace,
    importance: FloatArray,
    settings: OptimizerSettings,
    warm_start: FloatArray | None = None,
    allocations: Sequence[BoolArray] | None = None,
) -> Iterator[ModelHandle]:
    """Yield a running probability-model actor, and stop it afterwards.

    Args:
        space: See ``ProbabilityModel``.
        importance: See ``ProbabilityModel``.
        settings: See ``ProbabilityModel``.
        warm_start: See ``ProbabilityModel``.
        allocations: See ``ProbabilityModel``.
    """
    model = ModelHandle(space, importance, settings, warm_start, allocations)
    try:
        yield model
    finally:
        model.close()


def _node_ip() -> str:
    ip: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    return ip
