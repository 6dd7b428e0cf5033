"""The worker of a task of the user's own: prunes, and leaves the rest to the task's functions."""

from __future__ import annotations

import time
from collections.abc import Sequence
from numbers import Real

import numpy as np
import torch
from torch import Tensor, nn

from fppmo_ray.distribution import BoolArray, FloatArray
from fppmo_ray.pruning import extract, importance
from fppmo_ray.pruning.importance import Criterion
from fppmo_ray.pruning.latency import MeasuredLatency, measure_latency_table, time_masks
from fppmo_ray.service.device import claim_device
from fppmo_ray.service.pool.place import Place, here, worker_name
from fppmo_ray.service.task_problem import TaskProblem
from fppmo_ray.service.workers.assignments import (
    Basis,
    Evaluation,
    TaskMaskScore,
    TaskScore,
    TaskTuned,
    TrainingTask,
)
from fppmo_ray.service.workers.dense import DenseNetwork, own_network, saved_bytes
from fppmo_ray.service.workers.latency import Latency, measure_latency
from fppmo_ray.training import ComputeConfig, capture, state_from_bytes, state_to_bytes

_CHOOSE_VAL, _TEST = 2, 3  # last numbers of seeds that no score of the search has
_LATENCY_BATCHES = (1,)  # what a larger one would need of memory, nobody here knows


class TaskWorker:
    """Runs as a Ray actor on the CPUs or the GPU it was given; see ``ScoringWorker``."""

    def __init__(self, problem: TaskProblem, slot: int) -> None:
        self._slot = slot
        self._problem = problem
        self._device = claim_device(problem)
        self._dense = DenseNetwork(problem.network, self._device)

    def __repr__(self) -> str:
        """What the Ray dashboard shows."""
        return worker_name(self, self._slot, self._device.type)

    def ready(self) -> Place:
        """Tell where the worker runs."""
        return here(self._slot)

    def score(
        self, basis: Basis, keep: BoolArray, seed: Sequence[int], held_out: str, steps: int
    ) -> TaskMaskScore:
        """Score one mask.

        Whether a proposal's or a finalist's (``held_out``), only the seed tells; ``steps`` is 0.
        """
        del held_out, steps
        begin = time.perf_counter()
        found = self._score(self._cut(basis, keep), seed)
        return TaskMaskScore(val_loss=-found, seconds=time.perf_counter() - begin)

    def try_score(self, keep: BoolArray) -> None:
        """Score a mask, to see whether that can be done."""
        self._score(self._pruned(self._dense.network, keep), (self._problem.seed,))

    def importance(self, basis: Basis, criterion: Criterion, seed: int) -> FloatArray:
        """Importance of every filter, ``(num_filters,)``."""
        del seed  # the criteria of a task look at weights alone
        return importance(self._dense.on(basis), self._problem.tracing, criterion)

    def untrained(self, basis: Basis, task: TrainingTask) -> tuple[bytes, None]:
        """The state of a network that is not fine-tuned, and no report."""
        return state_to_bytes(capture(self._cut(basis, task.keep), None, 0)), None

    def train_epoch(
        self,
        basis: Basis,
        task: TrainingTask,
        epoch: int,
        state: bytes | None,
        teacher: Basis | None = None,
    ) -> tuple[bytes, TaskTuned]:
        """All of a task's fine-tuning, as the only epoch there is."""
        fine_tune = self._problem.task.fine_tune
        assert fine_tune is not None  # or there would be no epoch
        assert epoch == 0
        assert state is None
        del teacher  # what is learned from is the task's own affair
        network = self._cut(basis, task.keep).train()
        _seed((self._problem.seed,))
        begin = time.perf_counter()
        fine_tune(network)
        tuned = TaskTuned(seconds=time.perf_counter() - begin)
        return state_to_bytes(capture(network, None, 1)), tuned

    def evaluate(self, basis: Basis, keep: BoolArray | None, state: bytes | None) -> Evaluation:
        """Look at the network of a mask, or of a training state, with a fresh seed and the test."""
        task, seed = self._problem.task, self._problem.seed

        def network() -> nn.Module:
            return self._cut(basis, keep) if state is None else self._trained(basis, keep, state)

        first = network()  # what it holds is counted before the task may change it
        parameters = sum(parameter.numel() for parameter in first.parameters())
        file_bytes = saved_bytes(first)
        held_out = self._score(first, (seed, 0, _CHOOSE_VAL))
        if task.test is None:
            tested = self._score(network(), (seed, 0, _TEST))
        else:
            _seed((seed, 0, _TEST))
            tested = _as_number(task.test(network().eval()), "test")
        return Evaluation(
            choose_val=TaskScore(score=held_out),
            test=TaskScore(score=tested),
            parameters=parameters,
            file_bytes=file_bytes,
        )

    def latencies(
        self, basis: Basis, masks: Sequence[BoolArray | None]
    ) -> list[tuple[Latency, ...]]:
        """Forward time of each network (None: the dense one), one after the other."""
        inputs, networks = self._inputs(), [self._cut(basis, keep).eval() for keep in masks]
        return [measure_latency(network, *inputs, batches=_LATENCY_BATCHES) for network in networks]

    def measure_latency_table(
        self, compute: ComputeConfig, batch: int, seed: int
    ) -> MeasuredLatency:
        """Latency over all widths; see ``fppmo_ray.pruning.latency``."""
        dense, tracing = self._dense.timed_on(compute), self._problem.tracing
        return measure_latency_table(dense, tracing, self._inputs(), batch=batch, seed=seed)

    def time_masks(
        self, compute: ComputeConfig, masks: Sequence[BoolArray], batch: int
    ) -> list[int]:
        """Nanoseconds of masks' networks, measured as for the table."""
        dense, tracing = self._dense.timed_on(compute), self._problem.tracing
        return time_masks(dense, tracing, self._inputs(), masks, batch=batch)

    def _inputs(self) -> tuple[Tensor, ...]:
        """The example, without its batch."""
        return tuple(tensor[:1].to(self._device) for tensor in self._problem.task.inputs())

    def _score(self, network: nn.Module, seed: Sequence[int]) -> float:
        return _as_number(self._problem.task.score(network.eval(), _seed(seed)), "score")

    def _cut(self, basis: Basis, keep: BoolArray | None) -> nn.Module:
        """A network of its own: dense as it is, or pruned and mended by the task."""
        dense = self._dense.on(basis)
        if keep is not None:
            return self._pruned(dense, keep)
        return own_network(dense, self._problem.tracing, keep)

    def _pruned(self, dense: nn.Module, keep: BoolArray) -> nn.Module:
        problem = self._problem
        network = extract(dense, problem.tracing, keep)
        if problem.task.recalibrate is not None:
            _seed((problem.seed,))
            problem.task.recalibrate(network)
        return network

    def _trained(self, basis: Basis, keep: BoolArray | None, state: bytes) -> nn.Module:
        dense, tracing = self._dense.on(basis), self._problem.tracing
        return own_network(dense, tracing, keep, state_from_bytes(state))


def _seed(seed: Sequence[int]) -> int:
    """A seed of 32 bits made of several numbers; torch's generators have it from here on."""
    number = int(np.random.SeedSequence(tuple(seed)).generate_state(1)[0])
    torch.manual_seed(number)
    return number


def _as_number(found: object, name: str) -> float:
    if isinstance(found, Real) or (isinstance(found, Tensor) and found.numel() == 1):
        return float(found)
    raise TypeError(f"{name} of the task must return a number, got {type(found).__name__}")
