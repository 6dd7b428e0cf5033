"""The end of a search: finalists rescored with fresh seeds on images no score has seen."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from fppmo_ray.distribution import Finalist, PruningSpace, pack_mask
from fppmo_ray.distribution.capacity import capacity_factor
from fppmo_ray.service.pool.work import Outcome, Work
from fppmo_ray.service.pool.worker_pool import WorkerPool
from fppmo_ray.service.record.artifacts import IMPORTANCE_ONLY
from fppmo_ray.service.record.facts import Chosen, Rescored
from fppmo_ray.service.record.run_directory import RunDirectory
from fppmo_ray.service.scoring import Scoring, score_error
from fppmo_ray.service.settings import SearchSettings

logger = logging.getLogger(__name__)

_RESCORE_STREAM = 1  # seeds [seed, repeat, 1]: never those of a generation, which are pairs


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What a search ends with at one budget, before anything is fine-tuned."""

    chosen: Finalist
    importance_only: Finalist

    @property
    def macs_cut(self) -> float | None:
        """The budget's, of several; None where there is one."""
        return self.chosen.macs_cut


@dataclass(frozen=True, eq=False)
class _Rescoring:
    """A finalist to be scored once more."""

    finalist: Finalist
    split: str
    repeat: int


def choose(
    finalists: Sequence[Finalist],
    pool: WorkerPool,
    run: RunDirectory,
    settings: SearchSettings,
    scoring: Scoring,
    space: PruningSpace,
) -> list[Choice]:
    """Rescore all finalists on choose-val and keep the one with the best mean score.

    Fresh seeds and fresh images take away the luck that made a sample the best of hundreds. The
    importance-only mask is rescored on search-val too: how its scores differ is their noise.

    Returns:
        One choice for every budget, in the order of the finalists.

    Raises:
        RuntimeError: every finalist failed, or all of one budget.
        ValueError: the model no longer names the finalist that the journal says was chosen.
    """
    journaled = {fact.macs_cut: fact for fact in run.all(Chosen) if fact.stage == scoring.stage}
    still_open = [item for item in finalists if item.macs_cut not in journaled]
    failed = _rescore(still_open, pool, run, settings, scoring)
    choices = []
    for macs_cut in dict.fromkeys(item.macs_cut for item in finalists):
        own = [item for item in finalists if item.macs_cut == macs_cut]
        if macs_cut in journaled:
            chosen = _as_journaled(journaled[macs_cut], own)
        else:
            rescored = _rescored(run, scoring.stage)
            there = [item for item in own if _key(item) not in failed]
            chosen = _best(there, rescored, settings, space)
            name, mask = _key(chosen)
            run.record([Chosen(finalist=name, mask=mask, macs_cut=macs_cut, stage=scoring.stage)])
        importance_only = next(item for item in own if item.name == IMPORTANCE_ONLY)
        choices.append(Choice(chosen=chosen, importance_only=importance_only))
    return choices


def _key(finalist: Finalist) -> tuple[str, str]:
    """What a finalist's scores are known by: close budgets may have the same."""
    return finalist.name, pack_mask(finalist.keep)


def _rescore(
    finalists: Sequence[Finalist],
    pool: WorkerPool,
    run: RunDirectory,
    settings: SearchSettings,
    scoring: Scoring,
) -> set[tuple[str, str]]:
    """Score and journal what the journal lacks; the finalists that failed."""
    rescored = _rescored(run, scoring.stage)
    known = {(fact.finalist, fact.mask, fact.split, fact.repeat) for fact in rescored}
    for repeat in range(settings.rescore_seeds):
        for finalist in finalists:
            for split in _splits_of(finalist):
                rescore = (*_key(finalist), split, repeat)
                if rescore not in known:
                    known.add(rescore)
                    pool.submit(_work(_Rescoring(finalist, split, repeat), settings, scoring))
    failed = set()
    while pool.num_unfinished:
        ended = pool.next_outcomes()
        scored = [outcome for outcome in ended if score_error(outcome) is None]
        run.record(_fact(outcome, settings, scoring) for outcome in scored)
        for outcome in ended:
            if (error := score_error(outcome)) is not None:
                logger.warning("%s failed: %s", outcome.work.name, error)
                failed.add(_key(outcome.work.tag.finalist))
    return failed


def _as_journaled(chosen: Chosen, finalists: Sequence[Finalist]) -> Finalist:
    for finalist in finalists:
        if _key(finalist) == (chosen.finalist, chosen.mask):
            return finalist
    raise ValueError(
        f"replaying the journal gives another mask for the chosen finalist {chosen.finalist}; "
        "resume with the package versions that the journal's first line names"
    )


def _splits_of(finalist: Finalist) -> tuple[str, ...]:
    return ("choose_val", "search_val") if finalist.name == IMPORTANCE_ONLY else ("choose_val",)


def _work(rescoring: _Rescoring, settings: SearchSettings, scoring: Scoring) -> Work:
    finalist, split, repeat = rescoring.finalist, rescoring.split, rescoring.repeat
    steps = _steps(rescoring, settings, scoring)
    return Work(
        name=f"finalist {_title(finalist)}",
        method="score",
        arguments=(
            *(scoring.weights, finalist.keep, (settings.seed, repeat, _RESCORE_STREAM)),
            *(split, steps),
        ),
        tag=rescoring,
        timeout=scoring.timeout,
        size=steps,
    )


def _steps(rescoring: _Rescoring, settings: SearchSettings, scoring: Scoring) -> int:
    """On search-val a score is repeated as proposals are scored; the choice may look deeper."""
    if rescoring.split == "choose_val" and settings.rescore_steps is not None:
        return settings.rescore_steps
    return scoring.rung


def _rescored(run: RunDirectory, stage: int) -> list[Rescored]:
    return [fact for fact in run.all(Rescored) if fact.stage == stage]


def _fact(outcome: Outcome, settings: SearchSettings, scoring: Scoring) -> Rescored:
    rescoring: _Rescoring = outcome.work.tag
    return Rescored(
        finalist=rescoring.finalist.name,
        split=rescoring.split,
        repeat=rescoring.repeat,
        mask=pack_mask(rescoring.finalist.keep),
        val_loss=outcome.value.val_loss,
        val_accuracy=outcome.value.val_accuracy,
        rung=_steps(rescoring, settings, scoring),
        seconds=outcome.value.seconds,
        stage=scoring.stage,
    )


def _title(finalist: Finalist) -> str:
    """For people."""
    budget = "" if finalist.macs_cut is None else f" for macs_cut {finalist.macs_cut}"
    return f"{finalist.name}{budget}"


def _best(
    finalists: Sequence[Finalist],
    rescored: Sequence[Rescored],
    settings: SearchSettings,
    space: PruningSpace,
) -> Finalist:
    if not finalists:
        raise RuntimeError("every finalist failed when it was rescored; see the warnings above")

    def mean_cost(finalist: Finalist) -> float:
        key = (*_key(finalist), "choose_val")
        facts = [fact for fact in rescored if (fact.finalist, fact.mask, fact.split) == key]
        loss = statistics.fmean(fact.val_loss for fact in facts)
        accuracies = [fact.val_accuracy for fact in facts if fact.val_accuracy is not None]
        if not accuracies:
            logger.info("finalist %s  score %.4f", _title(finalist), -loss)
            return loss
        accuracy = statistics.fmean(accuracies)
        logger.info("finalist %s  loss %.4f  accuracy %.4f", _title(finalist), loss, accuracy)
        if settings.rank_by == "val_accuracy":
            return -accuracy
        return loss * capacity_factor(space, finalist.keep, settings.capacity_weight)

    return min(finalists, key=mean_cost)  # the first of equals: the order is the model's
