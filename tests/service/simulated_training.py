"""Workers that simulate scores and training: functions of their arguments alone, in no time."""

from __future__ import annotations

import copy
import hashlib
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from inline_pool import InlineActor
from torch import nn

from fppmo_ray.distribution import Feedback, Proposal
from fppmo_ray.pruning import Score, extract, importance
from fppmo_ray.pruning.calibration import FilterOrder
from fppmo_ray.service.images_on_worker import dense_scored
from fppmo_ray.service.journal.facts import DenseScored
from fppmo_ray.service.pool.call import Call
from fppmo_ray.service.problem import Problem
from fppmo_ray.service.worker import feedback_of
from fppmo_ray.service.worker_protocol import (
    TrainingReport,
    TrainingTask,
    WeightsSnapshot,
    digest,
    load_arrays,
)
from fppmo_ray.training import TrainingState, state_from_bytes, state_to_bytes


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


class SimulatedTrainer:
    """Answers some calls of a ``Worker``; whatever they depend on there changes them here."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem

    def importance(self, weights: WeightsSnapshot, criterion: Any, seed: int) -> np.ndarray:
        return importance(self._network(weights, None), self._problem.tracing, criterion)

    def filter_order(self, weights: WeightsSnapshot, ordering: Any, seed: int) -> FilterOrder:
        criterion = "l1" if ordering == "obs" else ordering
        curves = [
            np.linspace(1, 0, group.num_filters + 1) / group.num_filters
            for group in self._problem.space.groups
        ]
        return FilterOrder(
            importance=self.importance(weights, criterion, seed), error_curves=tuple(curves)
        )

    def score(self, weights: WeightsSnapshot, proposal: Proposal) -> Feedback:
        found = self.rescore(weights, proposal.keep, proposal.score_seed, "search_val")
        return feedback_of(proposal.proposal_id, found, steps=0)

    def score_dense(self, weights: WeightsSnapshot) -> DenseScored:
        predicted = np.arange(300) % 10
        return dense_scored(predicted, np.where(predicted == 3, 4, predicted), 10)

    def rescore(
        self, weights: WeightsSnapshot, keep: np.ndarray, seed: Sequence[int], split: str
    ) -> Score:
        noise = seed_of(weights.sha256, keep.tobytes(), tuple(seed), split) / 2**32
        loss = float(keep[::2].mean()) + 0.1 * noise
        return Score(val_loss=loss, val_accuracy=1 - loss / 2, seconds=0.0)

    def train_epoch(
        self,
        weights: WeightsSnapshot,
        task: TrainingTask,
        epoch: int,
        state: bytes | None,
        teacher: WeightsSnapshot,
    ) -> tuple[bytes, TrainingReport]:
        network = self._network(weights, task.keep)
        if state is not None:
            assert state_from_bytes(state).epochs_done == epoch
            network.load_state_dict(state_from_bytes(state).network)
        what = (task.name, task.seed, epoch, teacher.sha256)
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
        return state_to_bytes(new), TrainingReport(loss=loss, seconds=0.0)

    def distill(
        self, weights: WeightsSnapshot, task: TrainingTask, teacher: WeightsSnapshot
    ) -> tuple[bytes, TrainingReport]:
        state, report = self.train_epoch(weights, task, 0, None, teacher)
        return state_to_bytes(replace(state_from_bytes(state), epochs_done=0)), report

    def _network(self, weights: WeightsSnapshot, keep: np.ndarray | None) -> nn.Module:
        network = copy.deepcopy(self._problem.network)
        load_arrays(network, weights.arrays)
        return network if keep is None else extract(network, self._problem.tracing, keep)


class PoolHere:
    """Simulates a worker pool in this process: calls end in a random order, up to so many at once.

    Args:
        worker: Answers the calls.
        seed: Seed of the order.
        num_workers: Number of calls that end together at most.
    """

    num_ready = num_busy = num_queued = num_requeued = 0
    stop = None

    def __init__(self, worker: Any, seed: int = 0, num_workers: int = 2) -> None:
        self.num_workers = num_workers
        self._actor = InlineActor(worker)
        self._order = random.Random(seed)
        self._queue: list[Call[Any, Any]] = []
        self.done: list[Call[Any, Any]] = []
        self.is_away = False

    @property
    def num_unfinished(self) -> int:
        return len(self._queue)

    @property
    def names(self) -> list[str]:
        """The names of the calls that were made, in order."""
        return [call.name for call in self.done]

    def submit(self, call: Call[Any, Any]) -> None:
        assert not self.is_away
        self._queue.append(call)

    def next_ended(self) -> list[Call[Any, Any]]:
        self._order.shuffle(self._queue)
        count = self._order.randint(1, min(self.num_workers, len(self._queue)))
        ended, self._queue = self._queue[:count], self._queue[count:]
        for call in ended:
            self._make(call)
        return ended

    def run(self, calls: Sequence[Call[Any, Any]]) -> list[Any]:
        assert not self._queue
        assert not self.is_away
        for call in calls:
            self._make(call)
        return [call.result for call in calls]

    @contextmanager
    def away(self) -> Iterator[None]:
        assert not self._queue
        self.is_away = True
        yield
        self.is_away = False

    def _make(self, call: Call[Any, Any]) -> None:
        call.send(self._actor, runs_now=True)
        call.end_with(call.reference, "0@here:1")
        self.done.append(call)
