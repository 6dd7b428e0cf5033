"""Workers that pretend to score and to train: functions of their arguments alone, in no time."""

from __future__ import annotations

import copy
import hashlib
import random
from typing import Any

import numpy as np
import torch
from torch import nn

from fppmo_ray.pruning import extract, importance
from fppmo_ray.pruning.score import Score
from fppmo_ray.service.pool.work import Outcome, Work
from fppmo_ray.service.problem import Problem
from fppmo_ray.service.weights import digest, load_arrays
from fppmo_ray.service.workers.assignments import AdaptationTask, Basis, TrainingTask
from fppmo_ray.training import EpochReport, TrainingState, state_from_bytes, state_to_bytes


class TinyCNN(nn.Module):
    """Digits in three layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 12, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(12)
        self.conv2 = nn.Conv2d(12, 16, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.norm1(self.conv1(images)).relu()
        features = self.norm2(self.conv2(features)).relu()
        return self.head(features.mean((2, 3)))


def seed_of(*parts: Any) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big")


class PretendTrainer:
    """Has the methods of a ``ScoringWorker``; whatever they depend on there changes them here."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem

    def importance(self, basis: Basis, criterion: str, seed: int) -> np.ndarray:
        return importance(self._network(basis, None), self._problem.tracing, criterion)

    def score(self, basis: Basis, keep: np.ndarray, seed: Any, held_out: str, steps: int) -> Score:
        noise = seed_of(digest(basis.arrays), keep.tobytes(), seed, held_out, steps) / 2**32
        loss = float(keep[::2].mean()) + 0.1 * noise
        return Score(val_loss=loss, val_accuracy=1 - loss / 2, seconds=0.0)

    def train_epoch(
        self, basis: Basis, task: TrainingTask, epoch: int, state: bytes | None, teacher: Basis
    ) -> tuple[bytes, EpochReport]:
        return self._trained(basis, task.keep, state, (task.name, epoch, digest(teacher.arrays)))

    def adapt_epoch(
        self, basis: Basis, task: AdaptationTask, epoch: int, state: bytes | None, teacher: Basis
    ) -> tuple[bytes, EpochReport]:
        masks = hashlib.sha256(task.masks.tobytes()).hexdigest()
        what = (task.name, task.seed, masks, epoch, digest(teacher.arrays))
        return self._trained(basis, None, state, what)

    def _network(self, basis: Basis, keep: np.ndarray | None) -> nn.Module:
        network = copy.deepcopy(self._problem.network)
        load_arrays(network, basis.arrays)
        return network if keep is None else extract(network, self._problem.tracing, keep)

    def _trained(
        self, basis: Basis, keep: np.ndarray | None, state: bytes | None, what: Any
    ) -> tuple[bytes, EpochReport]:
        epoch = 0 if state is None else state_from_bytes(state).epochs_done
        network = self._network(basis, keep)
        if state is not None:
            network.load_state_dict(state_from_bytes(state).network)
        generator = torch.Generator().manual_seed(seed_of(what))
        with torch.no_grad():
            for parameter in network.parameters():
                parameter += 0.01 * torch.randn(parameter.shape, generator=generator)
        new = TrainingState(
            network={name: tensor.clone() for name, tensor in network.state_dict().items()},
            momentum={},
            epochs_done=epoch + 1,
        )
        loss = seed_of(what, digest({k: v.numpy() for k, v in new.network.items()})) / 2**32
        report = EpochReport(epoch=epoch, loss=loss, accuracy=0.5, learning_rate=0.1, seconds=0.0)
        return state_to_bytes(new), report


class PoolHere:
    """A worker pool's part, in this process: work ends in a random order, up to so many at once.

    Args:
        worker: Does the work.
        seed: Of the order.
        num_workers: How many pieces of work end together at most.
    """

    num_ready = num_busy = num_queued = num_requeued = 0

    def __init__(self, worker: Any, seed: int, num_workers: int = 2) -> None:
        self.num_workers = num_workers
        self._worker = worker
        self._order = random.Random(seed)
        self._queue: list[Work] = []
        self.done: list[Work] = []

    @property
    def num_unfinished(self) -> int:
        return len(self._queue)

    def holds(self, tag: Any) -> bool:
        return any(work.tag == tag for work in self._queue)

    def submit(self, work: Work) -> None:
        self._queue.append(work)

    def next_outcomes(self) -> list[Outcome]:
        self._order.shuffle(self._queue)
        count = self._order.randint(1, min(self.num_workers, len(self._queue)))
        ended, self._queue = self._queue[:count], self._queue[count:]
        self.done += ended
        return [Outcome(work=work, value=self._do(work), worker="here") for work in ended]

    def run(self, works: list[Work]) -> list[Any]:
        return [self._do(work) for work in works]

    def _do(self, work: Work) -> Any:
        return getattr(self._worker, work.method)(*work.arguments)
