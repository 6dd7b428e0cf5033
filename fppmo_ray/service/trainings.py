"""Training on the workers, an epoch at a time: every epoch ends in a durable checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

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


@dataclass(frozen=True, kw_only=True)
class Begin:
    """The point from which a training has to go on."""

    epoch: int
    """The next epoch, counted from 0."""
    state: bytes | None
    """The training state before that epoch; None before the first."""
    num_epochs: int
    """Epochs of the whole training, more than ``epoch``."""


@dataclass(frozen=True, kw_only=True)
class EpochDone:
    """The result of an epoch."""

    training: int
    """Place of the training in the list of all."""
    epoch: int
    """The epoch, counted from 0."""
    state: Any
    """The training state after it, bytes or a reference to them."""
    report: TrainingReport
    """How it went."""


class CheckpointExchange:
    """An actor beside the driver that outlives replicas and knows where they have to go on.

    Replicas work on one training after the other. The state that is kept is the latest one they
    left, whether or not the driver has taken it yet: an epoch that is not durable when the driver
    ends is trained again.

    Args:
        begins: The point to go on from, for every training that is not finished.
        share: Puts a state where all can read it, and returns a reference to it: ``ray.put``. A
            state of hundreds of megabytes is then sent once to every node, and not once to every
            replica. None: states are handed out themselves.
    """

    def __init__(
        self, begins: Sequence[Begin], share: Callable[[bytes], Any] | None = None
    ) -> None:
        self._begins = begins
        self._share = share
        self._training = self._epoch = 0
        self._begin(begins[0])
        self._done: list[EpochDone] = []
        self._is_stopped = False
        self._is_running = False

    def next_epoch(self) -> tuple[int, int] | None:
        """Return the next training and its epoch; None: all are finished, or a stop was asked."""
        self._is_running = self._training < len(self._begins) and not self._is_stopped
        return (self._training, self._epoch) if self._is_running else None

    def state_before(self, training: int, epoch: int) -> Any:
        """Return the training state before the next epoch, as it was shared; None at the start.

        Args:
            training: Place of the training in the list of all.
            epoch: The epoch, counted from 0.

        Raises:
            RuntimeError: another epoch is next by now; the caller belongs to a group that is gone.
        """
        if (training, epoch) != (self._training, self._epoch):
            raise RuntimeError(f"epoch {epoch} of training {training} is not the next any more")
        return self._state

    def put(self, done: EpochDone) -> None:
        """Take in the result of the next epoch; a repeated result changes nothing."""
        if (done.training, done.epoch) != (self._training, self._epoch):
            return
        self._epoch, self._state = done.epoch + 1, self._shared(done.state)
        self._done.append(replace(done, state=self._state))
        if self._epoch == self._begins[self._training].num_epochs:
            self._training += 1
            if self._training < len(self._begins):
                self._begin(self._begins[self._training])

    def take(self) -> list[EpochDone]:
        """Return the results since the last call, in order."""
        done, self._done = self._done, []
        return done

    def start_group(self) -> None:
        """Note that a new group of replicas starts and that no earlier one is at work."""
        self._is_running = False

    def stop(self) -> bool:
        """Let no further epoch begin; return whether one is under way."""
        self._is_stopped = True
        return self._is_running

    def _begin(self, begin: Begin) -> None:
        self._epoch, self._state = begin.epoch, self._shared(begin.state)

    def _shared(self, state: bytes | None) -> Any:
        return state if state is None or self._share is None else self._share(state)
