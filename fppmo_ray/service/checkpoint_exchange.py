"""The actor through which replicas of a network hand their epochs' checkpoints to the driver."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fppmo_ray.service.worker_protocol import TrainingReport


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
    state: bytes
    """The training state after it."""
    report: TrainingReport
    """How it went."""


class CheckpointExchange:
    """An actor beside the driver that outlives replicas and knows where they have to go on.

    Replicas work on one training after the other. The state that is kept is the latest one they
    left, whether or not the driver has taken it yet: an epoch that is not durable when the driver
    ends is trained again.

    Args:
        begins: The point to go on from, for every training that is not finished.
    """

    def __init__(self, begins: Sequence[Begin]) -> None:
        self._begins = begins
        self._training = 0
        self._epoch, self._state = begins[0].epoch, begins[0].state
        self._done: list[EpochDone] = []
        self._is_stopped = False
        self._is_running = False

    def next_epoch(self) -> tuple[int, int] | None:
        """Return the next training and its epoch; None: all are finished, or a stop was asked."""
        self._is_running = self._training < len(self._begins) and not self._is_stopped
        return (self._training, self._epoch) if self._is_running else None

    def state_before(self, training: int, epoch: int) -> bytes | None:
        """Return the training state before the next epoch.

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
        self._done.append(done)
        self._epoch, self._state = done.epoch + 1, done.state
        if self._epoch == self._begins[self._training].num_epochs:
            self._training += 1
            if self._training < len(self._begins):
                begin = self._begins[self._training]
                self._epoch, self._state = begin.epoch, begin.state

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
