"""The end of a search: finalists rescored with fresh seeds on images no score has seen."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from fppmo_ray.distribution import Finalist, pack_mask
from fppmo_ray.service.pool import WorkerPool
from fppmo_ray.service.record.facts import Chosen, Rescored
from fppmo_ray.service.record.run_directory import RunDirectory
from fppmo_ray.service.scoring import Scoring, score_error
from fppmo_ray.service.settings import SearchSettings
from fppmo_ray.service.work import Outcome, Work

logger = logging.getLogger(__name__)

IMPORTANCE_ONLY = "importance-only"
_RESCORE_STREAM = 1  # seeds [seed, repeat, 1]: never those of a generation, which are pairs


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
) -> Finalist:
    """Rescore every finalist on choose-val and keep the one with the best mean score.

    Fresh seeds and fresh images take away the luck that made a sample the best of hundreds. The
    importance-only mask is rescored on search-val too: how its scores differ is their noise.

    Raises:
        RuntimeError: every finalist failed.
        ValueError: the model no longer names the finalist that the journal says was chosen.
    """
    if chosen := run.all(Chosen):
        return _as_journaled(chosen[0], finalists)
    known = {(fact.finalist, fact.mask, fact.split, fact.repeat) for fact in run.all(Rescored)}
    for repeat in range(settings.rescore_seeds):
        for finalist in finalists:
            for split in _splits_of(finalist):
                if (finalist.name, pack_mask(finalist.keep), split, repeat) not in known:
                    pool.submit(_work(_Rescoring(finalist, split, repeat), settings.seed, scoring))
    failed = set()
    while pool.num_unfinished:
        ended = pool.next_outcomes()
        run.record(_fact(outcome) for outcome in ended if score_error(outcome) is None)
        for outcome in ended:
            if (error := score_error(outcome)) is not None:
                logger.warning("%s failed: %s", outcome.work.name, error)
                failed.add(outcome.work.tag.finalist.name)
    best = _best([item for item in finalists if item.name not in failed], run, settings)
    run.record([Chosen(finalist=best.name, mask=pack_mask(best.keep))])
    return best


def _as_journaled(chosen: Chosen, finalists: Sequence[Finalist]) -> Finalist:
    for finalist in finalists:
        if (finalist.name, pack_mask(finalist.keep)) == (chosen.finalist, chosen.mask):
            return finalist
    raise ValueError(
        f"replaying the journal gives another mask for the chosen finalist {chosen.finalist}; "
        "resume with the package versions that the journal's first line names"
    )


def _splits_of(finalist: Finalist) -> tuple[str, ...]:
    return ("choose_val", "search_val") if finalist.name == IMPORTANCE_ONLY else ("choose_val",)


def _work(rescoring: _Rescoring, seed: int, scoring: Scoring) -> Work:
    finalist, split, repeat = rescoring.finalist, rescoring.split, rescoring.repeat
    return Work(
        name=f"finalist {finalist.name}",
        method="score",
        arguments=(
            *(scoring.weights, finalist.keep, (seed, repeat, _RESCORE_STREAM)),
            *(split, scoring.rung),
        ),
        tag=rescoring,
        timeout=scoring.timeout,
        size=scoring.rung,
    )


def _fact(outcome: Outcome) -> Rescored:
    rescoring: _Rescoring = outcome.work.tag
    return Rescored(
        finalist=rescoring.finalist.name,
        split=rescoring.split,
        repeat=rescoring.repeat,
        mask=pack_mask(rescoring.finalist.keep),
        val_loss=outcome.value.val_loss,
        val_accuracy=outcome.value.val_accuracy,
    )


def _best(finalists: Sequence[Finalist], run: RunDirectory, settings: SearchSettings) -> Finalist:
    if not finalists:
        raise RuntimeError("every finalist failed when it was rescored; see the warnings above")

    def mean_cost(finalist: Finalist) -> float:
        key = (finalist.name, pack_mask(finalist.keep), "choose_val")
        facts = [
            fact for fact in run.all(Rescored) if (fact.finalist, fact.mask, fact.split) == key
        ]
        loss = statistics.fmean(fact.val_loss for fact in facts)
        accuracy = statistics.fmean(fact.val_accuracy for fact in facts)
        logger.info("finalist %s  loss %.4f  accuracy %.4f", finalist.name, loss, accuracy)
        return loss if settings.rank_by == "val_loss" else -accuracy

    return min(finalists, key=mean_cost)  # the first of equals: the order is the model's
