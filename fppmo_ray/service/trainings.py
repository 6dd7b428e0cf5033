"""Training on the workers, an epoch at a time: every epoch ends in a durable checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from fppmo_ray.service.journal.facts import EpochFinished
from fppmo_ray.service.journal.run_directory import CHECKPOINTS, RunDirectory
from fppmo_ray.service.pool.call import Call
from fppmo_ray.service.pool.worker_pool import WorkerPool
from fppmo_ray.service.worker_protocol import SharedWeights, TrainingReport, TrainingTask, Worker

logger = logging.getLogger(__name__)

_EpochCall = Call[Worker, tuple[bytes, TrainingReport | None]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Training:
    """A network to train, and the weights that it begins from."""

    task: TrainingTask
    """The network and its recipe."""
    weights: SharedWeights
    """The dense weights that the network is cut from."""
    teacher: SharedWeights
    """The dense weights to distil from, if the recipe distils."""
    start: bytes | None = None
    """Training state before the first epoch; None: that of the network as it is cut."""


def train_side_by_side(
    trainings: Sequence[Training], pool: WorkerPool[Worker], run: RunDirectory
) -> dict[str, bytes]:
    """Train every network on one worker, side by side; see ``ddp_training.train_whole``.

    Args:
        trainings: The trainings, the largest network first; a call of a worker is one epoch.
        pool: Workers with nothing unfinished.
        run: Where checkpoints and facts are kept.
    """
    states: dict[str, bytes] = {}
    in_flight: dict[_EpochCall, tuple[Training, int]] = {}

    def submit(training: Training, epoch: int, state: bytes | None) -> None:
        call = _epoch_call(training, epoch, state)
        in_flight[call] = training, epoch
        pool.submit(call)

    for training in trainings:
        epoch, before = resume_point(training, run)
        if before is not None and epoch >= training.task.recipe.epochs:
            states[training.task.name] = before
        else:
            submit(training, epoch, before)
    while in_flight:
        for call in pool.next_ended():
            training, epoch = in_flight.pop(call)
            state, report = call.result
            task = training.task
            if report is not None:
                keep_epoch(task.name, epoch, state, report, run)
            if epoch + 1 < task.recipe.epochs:
                submit(training, epoch + 1, state)
            else:
                states[task.name] = state
    return states


def resume_point(training: Training, run: RunDirectory) -> tuple[int, bytes | None]:
    """Return the next epoch of a training, and the state before it from the last checkpoint left.

    A journal that was cut back names checkpoints that later ones replaced. Training is a function
    of seed and recipe, so doing epochs again gives the same facts.

    Args:
        training: The training.
        run: Where its checkpoints are.
    """
    name = training.task.name
    for fact in reversed(run.all(EpochFinished)):
        if fact.task != name:
            continue
        try:
            return fact.epoch + 1, run.read_artifact(fact.artifact, fact.sha256)
        except ValueError as error:
            logger.warning("%s is trained again from before epoch %d: %s", name, fact.epoch, error)
    return 0, training.start


def keep_epoch(
    name: str, epoch: int, state: bytes, report: TrainingReport, run: RunDirectory
) -> None:
    """Make an epoch's checkpoint durable, then the fact that names it.

    Args:
        name: Name of the training.
        epoch: Epoch, counted from 0.
        state: Training state after the epoch.
        report: How the epoch went.
        run: Where they are kept.
    """
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


def _epoch_call(training: Training, epoch: int, state: bytes | None) -> _EpochCall:
    task, weights, teacher = training.task, training.weights.shared, training.teacher.shared
    if task.distill_steps:
        name = f"distillation of {task.name}"
        return Call(name, lambda worker: worker.distill(weights, task, teacher))
    if task.recipe.epochs == 0:
        return Call(f"start of {task.name}", lambda worker: worker.untrained(weights, task))
    return Call(
        f"epoch {epoch} of {task.name}",
        lambda worker: worker.train_epoch(weights, task, epoch, state, teacher),
    )


def _artifact(name: str, epoch: int) -> str:
    return f"{CHECKPOINTS}/{name}-epoch{epoch}.pt"
