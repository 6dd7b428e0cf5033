"""The scoring worker: an actor that holds the data on its device and does all heavy work."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial

import numpy as np
import torch
from torch import nn

from fppmo_ray.distribution import BoolArray, FloatArray
from fppmo_ray.pruning import importance
from fppmo_ray.pruning.adapt import adapt_epoch
from fppmo_ray.pruning.compute_trial import ComputeTrial, try_compute
from fppmo_ray.pruning.importance import Criterion
from fppmo_ray.pruning.latency import MeasuredLatency, measure_latency_table, time_masks
from fppmo_ray.pruning.score import Candidate, Score, score
from fppmo_ray.service.device import claim_device
from fppmo_ray.service.pool.place import Place, here, worker_name
from fppmo_ray.service.problem import Problem, open_split, pruned_network
from fppmo_ray.service.weights import load_arrays
from fppmo_ray.service.workers.assignments import AdaptationTask, Basis, Evaluation, TrainingTask
from fppmo_ray.service.workers.dense import DenseNetwork, own_network, saved_bytes
from fppmo_ray.service.workers.latency import Latency, measure_latency
from fppmo_ray.training import (
    WHOLE,
    ComputeConfig,
    DType,
    EpochReport,
    Metrics,
    Recipe,
    Shard,
    TrainingState,
    capture,
    evaluate,
    native_dtype,
    state_from_bytes,
    state_to_bytes,
    train_epoch,
)

_EVALUATION_BATCH = 250
_TAYLOR_BATCHES = 8  # 1,000 images: the order of the filters hardly moves with more


class ScoringWorker:
    """Runs as a Ray actor on the CPUs or the GPU it was given."""

    def __init__(self, problem: Problem, slot: int) -> None:
        self._slot = slot
        self._problem = problem
        self._device = claim_device(problem)
        self._dense = DenseNetwork(problem.network, self._device)
        self._teacher: tuple[int, nn.Module] | None = None
        self._split = cache(partial(open_split, problem, device=self._device))

    def __repr__(self) -> str:
        """What the Ray dashboard shows."""
        return worker_name(self, self._slot, self._device.type)

    def ready(self) -> Place:
        """Put the images on the device, then tell where the worker runs."""
        for split in ("search_train", "search_val"):
            self._split(split)
        return here(self._slot)

    def score(
        self, basis: Basis, keep: BoolArray, seed: Sequence[int], held_out: str, steps: int
    ) -> Score:
        """Score one mask on ``search_val`` or ``choose_val``, with so many steps of fine-tuning.

        On choose-val it is a finalist's, on more images. The learning rate's schedule is laid over
        these steps; a deeper score begins anew.
        """
        problem = self._problem
        fidelity = problem.rescore_fidelity if held_out == "choose_val" else problem.fidelity
        candidate = self._candidate(self._dense.on(basis), keep, basis.compute)
        return score(
            replace(
                candidate,
                held_out=self._split(held_out),
                fidelity=replace(fidelity, steps=steps),
                seed=tuple(seed),
            )
        )

    def native_dtype(self) -> DType:
        """Return the fastest dtype that this worker's processor has units for."""
        return native_dtype(self._device)

    def try_compute(self, compute: ComputeConfig, keep: BoolArray) -> ComputeTrial:
        """Measure how long a score of a mask takes with a compute configuration."""
        torch.set_num_threads(compute.threads)
        return try_compute(self._candidate(self._dense.network, keep, compute))

    def importance(self, basis: Basis, criterion: Criterion, seed: int) -> FloatArray:
        """Importance of every filter, ``(num_filters,)``."""
        batches = None
        if criterion == "taylor":
            images = self._split("search_train")
            batch = self._problem.recipe.batch_size
            rng = np.random.default_rng(seed)
            chosen = np.sort(rng.permutation(len(images))[: batch * _TAYLOR_BATCHES])
            batches = images.batches(batch, chosen)
        return importance(self._dense.on(basis), self._problem.tracing, criterion, batches)

    def untrained(self, basis: Basis, task: TrainingTask) -> tuple[bytes, None]:
        """The state of a task's network before its first epoch, and no report."""
        network = self._network(basis, task.keep)
        return state_to_bytes(capture(network, None, 0)), None

    def train_epoch(
        self,
        basis: Basis,
        task: TrainingTask,
        epoch: int,
        state: bytes | None,
        teacher: Basis | None = None,
        shard: Shard = WHOLE,
    ) -> tuple[bytes, EpochReport]:
        """Train one epoch from ``state`` (None: from the round's weights).

        What is distilled is the dense network of ``teacher`` (None: of the same round). With a
        shard, this is one of several processes that do so together.
        """
        begin = state_from_bytes(state) if state is not None else None
        new_state, report = train_epoch(
            self._network(basis, task.keep, begin),
            self._split("search_train"),
            task.recipe,
            epoch=epoch,
            seed=task.seed,
            state=begin,
            compute=basis.compute,
            teacher=self._teacher_on(teacher or basis, task.recipe),
            shard=shard,
        )
        return state_to_bytes(new_state), report

    def adapt_epoch(
        self,
        basis: Basis,
        task: AdaptationTask,
        epoch: int,
        state: bytes | None,
        teacher: Basis | None = None,
    ) -> tuple[bytes, EpochReport]:
        """Adapt dense weights for one epoch from ``state``; see ``train_epoch``."""
        begin = state_from_bytes(state) if state is not None else None
        new_state, report = adapt_epoch(
            self._network(basis, None, begin),
            self._problem.tracing,
            task.masks,
            self._split("search_train"),
            task.recipe,
            epoch=epoch,
            seed=task.seed,
            state=begin,
            compute=basis.compute,
            teacher=self._teacher_on(teacher or basis, task.recipe),
        )
        return state_to_bytes(new_state), report

    def evaluate(self, basis: Basis, keep: BoolArray | None, state: bytes | None) -> Evaluation:
        """Evaluate the network of a mask, or of a training state, on choose-val and test."""
        network = self._network(basis, keep, state_from_bytes(state) if state else None)
        network.eval()
        return Evaluation(
            choose_val=self._metrics(network, "choose_val"),
            test=self._metrics(network, "test"),
            parameters=sum(parameter.numel() for parameter in network.parameters()),
            file_bytes=saved_bytes(network),
        )

    def latencies(
        self, basis: Basis, masks: Sequence[BoolArray | None]
    ) -> list[tuple[Latency, ...]]:
        """Forward time of each network (None: the dense one), one after the other.

        In one call on one worker, so that the networks do not slow down each other.
        """
        networks = [self._network(basis, keep).eval() for keep in masks]
        return [measure_latency(network, *self._inputs()) for network in networks]

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

    def _inputs(self) -> tuple[torch.Tensor]:
        """One image."""
        image, _ = next(iter(self._split("choose_val").batches(1)))
        return (image,)

    def _candidate(self, dense: nn.Module, keep: BoolArray, compute: ComputeConfig) -> Candidate:
        problem = self._problem
        return Candidate(
            dense=dense,
            tracing=problem.tracing,
            keep=keep,
            search_train=self._split("search_train"),
            held_out=self._split("search_val"),
            fidelity=problem.fidelity,
            recipe=problem.recipe,
            compute=compute,
        )

    def _metrics(self, network: nn.Module, split: str) -> Metrics:
        return evaluate(network, self._split(split).batches(_EVALUATION_BATCH))

    def _network(
        self, basis: Basis, keep: BoolArray | None, state: TrainingState | None = None
    ) -> nn.Module:
        """A network of its own: in a training state, or as it is before it is trained.

        That is, dense as it is, or pruned and recalibrated.
        """
        dense, problem = self._dense.on(basis), self._problem
        if keep is not None and state is None:
            return pruned_network(problem, dense, keep, self._split("search_train"))
        return own_network(dense, problem.tracing, keep, state)

    def _teacher_on(self, basis: Basis, recipe: Recipe) -> nn.Module | None:
        """The dense network of a round, kept beside that of the round in work."""
        if recipe.distillation_weight == 0:
            return None
        if self._teacher is None or self._teacher[0] != basis.round:
            network = copy.deepcopy(self._dense.network)
            load_arrays(network, basis.arrays)
            self._teacher = basis.round, network.eval()
        return self._teacher[1]
