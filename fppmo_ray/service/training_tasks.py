"""Training on the workers, an epoch at a time: every epoch ends in a durable checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from fppmo_ray.service.pool import WorkerPool
from fppmo_ray.service.record.facts import EpochFinished
from fppmo_ray.service.record.run_directory import RunDirectory
from fppmo_ray.service.work import Work
from fppmo_ray.service.worker import TrainingTask
from fppmo_ray.training import EpochReport

logger = logging.getLogger(__name__)


def train(
    tasks: Sequence[TrainingTask],
    pool: WorkerPool,
    run: RunDirectory,
    *,
    weights: Any,
) -> dict[str, bytes]:
    """Train every task to its recipe's last epoch, or go on from its last checkpoint.

    Args:
        tasks: Trained side by side, an epoch being one piece of work; the largest first.
        pool: Where they are trained.
        run: Where checkpoints and facts are kept.
        weights: Reference to the ``Basis`` they start from.

    Returns:
        The final training state of each task, as bytes.

    Raises:
        RuntimeError: a task diverged, or failed twice.
    """
    states: dict[str, bytes] = {}
    for task in tasks:
        epoch, state = _resume_point(task.name, run)
        if state is not None:
            states[task.name] = state
        if state is None or epoch < task.recipe.epochs:
            pool.submit(_work(task, epoch, state, weights))
    while pool.num_unfinished:
        for outcome in pool.next_outcomes():
            if outcome.error is not None:
                raise RuntimeError(f"{outcome.work.name} failed: {outcome.error}")
            task, epoch = outcome.work.tag
            state, report = outcome.value
            states[task.name] = state
            if report is not None:
                _keep(task.name, epoch, state, report, run)
            if epoch + 1 < task.recipe.epochs:
                pool.submit(_work(task, epoch + 1, state, weights))
    return states


def _work(task: TrainingTask, epoch: int, state: bytes | None, weights: Any) -> Work:
    if task.recipe.epochs == 0:
        name, method, arguments = f"start of {task.name}", "untrained", (weights, task)
        return Work(name=name, method=method, arguments=arguments, tag=(task, epoch))
    return Work(
        name=f"epoch {epoch} of {task.name}",
        method="train_epoch",
        arguments=(weights, task, epoch, state),
        tag=(task, epoch),
    )


def _resume_point(name: str, run: RunDirectory) -> tuple[int, bytes | None]:
    """The next epoch and the state before it: those after the last checkpoint still there.

    A journal that was cut back names checkpoints that later ones replaced. Training is a function
    of seed and recipe, so doing epochs again gives the same facts.
    """
    for fact in reversed(run.all(EpochFinished)):
        if fact.task != name:
            continue
        try:
            return fact.epoch + 1, run.read_artifact(fact.artifact, fact.sha256)
        except ValueError as error:
            logger.warning("%s is trained again from before epoch %d: %s", name, fact.epoch, error)
    return 0, None


def _keep(name: str, epoch: int, state: bytes, report: EpochReport, run: RunDirectory) -> None:
    artifact = _artifact(name, epoch)
    sha256 = run.write_artifact(artifact, state)
    run.record(
        [
            EpochFinished(
                task=name,
                epoch=epoch,
                train_loss=report.loss,
                seconds=report.seconds,
                artifact=artifact,
                sha256=sha256,
            )
        ]
    )
    logger.info("%s  epoch %d  loss %.4f  %.0f s", name, epoch, report.loss, report.seconds)
    if epoch:  # only the last checkpoint is ever read
        run.delete_artifact(_artifact(name, epoch - 1))


def _artifact(name: str, epoch: int) -> str:
    return f"checkpoints/{name}-epoch{epoch}.pt"
