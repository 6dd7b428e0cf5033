"""Training on the workers, an epoch at a time: every epoch ends in a durable checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from fppmo_ray.service.facts import EpochFinished
from fppmo_ray.service.pool import Outcome, Work, WorkerPool
from fppmo_ray.service.run_directory import RunDirectory
from fppmo_ray.service.worker import TrainingTask
from fppmo_ray.training import EpochReport

logger = logging.getLogger(__name__)


def train(
    tasks: Sequence[TrainingTask],
    pool: WorkerPool,
    run: RunDirectory,
    *,
    weights: Any,
) -> dict[str, bytes | None]:
    """Train every task to its recipe's last epoch, or go on from its last checkpoint.

    Args:
        tasks: Trained side by side, an epoch being one piece of work; the largest first.
        pool: Where they are trained.
        run: Where checkpoints and facts are kept.
        weights: Reference to the ``Weights`` they start from.

    Returns:
        The final training state of each task, as bytes; None for a recipe of no epochs.

    Raises:
        RuntimeError: a task diverged, or failed twice.
    """
    states = {task.name: _last_state(task.name, run) for task in tasks}
    for task in tasks:
        _submit_next(task, pool, run, weights, states[task.name])
    while pool.num_unfinished:
        outcome = pool.next_outcome()
        task = outcome.work.tag
        if outcome.error is not None:
            raise RuntimeError(f"training of {task.name} failed: {outcome.error}")
        states[task.name] = _keep_epoch(task.name, outcome, run)
        _submit_next(task, pool, run, weights, states[task.name])
    return states


def _epochs_of(name: str, run: RunDirectory) -> list[EpochFinished]:
    return [fact for fact in run.all(EpochFinished) if fact.task == name]


def _last_state(name: str, run: RunDirectory) -> bytes | None:
    epochs = _epochs_of(name, run)
    return run.read_artifact(epochs[-1].artifact, epochs[-1].sha256) if epochs else None


def _submit_next(
    task: TrainingTask, pool: WorkerPool, run: RunDirectory, weights: Any, state: bytes | None
) -> None:
    epoch = len(_epochs_of(task.name, run))
    if epoch < task.recipe.epochs:
        pool.submit(
            Work(
                name=f"epoch {epoch} of {task.name}",
                method="train_epoch",
                arguments=(weights, task, epoch, state),
                tag=task,
            )
        )


def _keep_epoch(name: str, outcome: Outcome, run: RunDirectory) -> bytes:
    state: bytes
    report: EpochReport
    state, report = outcome.value
    before = _epochs_of(name, run)
    epoch = len(before)
    artifact = f"checkpoints/{name}-epoch{epoch}.pt"
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
    for fact in before[-1:]:  # only the last checkpoint is ever read
        (run.path / fact.artifact).unlink(missing_ok=True)
    return state
