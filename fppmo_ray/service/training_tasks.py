"""Training on the workers, an epoch at a time: every epoch ends in a durable checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from fppmo_ray.service.pool.work import Outcome, Work
from fppmo_ray.service.pool.worker_pool import WorkerPool
from fppmo_ray.service.record.facts import EpochFinished
from fppmo_ray.service.record.run_directory import RunDirectory
from fppmo_ray.service.workers.assignments import AdaptationTask, TrainingTask

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class Training:
    """A task, and the weights that it begins from."""

    task: TrainingTask | AdaptationTask
    weights: Any
    """Reference to the ``Basis`` of these."""
    teacher: Any = None
    """Reference to the ``Basis`` of the dense network to learn from; None: that of the weights."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Epoch:
    """What the work of an epoch is known by."""

    training: Training
    index: int


def train(trainings: Sequence[Training], pool: WorkerPool, run: RunDirectory) -> dict[str, bytes]:
    """Train every task to its recipe's last epoch, or go on from its last checkpoint.

    Args:
        trainings: Done side by side, an epoch being one piece of work; the largest first.
        pool: Where they are trained, with nothing unfinished.
        run: Where checkpoints and facts are kept.

    Returns:
        The final training state of each task, as bytes, by the task's name.

    Raises:
        RuntimeError: a task diverged, or failed twice.
    """
    states: dict[str, bytes] = {}
    for training in trainings:
        if (state := begin(training, pool, run)) is not None:
            states[training.task.name] = state
    while pool.num_unfinished:
        for outcome in pool.next_outcomes():
            if (state := go_on(outcome, pool, run)) is not None:
                states[outcome.work.tag.training.task.name] = state
    return states


def begin(training: Training, pool: WorkerPool, run: RunDirectory) -> bytes | None:
    """Submit the next epoch of a task; its final state, if it has come to that before."""
    epoch, state = resume_point(training.task.name, run)
    if state is not None and epoch >= training.task.recipe.epochs:
        return state
    pool.submit(_work(training, epoch, state))
    return None


def final_state(name: str, num_epochs: int, run: RunDirectory) -> bytes | None:
    """What a task has come to, if it has; for whoever has not even the weights to begin from."""
    has_ended = any(
        fact.task == name and fact.epoch == num_epochs - 1 for fact in run.all(EpochFinished)
    )
    epoch, state = resume_point(name, run) if has_ended else (0, None)
    return state if epoch == num_epochs else None


def is_of_training(work: Work) -> bool:
    """Whether a piece of work is an epoch, for ``go_on``."""
    return isinstance(work.tag, _Epoch)


def go_on(outcome: Outcome, pool: WorkerPool, run: RunDirectory) -> bytes | None:
    """Keep what an epoch came to and submit the next; the final state after the last.

    Raises:
        RuntimeError: the epoch failed.
    """
    if outcome.error is not None:
        raise RuntimeError(f"{outcome.work.name} failed: {outcome.error}")
    epoch: _Epoch = outcome.work.tag
    task, index = epoch.training.task, epoch.index
    state: bytes
    state, report = outcome.value
    if report is not None:
        keep_epoch(task.name, index, state, report, run)
    if index + 1 < task.recipe.epochs:
        pool.submit(_work(epoch.training, index + 1, state))
        return None
    return state


def forget(name: str, num_epochs: int, run: RunDirectory) -> None:
    """Remove the final checkpoint of a task that nothing will start from again."""
    run.delete_artifact(_artifact(name, num_epochs - 1))


def _work(training: Training, epoch: int, state: bytes | None) -> Work:
    task, tag = training.task, _Epoch(training=training, index=epoch)
    if task.recipe.epochs == 0:
        name, arguments = f"start of {task.name}", (training.weights, task)
        return Work(name=name, method="untrained", arguments=arguments, tag=tag)
    return Work(
        name=f"epoch {epoch} of {task.name}",
        method="train_epoch" if isinstance(task, TrainingTask) else "adapt_epoch",
        arguments=(training.weights, task, epoch, state, training.teacher),
        tag=tag,
    )


def resume_point(name: str, run: RunDirectory) -> tuple[int, bytes | None]:
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


class _Report(Protocol):
    """Of an epoch."""

    @property
    def loss(self) -> float | None: ...

    @property
    def seconds(self) -> float: ...


def keep_epoch(name: str, epoch: int, state: bytes, report: _Report, run: RunDirectory) -> None:
    """Make an epoch's checkpoint durable, then the fact that names it."""
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
    loss = "" if report.loss is None else f"  loss {report.loss:.4f}"
    logger.info("%s  epoch %d%s  %.0f s", name, epoch, loss, report.seconds)
    if epoch:  # only the last checkpoint is ever read
        run.delete_artifact(_artifact(name, epoch - 1))


def _artifact(name: str, epoch: int) -> str:
    return f"checkpoints/{name}-epoch{epoch}.pt"
