"""The choice of a search: finalists rescored with fresh seeds on images no score has seen."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fppmo_ray.distribution import Finalist, FloatArray, Merit
from fppmo_ray.pruning import Score
from fppmo_ray.service.dense_weights import Context
from fppmo_ray.service.journal.artifacts import ALLOCATION, IMPORTANCE_ONLY
from fppmo_ray.service.journal.facts import Chosen, Fact, Rescored
from fppmo_ray.service.journal.run_directory import RunDirectory
from fppmo_ray.service.pool.call import Call
from fppmo_ray.service.worker_protocol import SharedWeights, Worker

logger = logging.getLogger(__name__)

_RESCORE_STREAM = 1  # seeds [seed, repeat, 1]: never those of a generation, which are pairs


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The result of a search at one budget, before anything is fine-tuned."""

    chosen: Finalist
    """The finalist with the best mean score."""
    importance_only: Finalist
    """The mask without feedback, for comparison."""
    allocation: Finalist | None = None
    """The mask of the allocated widths; None where the search did not start there."""

    @property
    def macs_cut(self) -> float | None:
        """The budget, in a search with several; else None."""
        return self.chosen.macs_cut


@dataclass(frozen=True, kw_only=True)
class Found:
    """The result of a search before anything is fine-tuned."""

    choices: Sequence[Choice]
    """One for every budget, the widest first."""
    weights: SharedWeights
    """The dense weights that the chosen networks are cut from."""
    given: SharedWeights
    """The dense weights that the search began with: the compared networks are cut from them, and
    distillation learns from them."""
    searches: Sequence[Sequence[Fact]]
    """The facts of every search that scored masks: this one's, or those of each stage."""
    keep_logits: FloatArray | None = None
    """The distribution's keep-logits at the end, ``(num_filters,)``; None: the model has none."""

    @property
    def stages(self) -> int:
        """Stages of gradual pruning, at least 1."""
        return len(self.searches)


@dataclass(frozen=True, eq=False)
class _Rescoring:
    """One more score of a finalist."""

    finalist: Finalist
    split: str
    repeat: int


_Key = tuple[str, bytes]


def choose(finalists: Sequence[Finalist], context: Context, weights: SharedWeights) -> list[Choice]:
    """Rescore all finalists on choose-val and keep the one with the best mean score.

    Fresh seeds and fresh images take away the luck that made a sample the best of hundreds. The
    importance-only mask is rescored on search-val too: the spread of its scores is their noise.
    Without proposals nothing is scored, and the allocation is chosen.

    Args:
        finalists: The masks, the first of equals winning.
        context: The search, its pool with nothing unfinished.
        weights: The dense weights that masks are scored on.

    Returns:
        One choice for every budget, in the order of the finalists.

    Raises:
        RuntimeError: every finalist failed, or all of one budget.
        ValueError: the model does not name the finalist that the journal says was chosen.
    """
    run = context.run
    merit = context.settings.optimizer_settings().merit(context.problem.space)
    journaled = {fact.macs_cut: fact for fact in run.all(Chosen)}
    still_open = [item for item in finalists if item.macs_cut not in journaled]
    scores_nothing = not context.settings.proposals
    failed = set() if scores_nothing else _rescore(still_open, context, weights)
    choices = []
    for macs_cut in dict.fromkeys(item.macs_cut for item in finalists):
        own = [item for item in finalists if item.macs_cut == macs_cut]
        if macs_cut in journaled:
            chosen = _as_journaled(journaled[macs_cut], own)
        else:
            if scores_nothing:
                chosen = next(item for item in own if item.name == ALLOCATION)
            else:
                chosen = _best([item for item in own if _key(item) not in failed], run, merit)
            run.record([Chosen(finalist=chosen.name, keep=chosen.keep, macs_cut=macs_cut)])
        importance_only = next(item for item in own if item.name == IMPORTANCE_ONLY)
        allocation = next((item for item in own if item.name == ALLOCATION), None)
        choices.append(
            Choice(chosen=chosen, importance_only=importance_only, allocation=allocation)
        )
    return choices


def _key(finalist: Finalist) -> _Key:
    """Return the key of a finalist's scores; two close budgets may have equal finalists."""
    return finalist.name, finalist.keep.tobytes()


def _key_of_fact(fact: Rescored | Chosen) -> _Key:
    return fact.finalist, fact.keep.tobytes()


def _rescore(finalists: Sequence[Finalist], context: Context, weights: SharedWeights) -> set[_Key]:
    """Score and journal what the journal lacks; return the finalists that failed."""
    run, pool = context.run, context.pool
    known = {(*_key_of_fact(fact), fact.split, fact.repeat) for fact in run.all(Rescored)}
    in_flight: dict[Call[Worker, Score], _Rescoring] = {}
    for repeat in range(context.settings.scoring.rescore_seeds):
        for finalist in finalists:
            for split in _splits_of(finalist):
                rescore = (*_key(finalist), split, repeat)
                if rescore not in known:
                    known.add(rescore)
                    rescoring = _Rescoring(finalist, split, repeat)
                    call = _rescore_call(rescoring, context.settings.seed, weights)
                    in_flight[call] = rescoring
                    pool.submit(call)
    failed = set()
    while in_flight:
        scored = []
        for call in pool.next_ended():
            rescoring = in_flight.pop(call)
            error = call.error or call.value.error
            if error is None:
                scored.append(_rescored(rescoring, call.value))
            else:
                logger.warning("%s failed: %s", call.name, error)
                failed.add(_key(rescoring.finalist))
        run.record(scored)
    return failed


def _as_journaled(chosen: Chosen, finalists: Sequence[Finalist]) -> Finalist:
    for finalist in finalists:
        if finalist.name == chosen.finalist and np.array_equal(finalist.keep, chosen.keep):
            return finalist
    raise ValueError(
        f"replaying the journal gives another mask for the chosen finalist {chosen.finalist}; "
        "resume with the package versions that the journal's first line names"
    )


def _splits_of(finalist: Finalist) -> tuple[str, ...]:
    return ("choose_val", "search_val") if finalist.name == IMPORTANCE_ONLY else ("choose_val",)


def _rescore_call(rescoring: _Rescoring, seed: int, weights: SharedWeights) -> Call[Worker, Score]:
    keep, split = rescoring.finalist.keep, rescoring.split
    fresh_seed = (seed, rescoring.repeat, _RESCORE_STREAM)
    return Call(
        f"finalist {_title(rescoring.finalist)}",
        lambda worker: worker.rescore(weights.shared, keep, fresh_seed, split),
    )


def _rescored(rescoring: _Rescoring, score: Score) -> Rescored:
    return Rescored(
        finalist=rescoring.finalist.name,
        keep=rescoring.finalist.keep,
        split=rescoring.split,
        repeat=rescoring.repeat,
        val_loss=score.val_loss,
        val_accuracy=score.val_accuracy,
        seconds=score.seconds,
    )


def _title(finalist: Finalist) -> str:
    """Return the name of a finalist for people."""
    budget = "" if finalist.macs_cut is None else f" for macs_cut {finalist.macs_cut}"
    return f"{finalist.name}{budget}"


def _best(finalists: Sequence[Finalist], run: RunDirectory, merit: Merit) -> Finalist:
    if not finalists:
        raise RuntimeError("every finalist failed when it was rescored; see the warnings above")

    def mean_cost(finalist: Finalist) -> float:
        mean = _mean_score(finalist, run)
        if mean.val_accuracy is None:
            logger.info("finalist %s  score %.4f", _title(finalist), -mean.val_loss)
        else:
            figures = mean.val_loss, mean.val_accuracy
            logger.info("finalist %s  loss %.4f  accuracy %.4f", _title(finalist), *figures)
        return merit.cost(mean, finalist.parameters)

    return min(finalists, key=mean_cost)  # the first of equals: the order is the model's


def _mean_score(finalist: Finalist, run: RunDirectory) -> Score:
    key = _key(finalist)
    facts = [
        fact
        for fact in run.all(Rescored)
        if fact.split == "choose_val" and _key_of_fact(fact) == key
    ]
    accuracies = [fact.val_accuracy for fact in facts if fact.val_accuracy is not None]
    return Score(
        val_loss=statistics.fmean(fact.val_loss for fact in facts),
        val_accuracy=statistics.fmean(accuracies) if accuracies else None,
        seconds=sum(fact.seconds for fact in facts),
    )
