"""The choices of a search among few masks, each scored once more than its proposals.

At the start the allocation is chosen that the search begins at, on search-val; at the end the best
finalist, with fresh seeds on images that no score has seen.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fppmo_ray.distribution import BoolArray, Finalist, FloatArray, Merit
from fppmo_ray.distribution.allocation import allocation_masks
from fppmo_ray.pruning import Score
from fppmo_ray.pruning.calibration import FilterOrder
from fppmo_ray.service.dense_network import Context
from fppmo_ray.service.journal.artifacts import ALLOCATION, IMPORTANCE_ONLY
from fppmo_ray.service.journal.facts import (
    AllocationChosen,
    Chosen,
    Fact,
    Rescored,
    latest_feedback,
)
from fppmo_ray.service.journal.run_directory import RunDirectory
from fppmo_ray.service.pool.call import Call
from fppmo_ray.service.problem import budgets_of
from fppmo_ray.service.worker_protocol import SharedWeights, Worker

logger = logging.getLogger(__name__)

# Last numbers of seeds [seed, repeat, stream]: never those of a generation, which are pairs.
_FINALIST_STREAM, _ALLOCATION_STREAM = 1, 2


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


def score_noise(found: Found) -> dict[str, float] | None:
    """Return the standard deviation of an importance-only mask's scores over fresh seeds.

    The scores are on search-val. With several budgets or stages it is the mean over their masks.
    """
    by_mask: dict[tuple[int, bytes], list[Rescored]] = {}
    for number, facts in enumerate(found.searches):
        for fact in facts:
            if isinstance(fact, Rescored) and fact.split == "search_val":
                by_mask.setdefault((number, fact.keep.tobytes()), []).append(fact)
    repeated = [facts for facts in by_mask.values() if len(facts) > 1]
    if not repeated:
        return None
    return {
        "repeats": min(map(len, repeated)),
        **{
            name: statistics.fmean(
                statistics.stdev(getattr(fact, name) for fact in facts) for facts in repeated
            )
            for name in ("val_loss", "val_accuracy")
            if getattr(repeated[0][0], name) is not None
        },
    }


def score_costs(found: Found) -> dict[str, Any]:
    """Return how many scores the search took, and their mean time; None if it has none."""
    feedback = [item for facts in found.searches for item in latest_feedback(facts).values()]
    seconds = [item.seconds for item in feedback if item.seconds is not None]
    return {
        "scored": sum(not item.failed for item in feedback),
        "failed": sum(item.failed for item in feedback),
        "mean_seconds": statistics.fmean(seconds) if seconds else None,
    }


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
    scores_nothing = context.settings.num_proposals == 0
    failed = set() if scores_nothing else _rescore_all(still_open, context, weights)
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


def _rescore_all(
    finalists: Sequence[Finalist], context: Context, weights: SharedWeights
) -> set[_Key]:
    """Score and journal what the journal lacks; return the finalists that failed."""
    run = context.run
    known = {(*_key_of_fact(fact), fact.split, fact.repeat) for fact in run.all(Rescored)}
    asked: dict[tuple[_Key, str, int], _Rescoring] = {}
    for repeat in range(context.settings.scoring.rescore_seeds):
        for finalist in finalists:
            for split in _splits_of(finalist):
                if (*_key(finalist), split, repeat) not in known:
                    rescoring = _Rescoring(
                        title=f"finalist {_title(finalist)}",
                        mask=finalist,
                        split=split,
                        repeat=repeat,
                        seed=(context.settings.seed, repeat, _FINALIST_STREAM),
                    )
                    asked.setdefault((_key(finalist), split, repeat), rescoring)
    failed = set()
    for ended in _rescore(list(asked.values()), context, weights):
        run.record([_rescored(one, found) for one, found in ended if isinstance(found, Score)])
        failed |= {_key(one.mask) for one, found in ended if isinstance(found, str)}
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


def _rescored(rescoring: _Rescoring, score: Score) -> Rescored:
    return Rescored(
        finalist=rescoring.mask.name,
        keep=rescoring.mask.keep,
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


def choose_allocations(
    context: Context, weights: SharedWeights, order: FilterOrder
) -> list[BoolArray] | None:
    """Return the masks that the search starts at, one for each budget.

    Where the settings name several weights of the parameters, the mask of each is scored once on
    search-val, and every budget takes the best.

    Args:
        context: The search, its pool with nothing unfinished.
        weights: The dense weights that masks are scored on.
        order: Importance and error curves of the filters.

    Returns:
        The masks; None where the search starts with equal shares.

    Raises:
        RuntimeError: every allocation of a budget failed.
    """
    settings, space = context.settings, context.problem.space
    if settings.sampler.start != "allocation":
        return None
    budgets = budgets_of(space, settings)
    by_gamma = {
        gamma: allocation_masks(budgets, order.error_curves, order.importance, gamma=gamma)
        for gamma in settings.gammas()
    }
    known = {fact.budget: fact for fact in context.run.all(AllocationChosen)}
    chosen: list[BoolArray] = []
    for number in range(len(budgets)):
        masks = {gamma: masks[number] for gamma, masks in by_gamma.items()}
        if number in known:
            chosen.append(masks[known[number].gamma])
            continue
        gamma, scores = _best_gamma(masks, context, weights)
        logger.info("allocation  gamma %g of %s", gamma, ", ".join(f"{each:g}" for each in masks))
        context.run.record([AllocationChosen(budget=number, gamma=gamma, costs=scores)])
        chosen.append(masks[gamma])
    return chosen


def _best_gamma(
    masks: dict[float, BoolArray], context: Context, weights: SharedWeights
) -> tuple[float, list[float]]:
    """Return the weight whose mask scores best, and the costs of all that have a score."""
    distinct = {keep.tobytes(): gamma for gamma, keep in reversed(masks.items())}
    if len(distinct) == 1:  # equal masks, or a single weight: there is nothing to choose
        return next(iter(masks)), []
    space = context.problem.space
    merit = context.settings.optimizer_settings().merit(space)
    asked = {
        gamma: _of_allocation(gamma, masks[gamma], context) for gamma in sorted(distinct.values())
    }
    found = {
        one: answer
        for ended in _rescore(list(asked.values()), context, weights)
        for one, answer in ended
    }
    answers = {gamma: found[one] for gamma, one in asked.items()}
    costs = {
        gamma: merit.cost(answer, asked[gamma].mask.parameters)
        for gamma, answer in answers.items()
        if isinstance(answer, Score)
    }
    if not costs:
        first = next(iter(answers.values()))
        raise RuntimeError(f"no allocation could be scored; the first failed with: {first}")
    return min(costs, key=lambda gamma: costs[gamma]), [round(cost, 6) for cost in costs.values()]


def _of_allocation(gamma: float, keep: BoolArray, context: Context) -> _Rescoring:
    title = f"allocation with gamma {gamma:g}"
    return _Rescoring(
        title=title,
        mask=Finalist(name=title, keep=keep, parameters=context.problem.space.parameters(keep)),
        split="search_val",
        repeat=0,
        seed=(context.settings.seed, 0, _ALLOCATION_STREAM),
    )


@dataclass(frozen=True, eq=False, kw_only=True)
class _Rescoring:
    """One score of a mask that is not a proposal."""

    title: str
    """The mask in messages."""
    mask: Finalist
    split: str
    repeat: int
    seed: tuple[int, int, int]


def _rescore(
    asked: Sequence[_Rescoring], context: Context, weights: SharedWeights
) -> Iterator[list[tuple[_Rescoring, Score | str]]]:
    """Run scores on the workers; yield those that have ended, each with its score or its error."""
    in_flight: dict[Call[Worker, Score], _Rescoring] = {}
    for one in asked:
        call = _rescore_call(one, weights)
        in_flight[call] = one
        context.pool.submit(call)
    while in_flight:
        ended: list[tuple[_Rescoring, Score | str]] = []
        for call in context.pool.next_ended():
            error = call.error or call.value.error
            if error is not None:
                logger.warning("%s failed: %s", call.name, error)
            ended.append((in_flight.pop(call), call.value if error is None else error))
        yield ended


def _rescore_call(one: _Rescoring, weights: SharedWeights) -> Call[Worker, Score]:
    return Call(
        one.title,
        lambda worker: worker.rescore(weights.shared, one.mask.keep, one.seed, one.split),
    )
