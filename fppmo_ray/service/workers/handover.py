"""Where replicas of a network leave what an epoch came to, and the driver takes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fppmo_ray.training import EpochReport


@dataclass(frozen=True, kw_only=True)
class Begin:
    """Where a training begins, or goes on."""

    epoch: int
    state: bytes | None
    """The training state before that epoch; None before the first."""
    num_epochs: int
    """Of the whole training, more than ``epoch``."""


@dataclass(frozen=True, kw_only=True)
class EpochDone:
    """What an epoch came to."""

    training: int
    """Its place among the trainings."""
    epoch: int
    state: bytes
    report: EpochReport


class Handover:
    """An actor beside the driver: it outlives replicas, and knows where they have to go on.

    Replicas work on one training after the other. The state that is kept is the latest one they
    left, whether or not the driver has taken it yet: what is not durable when the driver ends is
    trained again.

    Args:
        begins: Of every training that is not finished.
    """

    def __init__(self, begins: Sequence[Begin]) -> None:
        self._begins = begins
        self._training = 0
        self._epoch, self._state = begins[0].epoch, begins[0].state
        self._done: list[EpochDone] = []
        self._is_stopped = False
        self._is_running = False

    def next_epoch(self) -> tuple[int, int] | None:
        """The training that goes on and its epoch; None: all are finished, or it was stopped."""
        self._is_running = self._training < len(self._begins) and not self._is_stopped
        return (self._training, self._epoch) if self._is_running else None

    def state_before(self, training: int, epoch: int) -> bytes | None:
        """The training state before the next epoch.

        Raises:
            RuntimeError: another one is next by now; whoever asks belongs to a group that is gone.
        """
        if (training, epoch) != (self._training, self._epoch):
            raise RuntimeError(f"epoch {epoch} of training {training} is not the next any more")
        return self._state

    def put(self, done: EpochDone) -> None:
        """Leave what the next epoch came to; what comes a second time is not taken."""
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
        """What was left since the last time, in order."""
        done, self._done = self._done, []
        return done

    def start_group(self) -> None:
        """A new group of replicas is asked for; none of an earlier one is at work."""
        self._is_running = False

    def stop(self) -> bool:
        """Let no further epoch begin; whether one is under way."""
        self._is_stopped = True
        return self._is_running
