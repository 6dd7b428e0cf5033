"""The end of a search: finalists rescored with fresh seeds on images no score has seen."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Sequence
from typing import Any

from fppmo_ray.distribution import Finalist, pack_mask
from fppmo_ray.service.facts import Chosen, Rescored
from fppmo_ray.service.pool import Work, WorkerPool
from fppmo_ray.service.run_directory import RunDirectory

logger = logging.getLogger(__name__)

IMPORTANCE_ONLY = "importance-only"
_RESCORE_STREAM = 1  # seeds [seed, repeat, 1]: never those of a generation, which are pairs


def choose(
    finalists: Sequence[Finalist],
    pool: WorkerPool,
    run: RunDirectory,
    *,
    weights: Any,
    seed: int,
    repeats: int,
) -> Chosen:
    """Rescore every finalist ``repeats`` times and keep the one with the lowest mean loss.

    Fresh seeds and choose-val take away the luck that made a sample the best of hundreds.

    Raises:
        RuntimeError: every finalist failed.
    """
    if chosen := run.all(Chosen):
        return chosen[0]
    known = {(fact.finalist, fact.repeat) for fact in run.all(Rescored)}
    for repeat in range(repeats):
        for finalist in finalists:
            if (finalist.name, repeat) not in known:
                pool.submit(_work(finalist, repeat, weights, seed))
    failed = set()
    while pool.num_unfinished:
        outcome = pool.next_outcome()
        finalist, repeat = outcome.work.tag
        if outcome.error is not None:
            logger.warning("finalist %s failed: %s", finalist.name, outcome.error)
            failed.add(finalist.name)
            continue
        run.record(
            [
                Rescored(
                    finalist=finalist.name,
                    repeat=repeat,
                    mask=pack_mask(finalist.keep),
                    val_loss=outcome.value.val_loss,
                    val_accuracy=outcome.value.val_accuracy,
                )
            ]
        )
    best = _lowest_mean_loss([item for item in finalists if item.name not in failed], run)
    chosen_fact = Chosen(finalist=best.name, mask=pack_mask(best.keep))
    run.record([chosen_fact])
    return chosen_fact


def _work(finalist: Finalist, repeat: int, weights: Any, seed: int) -> Work:
    return Work(
        name=f"finalist {finalist.name}",
        method="score",
        arguments=(weights, finalist.keep, (seed, repeat, _RESCORE_STREAM), "choose_val"),
        tag=(finalist, repeat),
    )


def _lowest_mean_loss(finalists: Sequence[Finalist], run: RunDirectory) -> Finalist:
    if not finalists:
        raise RuntimeError("every finalist failed when it was rescored; see the warnings above")

    def mean_loss(finalist: Finalist) -> float:
        rescored = [fact for fact in run.all(Rescored) if fact.finalist == finalist.name]
        mean = statistics.fmean(fact.val_loss for fact in rescored)
        logger.info(
            "finalist %s  loss %.4f  accuracy %.4f",
            finalist.name,
            mean,
            statistics.fmean(fact.val_accuracy for fact in rescored),
        )
        return mean

    return min(finalists, key=mean_loss)  # the first of equals: the order is the model's
